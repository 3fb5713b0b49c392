"""Test sets, detections and finished runs, made up within milliseconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from pycocotools import mask as masks_of
from tiny import tiny_config

SIDE = 256  # pixels of an image
# longer sides of the objects of an image: of every size that COCO tells apart, and edges' own
SIDES = (6, 8, 12, 20, 32, 50, 96, 110)


@dataclass(frozen=True)
class Study:
    """Folders of runs, the truth, and the report on them."""

    folders: list[str]
    truth: Path
    report: Path

    @property
    def content(self) -> dict[str, Any]:
        return json.loads((self.report / "compare.json").read_text())


def write_truth(path: Path, images: int = 6, seed: int = 0) -> dict[str, Any]:
    """Objects of two categories in each image, with masks; returns the JSON's content."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        for number, side in enumerate(SIDES):
            x, y = (float(value) for value in rng.integers(0, SIDE - side, 2))
            height = side if number % 2 else side * 0.75
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": 3 + number % 2,
                    "bbox": [x, y, side, height],
                    "area": side * height,
                    "segmentation": [corners(x, y, side, height)],
                    "iscrowd": int(image == 1 and number == 4),
                }
            )
    names = [f"{number}.png" for number in range(1, images + 1)]
    truth = {
        "images": [
            {"id": i, "file_name": name, "width": SIDE, "height": SIDE}
            for i, name in enumerate(names, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "nut"}, {"id": 4, "name": "bolt"}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(truth))
    return truth


def corners(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def detect(
    truth: Mapping[str, Any], error: float, seed: int = 0, masks: bool = False
) -> list[dict[str, Any]]:
    """Every object, and about as many false ones.

    Args:
        error: by how much of its side a box is off, at most.
    """
    rng = np.random.default_rng(seed)
    results = []
    for annotation in truth["annotations"]:
        x, y, width, height = annotation["bbox"]
        off = rng.uniform(-error, error, 2) * min(width, height)
        box = [x + off[0], y + off[1], width, height]
        stray = [*rng.uniform(0, SIDE / 2, 2), *rng.uniform(6, 100, 2)]
        for place, score in ((box, rng.uniform(0.3, 1)), (stray, rng.uniform(0, 0.7))):
            place = [round(float(value), 2) for value in place]
            result = {key: annotation[key] for key in ("image_id", "category_id")}
            result.update({"bbox": place, "score": float(score)})
            if masks:
                polygon = [corners(*place)]
                rle = masks_of.merge(masks_of.frPyObjects(polygon, SIDE, SIDE))
                result["segmentation"] = {**rle, "counts": rle["counts"].decode()}
            results.append(result)
    return results


def write_run(
    folder: Path,
    truth: Path,
    results: Sequence[Mapping[str, Any]] | None,
    metrics: Sequence[Mapping[str, Any]] = (),
    **overrides: Any,
) -> str:
    """A run's folder; the names of overrides are keys with `__` for the dots.

    Args:
        truth: the test set's annotations.
        results: the detections; None for none.
        metrics: the lines of metrics.json.
    """
    (folder / "inference").mkdir(parents=True)
    data = {"DATASETS__TEST": ("own_val",), "DATASETS__OWN__VAL_JSON": str(truth)}
    model = {"MODEL__BACKBONE__NAME": "build_pyramid_backbone", "SOLVER__MAX_ITER": 40}
    cfg = tiny_config(folder, **{**data, **model, **overrides})
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if results is not None:
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(results))
    return str(folder)


def evaluation(ap: float) -> dict[str, float]:
    """The line of metrics.json of an evaluation halfway."""
    return {"iteration": 20, "bbox/AP": ap}
