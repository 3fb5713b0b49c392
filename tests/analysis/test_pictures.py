"""Pictures of detections, on a dataset of four generated photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from fpn_plugin.analysis import pictures
from fpn_plugin.analysis.pictures import choose, draw_dataset, draw_detections, load_results

NAME = "pictures_test"
SQUARE = [[10.0, 10.0, 40.0, 10.0, 40.0, 40.0, 10.0, 40.0]]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Images 10, 20, 30 and 40 (40 has no objects), categories 3 and 7, and results.json."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in (10, 20, 30, 40):
        photo = rng.integers(60, 120, (60, 90, 3), dtype=np.uint8)
        Image.fromarray(photo).save(tmp_path / f"photo{number}.png")
        images.append({"id": number, "file_name": f"photo{number}.png", "height": 60, "width": 90})
    for index, number in enumerate((10, 10, 20, 30), 1):
        box = {"bbox": [10, 10, 30, 30], "area": 900, "segmentation": SQUARE, "iscrowd": 0}
        annotations.append(
            {"id": index, "image_id": number, "category_id": (3, 7)[index % 2], **box}
        )
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "data.json").write_text(json.dumps(data))
    write_results(tmp_path, [result(10), result(10, score=0.2), result(20, 7)])
    register_coco_instances(NAME, {}, str(tmp_path / "data.json"), str(tmp_path))
    yield tmp_path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def result(image_id: int, category_id: int = 3, score: float = 0.9, **more: Any) -> dict[str, Any]:
    box = [12.0, 8.0, 30.0, 30.0]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score, **more}


def write_results(folder: Path, results: Any) -> None:
    (folder / "results.json").write_text(json.dumps(results))


def test_files_and_what_they_leave_alone(folder: Path) -> None:
    output = folder / "out"
    output.mkdir()
    (output / "mine.jpg").write_text("mine")
    paths = draw_dataset(folder / "results.json", NAME, output, num=2)
    assert [path.name for path in paths] == [
        "detections_1_photo10.jpg",
        "detections_2_photo30.jpg",
    ]
    assert sorted(path.name for path in output.iterdir()) == [
        *(path.name for path in paths),
        "mine.jpg",
    ]
    assert (output / "mine.jpg").read_text() == "mine"
    first = paths[0].read_bytes()
    draw_dataset(folder / "results.json", NAME, output, num=2)
    assert paths[0].read_bytes() == first
    with Image.open(paths[0]) as picture:
        assert picture.width > 2 * 800 and picture.width > picture.height


def test_threshold_and_titles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def record(image: str, truth: Any, found: Any, dataset: str, score: float) -> Image.Image:
        drawn.append((len(truth), [item["category_id"] for item in found], score))
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(pictures, "draw_detections", record)
    draw_dataset(folder / "results.json", NAME, folder / "out", num=9, score=0.5)
    assert drawn == [(2, [0], 0.5), (1, [1], 0.5), (1, [], 0.5)]
    drawn.clear()
    draw_dataset(folder / "results.json", NAME, folder / "out", num=9, score=0.1)
    assert drawn[0] == (2, [0, 0], 0.1)


def test_boxes_and_masks_are_drawn(folder: Path) -> None:
    records = DatasetCatalog.get(NAME)
    photo: np.ndarray = np.full((60, 90, 3), 40, dtype=np.uint8)
    masked = draw_detections(photo, records[0]["annotations"], [], NAME)
    half = masked.width // 2
    left, right = (
        np.asarray(masked.crop(box)) for box in ((0, 40, half, 400), (half, 40, 2 * half, 400))
    )
    inside = left[200, 200].astype(int)  # pixel (22, 18) of the photo, in the square
    assert abs(inside - 40).max() > 30, "no mask"
    assert abs(right[200, 200].astype(int) - 40).max() <= 2, "a box that nobody gave"
    boxes = [{k: v for k, v in records[0]["annotations"][0].items() if k != "segmentation"}]
    only_box = np.asarray(draw_detections(photo, [], boxes, NAME).crop((half, 40, 2 * half, 400)))
    assert abs(only_box[200, 200].astype(int) - 40).max() <= 2
    assert abs(only_box.astype(int) - 40).max() > 100, "no box"


def test_crowds_are_boxes_without_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    monkeypatch.setattr(
        pictures.Visualizer, "draw_text", lambda self, text, *_, **__: texts.append(text)
    )
    photo: np.ndarray = np.zeros((60, 90, 3), dtype=np.uint8)
    DatasetCatalog.get(NAME)
    one = {**result(10), "category_id": 0, "bbox_mode": 1}
    draw_detections(photo, [], [one] * 15, NAME)
    assert texts == ["cat 90%"] * 15
    texts.clear()
    draw_detections(photo, [], [one] * 16, NAME)
    assert not texts


def test_rle_masks_of_the_evaluator(folder: Path) -> None:
    from pycocotools import mask as rle

    encoded = rle.encode(np.asfortranarray(np.eye(60, 90, dtype=np.uint8)))
    segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    write_results(folder, [result(10, segmentation=segmentation)])
    assert len(draw_dataset(folder / "results.json", NAME, folder / "out")) == 3


def test_choice_is_evenly_spread() -> None:
    records = [{"image_id": i, "annotations": [1] * (i % 5 > 0)} for i in range(50)]
    chosen = [record["image_id"] for record in choose(records, 4)]
    assert chosen == [7, 19, 32, 44]
    assert len(choose(records, 99)) == 40
    assert len(choose([{"annotations": []}] * 3, 2)) == 2


@pytest.mark.parametrize(
    "results, message",
    [
        ({"annotations": []}, "result 0.*is no detection with image_id, category_id, bbox, score"),
        ([{"image_id": 10}], "result 0.*is no detection"),
        ([result(10), result(99)], "result 1: the dataset has no image of id 99"),
        ([result(10, 4)], r"result 0: category_id 4 is not one of \[3, 7\]"),
    ],
)
def test_bad_results(folder: Path, results: Any, message: str) -> None:
    write_results(folder, results)
    with pytest.raises(ValueError, match=f"results.json.*{message}"):
        load_results(folder / "results.json", NAME)


def test_bad_arguments(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.json.*coco_instances_results.json"):
        load_results(folder / "nowhere.json", NAME)
    (folder / "text.json").write_text("{")
    with pytest.raises(ValueError, match="text.json' is not JSON"):
        load_results(folder / "text.json", NAME)
    with pytest.raises(KeyError, match=f"dataset.*'pictures_tset'.*did you mean '{NAME}'"):
        load_results(folder / "results.json", "pictures_tset")
    with pytest.raises(ValueError, match="num: 0"):
        draw_dataset(folder / "results.json", NAME, folder / "out", num=0)
    with pytest.raises(ValueError, match="score: 50"):
        draw_dataset(folder / "results.json", NAME, folder / "out", score=50)
