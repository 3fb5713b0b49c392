"""`TEST.AUG`: the results of Detectron2's own script, after the plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import GeneralizedRCNNWithTTA
from runs import config
from scene_data import VAL

from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.evaluation.augmentation import check_test_augmentation
from fpn_plugin.evaluation.build import build_evaluator, check_evaluators

AUGMENTED = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", [64, 80]]


def augmented(head: str, folder: Path, *keys: object) -> CfgNode:
    return config(head, "fpn", folder, *AUGMENTED, *keys)


@pytest.mark.parametrize("keys", [[], ["SOLVER.AMP.ENABLED", True, "MODEL.CHANNELS_LAST", True]])
def test_the_results_of_a_run_are_detectron2s(
    keys: list[Any], scenes: None, tmp_path: Path
) -> None:
    cfg = augmented("mask_rcnn", tmp_path, "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1, *keys)
    trainer = Trainer(cfg)
    trainer.train()
    results = trainer._last_eval_results
    assert list(results) == ["bbox", "segm", "bbox_TTA", "segm_TTA"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    ends = [line["iteration"] for line in lines if "bbox_TTA/AP" in line]
    assert len(ends) == 1 and ends[0] == max(line["iteration"] for line in lines)
    assert len([line for line in lines if "bbox/AP" in line]) == 2
    assert (tmp_path / "inference_TTA" / "coco_instances_results.json").is_file()
    if keys:
        return
    # as Detectron2's script evaluates
    model = GeneralizedRCNNWithTTA(cfg, trainer.model)
    loader = Trainer.build_test_loader(cfg, VAL)
    expected = inference_on_dataset(model, loader, build_evaluator(cfg, VAL, str(tmp_path / "x")))
    for task in ("bbox", "segm"):
        assert results[f"{task}_TTA"] == pytest.approx(expected[task], nan_ok=True)
    # and with --eval-only, or in a notebook
    assert list(Trainer.test(cfg, trainer.model)) == list(results)


@pytest.mark.parametrize(
    "head, keys, text",
    [
        ("retinanet", [], "META_ARCHITECTURE 'RetinaNet'"),
        ("fcos", [], "META_ARCHITECTURE 'FCOS'"),
        ("panoptic_fpn", [], "META_ARCHITECTURE 'PanopticFPN'"),
        ("rpn", [], "META_ARCHITECTURE 'ProposalNetwork'"),
        ("keypoint_rcnn", [], "MODEL.KEYPOINT_ON"),
        ("faster_rcnn", ["MODEL.LOAD_PROPOSALS", True], "MODEL.LOAD_PROPOSALS"),
        ("faster_rcnn", ["TEST.AUG.MIN_SIZES", []], "has no size"),
    ],
)
def test_what_detectron2_cannot_augment_is_refused_before_training(
    head: str, keys: list[Any], text: str, scenes: None, tmp_path: Path
) -> None:
    cfg = augmented(head, tmp_path, *keys)
    with pytest.raises(ValueError, match=f"^TEST.AUG.*{text}"):
        check_evaluators(cfg)
    cfg.TEST.AUG.ENABLED = False
    check_test_augmentation(cfg)


@pytest.mark.parametrize("pyramid", ["bifpn", "nas_fpn", "graph"])
def test_any_pyramid(pyramid: str, scenes: None, tmp_path: Path) -> None:
    cfg = config("mask_rcnn", pyramid, tmp_path, *AUGMENTED)
    assert "segm_TTA" in Trainer.test(cfg, Trainer.build_model(cfg))


def test_one_channel(scenes: None, tmp_path: Path) -> None:
    keys = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [120.0], "MODEL.PIXEL_STD", [58.0]]
    cfg = augmented("faster_rcnn", tmp_path, *keys)
    assert "bbox_TTA" in Trainer.test(cfg, Trainer.build_model(cfg))
