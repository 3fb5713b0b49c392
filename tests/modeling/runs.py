"""One training step and one evaluation of a head on a pyramid, on drawn scenes, by the real trainer."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from prepare_scenes import CLASSES
from scene_data import POINTS, SEM_SEG, TRAIN, VAL
from torch import Tensor

from fpn_plugin.config import load_config
from fpn_plugin.engine.trainer import Trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# the config, the losses of one step, and what is evaluated
HEADS: dict[str, tuple[str, set[str], set[str]]] = {
    "faster_rcnn": (
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"},
        {"bbox"},
    ),
    "mask_rcnn": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"},
        {"bbox", "segm"},
    ),
    "cascade_mask_rcnn": (
        "COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_1x.yaml",
        {"loss_rpn_cls", "loss_rpn_loc", "loss_mask"}
        | {f"loss_{kind}_stage{stage}" for kind in ("cls", "box_reg") for stage in range(3)},
        {"bbox", "segm"},
    ),
    "keypoint_rcnn": (
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_keypoint"},
        {"bbox", "keypoints"},
    ),
    "panoptic_fpn": (
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
        {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask", "loss_sem_seg"},
        {"bbox", "segm", "sem_seg"},
    ),
    "rpn": (
        "COCO-Detection/rpn_R_50_FPN_1x.yaml",
        {"loss_rpn_cls", "loss_rpn_loc"},
        {"box_proposals"},
    ),
    "retinanet": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        {"loss_cls", "loss_box_reg"},
        {"bbox"},
    ),
    "fcos": (
        "COCO-Detection/fcos_R_50_FPN_1x.yaml",
        {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"},
        {"bbox"},
    ),
}
NODES = [
    {"name": "top5", "level": 5, "inputs": ["res5"], "block": "conv1x1"},
    {"name": "mid4", "level": 4, "inputs": ["res4", "top5"], "fuse": "avg", "block": "conv3x3"},
    {"name": "out3", "level": 3, "inputs": ["res3", "mid4"], "block": "conv3x3", "output": True},
    {"name": "out4", "level": 4, "inputs": ["mid4", "out3"], "output": True},
    {"name": "out5", "level": 5, "inputs": ["top5", "out4"], "output": True},
    {"name": "out6", "level": 6, "inputs": ["out5"], "output": True},
]
PYRAMIDS: dict[str, list[object]] = {
    "fpn": ["MODEL.FPN.TOPOLOGY", "fpn"],
    "pafpn": ["MODEL.FPN.TOPOLOGY", "pafpn"],
    "bifpn": ["MODEL.FPN.TOPOLOGY", "bifpn", "MODEL.FPN.FUSE_TYPE", "fast_normalized"],
    "nas_fpn": ["MODEL.FPN.TOPOLOGY", "nas_fpn", "MODEL.FPN.NORM", "BN"],
    "simple": ["MODEL.FPN.TOPOLOGY", "simple", "MODEL.FPN.NORM", "LN"],
    "graph": ["MODEL.FPN.GRAPH", NODES, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]],
}
TINY: dict[str, object] = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.BOTTOM_UP.PIXELS": "config",
    "MODEL.PIXEL_STD": [58.0, 57.0, 57.0],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 64,
    # untrained heads score everything about zero: without this there would be nothing to evaluate
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    "MODEL.FCOS.SCORE_THRESH_TEST": 0.0,
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": 0.0,
    "MODEL.ROI_HEADS.NUM_CLASSES": len(CLASSES),
    "MODEL.RETINANET.NUM_CLASSES": len(CLASSES),
    "MODEL.FCOS.NUM_CLASSES": len(CLASSES),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [16, 16],
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": len(POINTS),
    "TEST.KEYPOINT_OKS_SIGMAS": [0.1] * len(POINTS),
    "TEST.DETECTIONS_PER_IMAGE": 20,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 2,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "DATASETS.TRAIN": [TRAIN],
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": [80],
    "INPUT.MIN_SIZE_TEST": 80,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.MAX_ITER": 1,
    "SEED": 0,
}


def config(head: str, pyramid: str, folder: Path, *overrides: object) -> CfgNode:
    path, _, tasks = HEADS[head]
    unread = () if head == "fcos" else ("MODEL.FCOS.SCORE_THRESH_TEST",)
    if "MODEL.BOTTOM_UP.NAME" in overrides:
        network = str(overrides[overrides.index("MODEL.BOTTOM_UP.NAME") + 1])
        unread += () if "resnet_backbone" in network else ("MODEL.RESNETS.",)
    keys = [part for pair in TINY.items() for part in pair if not pair[0].startswith(unread)]
    keys += PYRAMIDS[pyramid]
    keys += ["DATASETS.TEST", [VAL, SEM_SEG] if "sem_seg" in tasks else [VAL]]
    keys += ["OUTPUT_DIR", str(folder), *overrides]
    return load_config(Namespace(config_file=str(CONFIGS / path), opts=[str(key) for key in keys]))


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def part(name: str) -> str:
    """Which of the three parts of a detector a parameter belongs to."""
    if name.startswith("backbone.bottom_up."):
        return "bottom-up"
    return "pyramid" if name.startswith("backbone.") else "head"


def check_run(head: str, cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and evaluate: finite losses, every part moved, numbers for every task."""
    _, losses, tasks = HEADS[head]
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    monkeypatch.setattr(trainer.checkpointer, "save", lambda *args, **kwargs: None)  # slow
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()

    latest: dict[str, Any] = trainer.storage.latest()
    found = {name: latest[name][0] for name in losses | {"total_loss"}}
    assert all(math.isfinite(value) for value in found.values()), found
    assert math.isclose(found["total_loss"], sum(found[name] for name in losses), rel_tol=1e-2)
    after = {name: value.detach() for name, value in trainer.model.named_parameters()}
    assert all(torch.isfinite(value).all() for value in after.values())
    assert {part(name) for name in moved(before, after)} == {"bottom-up", "pyramid", "head"}

    numbers = flat(trainer._last_eval_results)
    assert set(numbers) == tasks
    for task, metrics in numbers.items():
        main = {"box_proposals": "AR@100", "sem_seg": "mIoU"}.get(task, "AP")
        assert 0 <= metrics[main] <= 100, (task, metrics)
        # COCO says nan where the pictures hold no object of that size, or class
        assert all(math.isnan(value) or -1 <= value <= 100 for value in metrics.values()), metrics


def flat(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics by task, of one dataset or of several."""
    if VAL in results:
        return {task: found for each in results.values() for task, found in each.items()}
    return dict(results)
