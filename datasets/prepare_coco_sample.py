#!/usr/bin/env python3
"""Make $DETECTRON2_DATASETS/coco_sample: twenty photos of COCO with masks and panoptic truth."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image
from storage import prepare_folder, write_json
from wheels import fetch_wheel, read_members

from fpn_plugin.paths import dataset_root

REQUIREMENT = "labelbox==7.17.0"
SHA256 = "0714b355a4398d4d2fc6be54e9989331c3cedf0dc79ddd378514ecfd72894752"
NUM_PHOTOS, NUM_MASKS = 20, 293
_FOLDER = "labelbox-7.17.0/tests/data/assets/coco"
# ten photos each, those of the second with crowds
_INSTANCES = ("instances.json", "rle.json")
_IGNORED, _THINGS = 255, 0
_LAYOUT_VERSION = 1


def prepare_coco_sample(root: Path, cache: Path | None = None) -> bool:
    """Make ``root/coco_sample``: COCO's files of twenty photos from val2017.

    In ``images`` the photos, in ``panoptic`` the PNGs with the ids of the segments, in
    ``panoptic_stuff`` those that Detectron2 trains its semantic head on, in ``annotations``
    ``instances.json`` and ``panoptic.json``.

    Args:
        root: the folder of all datasets.
        cache: where the downloaded source distribution is kept, by default ``root/.wheels``.

    Returns:
        False if the same dataset was there already.

    Raises:
        RuntimeError: the download failed.
        ValueError: ``root/coco_sample`` holds something else, or the package's content is not as
            expected.
    """

    def build(folder: Path) -> None:
        source = fetch_wheel(REQUIREMENT, SHA256, cache or root / ".wheels", source=True)
        texts = read_members(source, [f"{_FOLDER}/{n}" for n in (*_INSTANCES, "panoptic.json")])
        *parts, panoptic = (json.loads(text) for text in texts.values())
        instances = {**parts[0]}
        for key in ("images", "annotations"):
            instances[key] = [entry for part in parts for entry in part[key]]
        counts = (len(instances["images"]), len(instances["annotations"]))
        if counts != (NUM_PHOTOS, NUM_MASKS) or len(panoptic["images"]) != NUM_PHOTOS:
            raise ValueError(
                f"{source.name}: expected {NUM_PHOTOS} photos with {NUM_MASKS} masks, found "
                f"{counts[0]} with {counts[1]}, and {len(panoptic['images'])} with panoptic truth"
            )
        write_json(folder / "annotations" / "instances.json", instances)
        write_json(folder / "annotations" / "panoptic.json", panoptic)
        photos = [image["file_name"] for image in instances["images"]]
        _copy(source, "images", photos, folder / "images")
        maps = {entry["file_name"]: entry["segments_info"] for entry in panoptic["annotations"]}
        _copy(source, "masks", list(maps), folder / "panoptic")
        (folder / "panoptic_stuff").mkdir()
        for name, segments in maps.items():
            with Image.open(folder / "panoptic" / name) as image:
                stuff = stuff_labels(np.asarray(image.convert("RGB")), segments)
            Image.fromarray(stuff).save(folder / "panoptic_stuff" / name)

    parameters = {"layout": _LAYOUT_VERSION, "source": REQUIREMENT}
    return prepare_folder(root / "coco_sample", parameters, build)


def _copy(source: Path, kind: str, names: list[str], target: Path) -> None:
    content = read_members(source, [f"{_FOLDER}/{kind}/{name}" for name in names])
    target.mkdir()
    for member, data in content.items():
        (target / Path(member).name).write_bytes(data)


def stuff_labels(colours: np.ndarray, segments: list[Mapping[str, Any]]) -> np.ndarray:
    """Return the labels ``(H, W)`` of a semantic head from COCO's panoptic format.

    They are those of Detectron2's ``prepare_panoptic_fpn.py``: 0 for all things, stuff from 1 in
    the order of its categories, 255 for what belongs to no segment.

    Args:
        colours: ``(H, W, 3)``, of the PNG: the id of a segment is red + 256 green + 256² blue.
        segments: the PNG's ``segments_info``.
    """
    stuff = [category["id"] for category in COCO_CATEGORIES if not category["isthing"]]
    labels = {category: number for number, category in enumerate(stuff, 1)}
    ids = colours.astype(np.int64) @ [1, 256, 256**2]
    result = np.full(ids.shape, _IGNORED, np.uint8)
    for segment in segments:
        result[ids == segment["id"]] = labels.get(segment["category_id"], _THINGS)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=dataset_root(), help="folder of all datasets")
    parser.add_argument("--cache", type=Path, help="folder of downloads (default: ROOT/.wheels)")
    args = parser.parse_args()
    built = prepare_coco_sample(args.root, args.cache)
    print(f"{'Made' if built else 'Already there'}: {args.root / 'coco_sample'}")


if __name__ == "__main__":
    main()
