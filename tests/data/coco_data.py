"""A tiny dataset in COCO's format without faults, and configs that use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode, get_cfg
from PIL import Image

from fpn_plugin.config import add_fpn_config

SOUND: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 64, "height": 48},
        {"id": 2, "file_name": "b.jpg", "width": 64, "height": 48},
    ],
    "annotations": [
        {
            "id": i + 1,
            "image_id": 1 + i % 2,
            "category_id": 1 + i % 2,
            "bbox": [4 + i, 4, 10, 12],
            "area": 120,
            "iscrowd": 0,
            "segmentation": [[4 + i, 4, 14 + i, 4, 14 + i, 16, 4 + i, 16]],
        }
        for i in range(4)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}


def write_coco(folder: Path, content: Any, name: str = "own.json") -> tuple[str, str]:
    """Write a JSON file and the images of `SOUND`; return the paths of both."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for image in SOUND["images"]:
        Image.fromarray(pixels).save(images / image["file_name"])
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name), str(images)


def config(
    train: tuple[str, ...] = (), test: tuple[str, ...] = (), classes: int = 2, **own: str
) -> CfgNode:
    """A config of datasets by name, or of one's own by the keys of `DATASETS.OWN`."""
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    for key, value in own.items():
        cfg.DATASETS.OWN[key] = value
    return cfg
