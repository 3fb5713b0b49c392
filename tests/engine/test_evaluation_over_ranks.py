"""An evaluation on several processes gives the detections and metrics of one, digit for digit."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

from crash_child import evaluate_together
from detectron2.engine import launch
from tiny import write_dataset

IMAGES = 7  # no multiple of the processes


def with_masks(json_file: Path) -> None:
    """Give each box a mask that is nearly all of it."""
    content = json.loads(json_file.read_text())
    for record in content["annotations"]:
        x, y, width, height = record["bbox"]
        record["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height - 1]]
    json_file.write_text(json.dumps(content))


def test_bbox_and_segm(quick_ranks: None, tmp_path: Path) -> None:
    """The weights' batch norms have gathered other statistics in each process that trained."""
    dataset = write_dataset(tmp_path, IMAGES)
    with_masks(dataset)
    weights = ""
    found: list[tuple[Any, bytes]] = []
    for processes in (2, 1, 3):
        folder = tmp_path / f"on-{processes}"
        args = (str(dataset), str(folder), weights)
        if processes > 1:
            launch(evaluate_together, processes, dist_url="auto", args=args)
        else:  # not this one, which has other datasets of the same names
            alone = multiprocessing.get_context("spawn").Process(
                target=evaluate_together, args=args
            )
            alone.start()
            alone.join()
            assert alone.exitcode == 0
        weights = weights or str(folder / "model_final.pth")
        detections = (folder / "inference" / "coco_instances_results.json").read_bytes()
        found.append((json.loads((folder / "results.json").read_text()), detections))
    (results, detections), *others = found
    assert results["bbox"]["AP"] > 0 and results["segm"]["AP"] > 0
    for other, theirs in others:
        assert repr(other) == repr(results)  # as some are NaN
        assert theirs == detections
