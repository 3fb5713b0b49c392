"""Pictures of images: what is counted, what is drawn, and where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from backbones import toy_backbone
from detectron2.structures import Boxes, BoxMode, Instances
from matplotlib.figure import Figure

from fpn_plugin.visualize.images import InspectedImage
from fpn_plugin.visualize.levels import FIELD
from fpn_plugin.visualize.maps import Cell, Row, map_rows, record_maps
from fpn_plugin.visualize.objects import ImageObject, draw_objects, objects_of_annotations
from fpn_plugin.visualize.picture import (
    as_pixels,
    crop_padding,
    draw_histogram,
    draw_image,
    level_colour,
    octave,
    select_objects,
)

BOXES = torch.tensor([[0.0, 0, 16, 16], [10, 10, 41, 41], [5, 5, 69, 69], [0, 0, 8, 2]])
TRUTH = [
    {"bbox": [0, 0, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0},
    {"bbox": [0, 0, 90, 60], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 1},
]


def inspected(
    size: tuple[int, int] = (72, 100), known: bool = True, truth: Any = TRUTH, zoom: int = 1
) -> tuple[Any, InspectedImage]:
    backbone = toy_backbone()
    height, width = size[0] * zoom, size[1] * zoom
    with torch.no_grad(), record_maps(backbone) as maps:
        backbone(torch.rand(1, 3, -(-height // 32) * 32, -(-width // 32) * 32))
    found = Instances(size, pred_boxes=Boxes(BOXES), scores=torch.tensor([0.9, 0.8, 0.5, 0.4]))
    found.pred_classes = torch.tensor([0, 1, 1, 7])
    found.pred_masks = torch.zeros(4, *size, dtype=torch.bool)
    found.pred_masks[:, :10, :10] = True
    if known:
        found.set(FIELD, torch.tensor([2, 3, 3, 5]))
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    return backbone, InspectedImage("photo.jpg", pixels, found, truth, maps, (height, width))


def test_octaves() -> None:
    assert [octave(size) for size in (0, 0.5, 1, 1.99, 2, 31.9, 32, 64)] == [0, 0, 0, 0, 1, 4, 5, 6]


def test_bars_are_stacked_by_level() -> None:
    axes = Figure().add_subplot()
    levels = [None, 2, 3, 3, 3]
    draw_histogram(axes, [31.9, 16, 20, 40, 20], levels, [20, 20, 20, 20, 20, 200])
    bars = {
        (round(bar.get_x() + 0.4), bar.get_y(), bar.get_height())
        for bar in axes.patches
        if hasattr(bar, "get_y") and bar.get_height()
    }
    assert bars == {(4, 0, 1), (4, 1, 2), (4, 3, 1), (5, 0, 1)}
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    levels_in_order = [label for label in labels if label != "ground truth"]
    assert levels_in_order == ["level 2 (stride 4)", "level 3 (stride 8)", "level unknown"]
    assert len(labels) == 4
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["16", "32", "64", "128", "256"]


@pytest.mark.parametrize("truth", [None, []])
def test_an_empty_histogram(truth: Any) -> None:
    axes = Figure().add_subplot()
    draw_histogram(axes, [], [], truth, zoom=2)
    assert "× 2" in axes.get_xlabel()


def test_choice_by_score() -> None:
    shown = select_objects(inspected()[1], ["tree", "house"], 0.5)
    assert shown.levels == [2, 3, 3]
    assert [obj.label for obj in shown.detections] == ["tree 90%", "house 80%", "house 50%"]
    assert [obj.size for obj in shown.detections] == [16, 31, 64]
    assert shown.truth is not None
    assert [(obj.label, obj.size) for obj in shown.truth] == [("house", 20)]
    unknown = select_objects(inspected(known=False, truth=None)[1], [], 0.0)
    assert unknown.levels == [None] * 4 and unknown.truth is None
    assert unknown.detections[3].label == "class 7 40%"


def test_masks_and_boxes_have_their_objects_colour() -> None:
    square = {**TRUTH[0], "segmentation": [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]}
    (polygon,) = objects_of_annotations([square, TRUTH[1]], ["a", "b"])
    assert polygon.label == "b" and polygon.box == (0, 0, 20, 20)
    filled = np.zeros((40, 50), dtype=bool)
    filled[10:30, 10:30] = True
    bitmap = ImageObject(polygon.box, mask=filled, points=np.array([[40.0, 35.0]]))
    for obj in (polygon, bitmap):
        axes = Figure().add_subplot()
        draw_objects(axes, np.zeros((40, 50, 3)), [obj], ["#ff0000"])
        picture = axes.images[0].get_array()
        assert picture[20, 20].tolist() == pytest.approx([0.4, 0, 0])
        assert abs((picture[:, :, 0] > 0).sum() - 400) < 50 and not picture[:, :, 1:].any()
        assert axes.collections[-1].get_edgecolor().tolist() == [[1, 0, 0, 1]]
        assert [text.get_text() for text in axes.texts] == (["b"] if obj is polygon else [])
    assert axes.lines[0].get_xydata().tolist() == [[40, 35]]
    assert level_colour(2) != level_colour(3) and level_colour(11) != level_colour(None)


def test_padding_is_cut_off() -> None:
    cell = Cell("p4", torch.arange(24.0).view(4, 6))
    assert crop_padding(cell, 4, (33, 65)).tolist() == cell.strength[:3, :5].tolist()


@pytest.mark.parametrize(
    "size, truth", [((72, 100), TRUTH), ((72, 100), None), ((200, 20), TRUTH), ((20, 200), TRUTH)]
)
def test_figures(size: tuple[int, int], truth: Any) -> None:
    backbone, seen = inspected(size, truth=truth, zoom=2)
    rows = map_rows(backbone, seen.maps)
    figure = draw_image(seen, select_objects(seen, ["tree", "house"], 0.3), rows, 0.3)
    texts = [item.get_text() for item in figure.texts]
    assert {"photo.jpg", "level 2, stride 4", "bottom-up map", "after fusion"} <= set(texts)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "4 found with score ≥ 0.3" in titles
    assert ("1 in the ground truth" in titles) == (truth is not None)
    cells = [axes for axes in figure.axes if len(axes.images) == 2]
    assert len(cells) == sum(len(row.cells) for row in rows)
    for axes in cells:  # the same place of the image is at the same place of every map
        assert axes.get_xlim() == (-0.5, size[1] - 0.5) and axes.get_ylim() == (size[0] - 0.5, -0.5)
    assert figure.get_figheight() < 20, "a cell is at most 2.6 inches high"
    pixels = as_pixels(figure, 20)
    assert pixels.shape[2] == 3 and pixels.dtype == np.uint8 and len(np.unique(pixels)) > 50


def test_the_heat_lies_where_it_belongs() -> None:
    """One strong pixel of p4 covers 16 pixels of what the model saw, 8 of an image enlarged by 2."""
    _, seen = inspected((64, 96), zoom=2)
    hot = torch.zeros(8, 12)
    hot[2, 5] = 1.0
    figure = draw_image(seen, select_objects(seen, [], 0.5), [Row("r", {4: Cell("p4", hot)})], 0.5)
    axes = next(axes for axes in figure.axes if len(axes.images) == 2)
    left, right, bottom, top = axes.images[1].get_extent()
    assert (left, right, bottom, top) == (-0.5, 95.5, 63.5, -0.5)


def test_keypoints_are_joined_by_the_skeleton() -> None:
    points = [1.0, 2.0, 2, 5.0, 6.0, 1, 0.0, 0.0, 0]
    (obj,) = objects_of_annotations([{**TRUTH[0], "keypoints": points}], ["a", "b"], [(0, 1)])
    axes = Figure().add_subplot()
    draw_objects(axes, np.zeros((40, 50, 3)), [obj], ["#ff0000"])
    line, dots = axes.lines
    assert np.array(line.get_xydata()).tolist() == [[1, 2], [5, 6]]
    assert np.isnan(np.array(dots.get_xydata())[2]).all()  # not labelled
