"""Coordinates in other units than pixels are named with their cause, and sound ones are not."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from fpn_plugin.data import DatasetError, check_dataset, register_coco_format

WIDTH, HEIGHT = 64, 48
pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def many(sound: Any) -> dict[str, Any]:
    """Forty boxes and polygons of all sizes anywhere in the images."""
    draw = random.Random(0).uniform
    sound["annotations"] = []
    for i in range(40):
        w, h = draw(4, 40), draw(4, 40)
        x, y = draw(0, WIDTH - w), draw(0, HEIGHT - h)
        record = {"id": i + 1, "image_id": 1 + i % 2, "category_id": 1, "bbox": [x, y, w, h]}
        record |= {"area": w * h, "iscrowd": 0}
        record["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        sound["annotations"].append(record)
    return sound


def unit(box: list[float]) -> list[float]:
    return [box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT]


def corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def centre(box: list[float]) -> list[float]:
    return [box[0] + box[2] / 2, box[1] + box[3] / 2, box[2], box[3]]


def scaled(factor: float) -> Callable[[list[float]], list[float]]:
    return lambda values: [factor * value for value in values]


def write_boxes(content: Any, change: Callable[[list[float]], list[float]], polygons: bool) -> Any:
    for annotation in content["annotations"]:
        annotation["bbox"] = change(annotation["bbox"])
        if not polygons:
            del annotation["segmentation"]
    return content


@pytest.mark.parametrize("polygons", [False, True])
@pytest.mark.parametrize(
    "change, message, is_error",
    [
        (unit, "all boxes lie between 0 and 1.*normalised", True),
        (corners, "look like corners .x1, y1, x2, y2.", True),
        (centre, "look like .centre x, centre y, width, height.", False),
        (scaled(4), "they look like another unit than pixels", False),
    ],
)
def test_boxes(
    change: Any, message: str, is_error: bool, polygons: bool, many: Any, write: Any, caplog: Any
) -> None:
    register_coco_format("t", *write(write_boxes(many, change, polygons)))
    if is_error:
        with pytest.raises(DatasetError, match=message):
            check_dataset("t")
        return
    with caplog.at_level(logging.WARNING, "fpn_plugin"):
        check_dataset("t")
    assert any(message.split(".")[0] in fault for fault in check_dataset("t").warnings)


def test_corners_without_areas_are_a_warning(many: Any, write: Any) -> None:
    write_boxes(many, corners, False)
    for annotation in many["annotations"]:
        del annotation["area"]
    register_coco_format("t", *write(many))
    assert any("look like corners" in fault for fault in check_dataset("t").warnings)


@pytest.mark.parametrize("share", [0, 1, 4, 20])
def test_sound_boxes_and_some_bad_ones_are_not_taken_for_another_format(
    share: int, many: Any, write: Any
) -> None:
    for annotation in many["annotations"][:share]:
        annotation["bbox"] = [1, 1, 66, 50]  # a large object that was not clipped
    register_coco_format("t", *write(many))
    warnings = " ".join(check_dataset("t", masks=True).warnings)
    assert "look like" not in warnings
    for annotation in many["annotations"]:
        annotation["bbox"] = [0, 0, 1, 1]  # one pixel each, as integers
        annotation["segmentation"] = [[0, 0, 1, 0, 1, 1]]
    write(many)
    check_dataset("t", masks=True)


@pytest.mark.parametrize("factor, message", [(1 / 64, "all polygons lie between 0 and 1")])
def test_normalised_polygons(factor: float, message: str, many: Any, write: Any) -> None:
    for annotation in many["annotations"]:
        annotation["segmentation"] = [scaled(factor)(annotation["segmentation"][0])]
    register_coco_format("t", *write(many))
    with pytest.raises(DatasetError, match=message):
        check_dataset("t", masks=True)
    assert any("all polygons lie" in fault for fault in check_dataset("t").warnings)


@pytest.mark.parametrize("factor", [0.264, 10])
def test_polygons_in_other_units_than_their_boxes(factor: float, many: Any, write: Any) -> None:
    for annotation in many["annotations"]:
        annotation["segmentation"] = [scaled(factor)(annotation["segmentation"][0])]
    register_coco_format("t", *write(many))
    assert any("in other units" in fault for fault in check_dataset("t", masks=True).warnings)


@pytest.mark.parametrize("value", [1e5, -1e6, 1e8, 2**40])
def test_a_coordinate_that_pycocotools_must_not_see(value: float, many: Any, write: Any) -> None:
    many["annotations"][7]["segmentation"].append([value, 1, 2, 3, 4, 5])
    register_coco_format("t", *write(many))
    for training in (True, False):
        with pytest.raises(DatasetError, match=r"annotation 8 .*has a coordinate of .*64 x 48"):
            check_dataset("t", training=training, masks=True)
    assert check_dataset("t").num_annotations == 40  # with a warning: nobody reads it
