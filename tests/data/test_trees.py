"""Tiles of the aerial photos: nothing is lost, nothing leaks from training to validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import prepare_trees as trees
import pytest
from prepare_trees import Photo, TreeOptions, cut_tiles, prepare_trees, tile_origins
from storage import STAMP


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any, wheel_cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    assert prepare_trees(folder, cache=wheel_cache)
    return folder


@pytest.mark.parametrize(
    "size, origins",
    [(400, [0]), (300, [0]), (401, [0, 1]), (800, [0, 200, 400]), (850, [0, 200, 400, 450])],
)
def test_tile_origins(size: int, origins: list[int]) -> None:
    assert tile_origins(size, 400, 200) == origins


@pytest.mark.parametrize("stride", [37, 50, 100])
@pytest.mark.parametrize("size", [(230, 310), (100, 100), (60, 140)])
def test_tiles_cover_the_photo(size: tuple[int, int], stride: int) -> None:
    rng = np.random.default_rng(0)
    height, width = size
    centres = rng.uniform(0, 1, (200, 2)) * [width, height]
    boxes = np.concatenate([centres - 6, centres + 6], axis=1)
    boxes = np.clip(boxes, 0, [width, height] * 2)
    photo = Photo("x", rng.integers(0, 256, (height, width, 3), dtype=np.uint8), boxes)
    covered = np.zeros(size, bool)
    seen = np.zeros(len(boxes), bool)
    for x, y, pixels, kept in cut_tiles(photo, 100, stride, min_visible=0.5):
        h, w = pixels.shape[:2]
        assert (h, w) == (min(100, height), min(100, width))
        np.testing.assert_array_equal(pixels, photo.pixels[y : y + h, x : x + w])
        covered[y : y + h, x : x + w] = True
        assert (kept >= 0).all() and (kept <= [w, h, w, h]).all()
        assert (kept[:, 2:] > kept[:, :2]).all()
        low, high = np.array([x, y]), np.array([x + w, y + h])
        inside = (boxes[:, :2] >= low).all(axis=1) & (boxes[:, 2:] <= high).all(axis=1)
        assert {tuple(b) for b in boxes[inside] - [x, y, x, y]} <= {tuple(b) for b in kept}
        seen |= inside
    assert covered.all()
    assert seen.all() or stride > 88  # boxes are 12 wide: at stride 88 some tile holds each whole


def test_share_of_a_box_that_must_be_inside() -> None:
    photo = Photo("x", np.zeros((10, 20, 3), np.uint8), np.array([[4.0, 0.0, 14.0, 10.0]]))
    kept = {x: boxes.tolist() for x, _, _, boxes in cut_tiles(photo, 10, 10, 0.6)}
    assert kept == {0: [[4, 0, 10, 10]], 10: []}
    kept = {x: boxes.tolist() for x, _, _, boxes in cut_tiles(photo, 10, 10, 0.4)}
    assert kept == {0: [[4, 0, 10, 10]], 10: [[0, 0, 4, 10]]}


def test_splits_share_no_photo() -> None:
    assert not set(trees.TRAIN_PHOTOS) & set(trees.VAL_PHOTOS)


@pytest.mark.parametrize(
    "split, names, counts",
    [("train", trees.TRAIN_PHOTOS, (134, 2306)), ("val", trees.VAL_PHOTOS, (12, 399))],
)
def test_every_tree_is_in_a_tile(
    split: str, names: tuple[str, ...], counts: tuple[int, int], root: Path, wheel_cache: Path
) -> None:
    content = json.loads((root / "trees" / "annotations" / f"{split}.json").read_text())
    assert (len(content["images"]), len(content["annotations"])) == counts
    assert {image["photo"] for image in content["images"]} == set(names)
    wheel = trees.fetch_wheel(trees.REQUIREMENT, trees.SHA256, wheel_cache)
    for photo in trees.load_photos(wheel, names):
        centres = (photo.boxes[:, :2] + photo.boxes[:, 2:]) / 2
        tiles = np.array([i["offset"] for i in content["images"] if i["photo"] == photo.name])
        inside = (centres[:, None] >= tiles) & (centres[:, None] <= tiles + 400)
        assert inside.all(axis=-1).any(axis=-1).all()


def test_same_parameters_are_not_made_again(root: Path, wheel_cache: Path) -> None:
    stamp = root / "trees" / STAMP
    before = stamp.stat().st_mtime_ns
    assert not prepare_trees(root, cache=wheel_cache)
    assert stamp.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tile": 0}, "tile is 0"),
        ({"stride": 500}, "stride 500 is larger than tile 400"),
        ({"min_visible": 0}, "min_visible is 0"),
        ({"quality": 101}, "quality is 101"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeOptions(**options)
