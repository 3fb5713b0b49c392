#!/usr/bin/env python3
"""Measure the memory of a dataset of Objects365's size, and write docs/data/annotations.json.

python docs/measure_annotations.py --folder output/objects

The images and boxes are synthetic, as many as in the training part of Objects365 v2: 1.7 million
and 25 million. The JSON is written and the records are serialised in a stream at full size. What
reads a JSON as a whole holds all of it as Python's objects: that is done with parts of it, each in
a process of its own, and the line through them is extrapolated.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import numpy as np

DATA = Path(__file__).resolve().parent / "data" / "annotations.json"
IMAGES, BOXES, CLASSES = 1_700_000, 25_000_000, 365
CHUNK = 10_000


def images(count: int) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Each image's record with its boxes (x, y, width, height) and classes."""
    for start in range(0, count, CHUNK):
        rng = np.random.default_rng(start)
        here = min(CHUNK, count - start)
        counts = rng.geometric(IMAGES / BOXES, here)  # many images of few objects, few of many
        sizes = rng.integers(400, 1000, (here, 2))
        ends = np.cumsum(counts)
        boxes = np.round(rng.random((ends[-1], 4)) * 400, 2)
        classes = rng.integers(1, CLASSES + 1, ends[-1])
        for i in range(here):
            number = start + i
            name = f"images/v1/patch{number // 40_000}/objects365_v1_{number:08d}.jpg"
            size = {"height": int(sizes[i, 0]), "width": int(sizes[i, 1])}
            part = slice(ends[i] - counts[i], ends[i])
            yield {"file_name": name, **size, "id": number}, boxes[part], classes[part]


def write_json(path: Path, count: int) -> int:
    """A COCO JSON of so many images, in a stream; returns the number of boxes."""
    number = 0
    with path.open("w") as file:
        file.write('{"categories": ')
        json.dump([{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)], file)
        file.write(',\n"images": [')
        for i, (image, _, _) in enumerate(images(count)):
            file.write((",\n" if i else "") + json.dumps(image))
        file.write('],\n"annotations": [')
        for image, boxes, classes in images(count):
            lines = []
            for (x, y, w, h), label in zip(boxes.tolist(), classes.tolist()):
                number += 1
                lines.append(
                    f'{{"id": {number}, "iscrowd": 0, "isfake": 0, "area": {w * h:.4f}, "image_id":'
                    f' {image["id"]}, "bbox": [{x}, {y}, {w}, {h}], "category_id": {label}}}'
                )
            file.write((",\n" if image["id"] else "") + ",\n".join(lines))
        file.write("]}\n")
    return number


class Records(list):
    """Detectron2's dataset dicts of the synthetic images, made while they are iterated."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from detectron2.structures import BoxMode

        for image, boxes, classes in images(self.count):
            annotations = [
                {"iscrowd": 0, "bbox": box, "category_id": label - 1, "bbox_mode": BoxMode.XYWH_ABS}
                for box, label in zip(boxes.tolist(), classes.tolist())
            ]
            record = {**image, "image_id": image["id"], "annotations": annotations}
            del record["id"]
            yield record


def memory(pid: int | str = "self") -> dict[str, float]:
    """GB of a process: what it has in memory, its fair share of that, and what is its alone."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kb = {line.split()[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    alone = kb["Private_Clean:"] + kb["Private_Dirty:"]
    return {
        "resident": _gb(kb["Rss:"]),
        "share": _gb(kb["Pss:"]),
        "alone": _gb(alone),
    }


def _gb(kilobytes: int) -> float:
    return round(kilobytes * 1024 / 1e9, 3)


