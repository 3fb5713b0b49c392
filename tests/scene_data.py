"""A tiny dataset for every head: drawn scenes with boxes and masks, keypoints and semantic maps made from the masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image
from prepare_scenes import CLASSES, SceneOptions, coco_annotation, draw_scene

TRAIN, VAL = "heads_train", "heads_val"
SEM_SEG = "heads_val_sem_seg"  # the same pictures, for Detectron2's semantic evaluator
OPTIONS = SceneOptions(width=96, height=80, min_size=16, max_size=64, min_objects=3, max_objects=5)
POINTS = ("top", "left", "bottom", "right")
IMAGES = 2


def extreme_points(mask: np.ndarray) -> list[int]:
    """The first pixel of a mask on each side, as COCO's `x, y, 2` (seen) in the order of `POINTS`."""
    rows, columns = np.nonzero(mask)
    places = (rows.argmin(), columns.argmin(), rows.argmax(), columns.argmax())
    return [int(value) for i in places for value in (columns[i], rows[i], 2)]


def write_split(folder: Path, split: str) -> Path:
    """Pictures, semantic maps (0: things, 1: ground, as Panoptic FPN has it) and COCO's JSON."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(IMAGES):
        scene = draw_scene(OPTIONS, split, index)
        name = f"{split}{index}.png"
        Image.fromarray(scene.pixels).save(folder / name)
        Image.fromarray((scene.owner < 0).astype(np.uint8)).save(folder / f"labels_{name}")
        height, width = scene.owner.shape
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for number in range(len(scene.classes)):
            ids = {"id": len(annotations) + 1, "image_id": index + 1}
            points = {"keypoints": extreme_points(scene.mask(number)), "num_keypoints": len(POINTS)}
            annotations.append({**ids, **points, **coco_annotation(scene, number)})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / f"{split}.json"
    path.write_text(json.dumps(content))
    return path


def with_labels(path: Path, name: str) -> list[dict[str, Any]]:
    records = load_coco_json(str(path), str(path.parent), name, extra_annotation_keys=["keypoints"])
    for record in records:
        picture = Path(record["file_name"])
        record["sem_seg_file_name"] = str(picture.with_name(f"labels_{picture.name}"))
    return records


def register(folder: Path) -> None:
    """Register the three datasets; again if they are there already."""
    paths = {split: write_split(folder, split) for split in ("train", "val")}
    datasets = {TRAIN: ("train", "coco"), VAL: ("val", "coco"), SEM_SEG: ("val", "sem_seg")}
    for name, (split, evaluator) in datasets.items():
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        path = paths[split]
        DatasetCatalog.register(name, lambda path=path, name=name: with_labels(path, name))
        MetadataCatalog.get(name).set(
            json_file=str(path),
            image_root=str(folder),
            evaluator_type=evaluator,
            keypoint_names=POINTS,
            keypoint_flip_map=(("left", "right"),),
            stuff_classes=("things", "ground"),
            ignore_label=255,
        )
