"""Drawn scenes: reproducible to the byte, with masks, boxes and polygons that agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare_scenes import CLASSES, SceneOptions, draw_scene, prepare_scenes
from pycocotools import mask as mask_util
from scene_shapes import SHAPES, mask_to_polygons, polygon_mask, shape_points

SMALL = {"train": 4, "val": 2, "width": 160, "height": 128}


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def rasterise(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    runs = mask_util.merge(mask_util.frPyObjects(polygons, height, width))
    return mask_util.decode(runs).astype(bool)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert prepare_scenes(tmp_path / name, SceneOptions(seed=seed, **SMALL))
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert set(a) == set(c) and len(a) == 4 + 2 + 2 + 1
    assert all(a[name] != c[name] for name in a)


def test_smaller_set_is_a_prefix_and_splits_differ() -> None:
    options = SceneOptions()
    first = draw_scene(options, "train", 3)
    again = draw_scene(SceneOptions(train=7), "train", 3)
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert (first.pixels != draw_scene(options, "val", 3).pixels).any()
    with pytest.raises(KeyError, match="split 'test' is unknown"):
        draw_scene(options, "test", 0)


@pytest.mark.parametrize("index", range(4))
def test_objects_stay_visible_and_polygons_match(index: int) -> None:
    scene = draw_scene(SceneOptions(), "train", index)
    height, width = scene.owner.shape
    assert scene.classes
    for number, whole in enumerate(scene.areas):
        mask = scene.mask(number)
        assert mask.sum() >= max(16, 0.33 * whole)
        drawn = rasterise(mask_to_polygons(mask), height, width)
        np.testing.assert_array_equal(drawn, mask)


def test_json_agrees_with_the_pictures(tmp_path: Path) -> None:
    options = SceneOptions(**SMALL)
    prepare_scenes(tmp_path, options)
    content = json.loads((tmp_path / "scenes/annotations/train.json").read_text())
    assert [category["name"] for category in content["categories"]] == list(CLASSES)
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    for image in content["images"]:
        scene = draw_scene(options, "train", image["id"] - 1)
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        assert len(mine) == len(scene.classes)
        for number, annotation in enumerate(mine):
            mask = scene.mask(number)
            x, y, w, h = annotation["bbox"]
            assert annotation["area"] == mask.sum() == mask[y : y + h, x : x + w].sum()
            assert mask[y].any() and mask[y + h - 1].any()
            assert mask[:, x].any() and mask[:, x + w - 1].any()


def test_sizes_span_the_range() -> None:
    scenes = [draw_scene(SceneOptions(), "train", i) for i in range(24)]
    areas = [int(s.mask(n).sum()) for s in scenes for n in range(len(s.classes))]
    share = np.histogram(areas, [0, 32**2, 96**2, 320**2])[0] / len(areas)
    assert (share > [0.3, 0.2, 0.05]).all()
    assert {c for s in scenes for c in s.classes} == set(range(len(CLASSES)))


def test_hole_is_cut_open() -> None:
    mask = np.zeros((40, 50), bool)
    mask[5:35, 5:45] = True
    mask[10:20, 10:20] = mask[22:30, 30:41] = False
    np.testing.assert_array_equal(rasterise(mask_to_polygons(mask), 40, 50), mask)


@pytest.mark.parametrize(
    "rows", [["#"], ["##"], ["#.", ".#"], ["#.#", "###"], ["###", "#.#", "###"]]
)
def test_specks(rows: list[str]) -> None:
    mask = np.pad(np.array([[c == "#" for c in row] for row in rows]), 3)
    polygons = mask_to_polygons(mask)
    assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons)
    np.testing.assert_array_equal(rasterise(polygons, *mask.shape), mask)


def test_empty_mask_has_no_polygon() -> None:
    assert mask_to_polygons(np.zeros((4, 4), bool)) == []


@pytest.mark.parametrize("name", SHAPES)
def test_shape_has_the_size_it_was_given(name: str) -> None:
    points = shape_points(name, 60.0, 0.8, 0.7)
    assert np.ptp(points, axis=0).max() == pytest.approx(60)
    mask = polygon_mask(points + 50, 100, 100)
    assert abs(np.ptp(np.flatnonzero(mask.any(axis=0))) + 1 - np.ptp(points[:, 0])) <= 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train": 0}, "train is 0"),
        ({"min_size": 2}, "sizes 2..256"),
        ({"max_objects": 1}, "max_objects 1 is less than min_objects 4"),
        ({"min_visible": 1.5}, "min_visible is 1.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SceneOptions(**options)
