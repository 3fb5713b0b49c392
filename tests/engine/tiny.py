"""A tiny detector and a tiny dataset in COCO's format: a run takes seconds on two cores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np  # noqa: E402
from detectron2 import model_zoo  # noqa: E402
from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.datasets import register_coco_instances  # noqa: E402
from PIL import Image  # noqa: E402

from fpn_plugin.config import add_fpn_config  # noqa: E402

TRAIN, VAL = "engine_train", "engine_val"
TINY: dict[str, Any] = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.PIXEL_STD": (58.0, 57.0, 57.0),
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.DEPTH": 50,  # ResNet-18's widths are fixed
    "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16,
    "INPUT.MIN_SIZE_TRAIN": (48, 64),
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "DATASETS.TRAIN": (TRAIN,),
    "DATASETS.TEST": (),
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.WARMUP_ITERS": 4,
    "SOLVER.STEPS": (5,),
    "SOLVER.MAX_ITER": 6,
    "SOLVER.CHECKPOINT_PERIOD": 3,
    "TEST.EVAL_PERIOD": 2,
    "SEED": 7,
}


def write_dataset(folder: Path, images: int = 10) -> Path:
    """Noise images, wide and high, with two boxes each; returns the JSON's path."""
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number in range(images):
        width, height = (64, 48) if number % 3 else (48, 64)
        name = f"{number}.png"
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        records.append({"id": number + 1, "file_name": name, "width": width, "height": height})
        for category in (1, 2):
            box = [int(x) for x in (*rng.integers(0, 20, 2), *rng.integers(10, 25, 2))]
            place = {"id": len(boxes) + 1, "image_id": number + 1, "category_id": category}
            boxes.append({**place, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": records, "annotations": boxes, "categories": categories}))
    return path


def add_masks(path: Path) -> None:
    """Give every box of a dataset its rectangle as a mask."""
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        right, bottom = x + width, y + height
        annotation["segmentation"] = [[x, y, right, y, right, bottom, x, bottom]]
    path.write_text(json.dumps(content))


def register(json_file: Path) -> None:
    """Register the dataset for training and for validation; again if it is there already."""
    for name in (TRAIN, VAL):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_coco_instances(name, {}, str(json_file), str(json_file.parent))


def tiny_config(output: Path, **overrides: Any) -> CfgNode:
    """The tiny detector; the names of overrides are keys with `__` for the dots."""
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    values = {**TINY, **{key.replace("__", "."): value for key, value in overrides.items()}}
    cfg.merge_from_list([part for pair in values.items() for part in pair])
    cfg.OUTPUT_DIR = str(output)
    return cfg