def peak() -> float:
    return _gb(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def load(path: str) -> dict[str, Any]:
    """Detectron2's way: the JSON by pycocotools, dataset dicts, and their serialised list."""
    from detectron2.data import DatasetFromList
    from detectron2.data.datasets import load_coco_json

    before, start = memory()["resident"], time.perf_counter()
    records = load_coco_json(path, "", "measured")
    seconds, dicts = time.perf_counter() - start, memory()["resident"]
    peak_reading = peak()
    dataset = DatasetFromList(records, copy=False)
    return {
        "images": len(dataset),
        "seconds": round(seconds, 1),
        "before": before,
        "dicts": dicts,
        "peak reading": peak_reading,
        "peak": peak(),
        "serialised": round(len(dataset._lst._lst) / 1e9, 3),
    }


def _read(dataset: Any, barrier: Any, queue: Any, who: str) -> None:
    for index in range(len(dataset)):
        dataset[index]
    for _ in range(2):  # all of them have read all of it, and those of other ranks
        barrier.wait()
    queue.put((who, memory()))
    barrier.wait()


def _readers(dataset: Any, workers: int, who: str) -> list[tuple[str, dict[str, float]]]:
    """The memory of a process and of workers that it forks, once they have read all items, and
    those of the other ranks too."""
    import multiprocessing

    from detectron2.utils import comm

    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(workers + 1), context.Queue()
    every = [
        context.Process(target=_read, args=(dataset, barrier, queue, f"{who} worker {i}"))
        for i in range(workers)
    ]
    for each in every:
        each.start()
    barrier.wait()
    comm.synchronize()
    barrier.wait()
    rows = [(who, memory()), *sorted(queue.get() for _ in every)]
    comm.synchronize()
    barrier.wait()
    for each in every:
        each.join()
    return rows


def serialise(count: int, workers: int) -> dict[str, Any]:
    """Detectron2's serialised list of all records and its workers."""
    from detectron2.data import DatasetFromList

    before, start = memory()["resident"], time.perf_counter()
    dataset = DatasetFromList(Records(count), copy=False)
    return {
        "before": before,
        "seconds": round(time.perf_counter() - start, 1),
        "peak": peak(),
        "serialised": round((len(dataset._lst._lst) + 8 * count) / 1e9, 3),
        "processes": dict(_readers(dataset, workers, "rank 0")),
    }


def ranks(count: int, workers: int, path: str) -> None:
    """The plugin's list in two ranks, each with workers; rank 0 writes the results."""
    from detectron2.engine import launch

    launch(_rank, 2, dist_url="auto", args=(count, workers, path))


def _rank(count: int, workers: int, path: str) -> None:
    from detectron2.utils import comm

    from fpn_plugin.data.shared_records import one_copy_per_host

    before, start = memory()["resident"], time.perf_counter()
    dataset = one_copy_per_host(lambda: Records(count), ())
    seconds, highest = round(time.perf_counter() - start, 1), peak()
    rows = comm.gather(
        (before, seconds, highest, _readers(dataset, workers, f"rank {comm.get_rank()}"))
    )
    if comm.is_main_process():
        result = {
            "before": [row[0] for row in rows],
            "seconds": rows[0][1],
            "peak": [row[2] for row in rows],
            "processes": {name: value for row in rows for name, value in row[3]},
        }
        Path(path).write_text(json.dumps(result))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for JSONs, 6 GB")
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help="(%(default)s)")
    parser.add_argument("--parts", type=int, nargs="+", default=[32, 16, 8], help="of a JSON read")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="per rank")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    result = args.folder / "step.json"
    if args.step:
        name, value = args.step
        if name == "ranks":
            ranks(int(value), args.workers, str(result))
        else:
            found = load(value) if name == "load" else serialise(int(value), args.workers)
            result.write_text(json.dumps(found))
        return 0

    def step(name: str, value: object) -> dict[str, Any]:
        command = [sys.executable, __file__, "--folder", str(args.folder), "--step", name]
        command += [str(value), "--workers", str(args.workers)]
        subprocess.run(command, check=True)
        print(name, value, result.read_text(), flush=True)
        return json.loads(result.read_text())

    # no GPU is asked for anything: gloo between two processes of the CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    data: dict[str, Any] = {"images": args.images, "workers": args.workers, "loads": []}
    for part in args.parts:
        path = args.folder / f"part_{part}.json"
        boxes = write_json(path, args.images // part)
        size = path.stat().st_size
        data["loads"].append({"boxes": boxes, "json": size / 1e9, **step("load", path)})
        path.unlink()
    data["detectron2"] = step("serialise", args.images)
    data["shared"] = step("ranks", args.images)
    path, start = args.folder / "all.json", time.perf_counter()
    data["boxes"] = write_json(path, args.images)
    data["json"] = path.stat().st_size / 1e9
    data["seconds to write"] = round(time.perf_counter() - start)
    path.unlink()
    result.unlink()
    DATA.write_text(json.dumps(data, indent=1) + "\n")
    print(DATA)
    return 0


if __name__ == "__main__":
    sys.exit(main())
