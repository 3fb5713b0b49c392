"""Writes a large COCO JSON, or checks one and prints what that took: `large_json.py FILE`."""

from __future__ import annotations

import os
import random
import resource
import sys
import time
from typing import Any


def write(path: str, images: int, annotations: int, points: int, seed: int = 0) -> None:
    """Write text directly: a tenth of the time that json.dump takes."""
    draw = random.Random(seed).random
    address = "http://images.cocodataset.org/train2017/"
    shapes = []
    for _ in range(1000):
        x, y, w, h = (round(10 + draw() * 200, 2) for _ in range(4))
        outline = ", ".join(f"{x + draw() * w:.2f}, {y + draw() * h:.2f}" for _ in range(points))
        shapes.append(
            f'"bbox": [{x}, {y}, {w}, {h}], "area": {w * h / 2:.2f}, "iscrowd": 0,'
            f' "segmentation": [[{outline}]]'
        )
    with open(path, "w", encoding="ascii") as stream:
        stream.write('{"info": {}, "licenses": [], "images": [')
        stream.write(
            ", ".join(
                f'{{"id": {i}, "file_name": "{i:012d}.jpg", "width": 640, "height": 480,'
                f' "license": 3, "coco_url": "{address}{i:012d}.jpg"}}'
                for i in range(1, images + 1)
            )
        )
        stream.write('], "annotations": [')
        stream.write(
            ", ".join(
                f'{{"id": {i}, "image_id": {i % images + 1}, "category_id": {i % 80 + 1},'
                f" {shapes[i % 1000]}}}"
                for i in range(1, annotations + 1)
            )
        )
        classes = ", ".join(f'{{"id": {i}, "name": "c{i}"}}' for i in range(1, 81))
        stream.write(f'], "categories": [{classes}]}}')


def check(path: str) -> dict[str, Any]:
    """Check a file in this process: seconds of CPU, and memory in multiples of the file."""
    from fpn_plugin.data import check_dataset, register_coco_format

    register_coco_format("large", path, os.path.dirname(path))
    before, start = _peak(), time.process_time()
    report = check_dataset("large", masks=True, evaluation=True)
    return {
        "images": report.num_images,
        "annotations": report.num_annotations,
        "seconds": time.process_time() - start,
        "memory": (_peak() - before) / os.path.getsize(path),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(check(sys.argv[1]))
