"""Micrographs: colours become instances, none is lost or counted twice, no image is in two splits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import prepare_cells as cells
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from prepare_cells import (
    CLASSES,
    CellOptions,
    check_splits,
    even_edges,
    label_micronuclei,
    label_nuclei,
    prepare_cells,
    tile_annotations,
    tile_windows,
    to_eight_bits,
)


def colours(size: tuple[int, int], *parts: tuple[int, int, int, int, int, int]) -> np.ndarray:
    """A mask of its authors' kind, of rectangles `x0, y0, x1, y1` in green and blue."""
    image = np.zeros((*size, 4), np.uint8)
    for x0, y0, x1, y1, green, blue in parts:
        image[y0:y1, x0:x1] = (255, green, blue, 255)
    return image


def test_parts_of_one_colour_are_one_nucleus_unless_they_are_far_apart() -> None:
    first = (0, 0, 10, 10, 255, 7)
    black = (50, 0, 60, 10, 255, 0)  # a cell's number may be 0
    near, speck, far = (30, 0, 40, 10, 255, 7), (20, 20, 23, 21, 255, 7), (250, 0, 260, 9, 255, 7)
    labels = label_nuclei(colours((40, 300), first, near, speck, far, black))
    assert sorted(np.bincount(labels.ravel())[1:]) == [90, 100, 200]
    assert labels[5, 5] == labels[5, 35] != labels[5, 255] and labels[20, 20] == 0


def test_connected_regions_of_one_colour_are_micronuclei() -> None:
    cell, touching = (0, 0, 4, 4, 188, 7), (4, 0, 8, 4, 120, 7)
    corner, apart, speck = (8, 4, 9, 8, 120, 7), (20, 0, 24, 4, 188, 7), (30, 0, 33, 1, 188, 7)
    labels = label_micronuclei(colours((10, 40), cell, touching, corner, apart, speck))
    assert sorted(np.bincount(labels.ravel())[1:]) == [16, 16, 20]
    assert labels[0, 7] == labels[4, 8] and labels[0, 30] == 0
    assert label_micronuclei(colours((10, 40))).max() == 0


def test_an_instance_that_is_cut_is_a_crowd() -> None:
    labels = np.zeros((4, 10), np.int32)
    labels[:, 2:8] = 3
    options = CellOptions(enlarge=2, min_visible=0.5)
    for end, cut in ((5, 0), (4, 1)):
        (annotation,) = tile_annotations(labels[:, :end], np.bincount(labels.ravel()), options)
        assert annotation["iscrowd"] == cut
        assert annotation["bbox"] == [4, 0, 2 * end - 4, 8]
        mask = mask_util.decode(annotation["segmentation"])
        np.testing.assert_array_equal(mask, np.kron(labels[:, :end] > 0, np.ones((2, 2))))
        assert annotation["area"] == mask.sum()


def test_brightness() -> None:
    pixels = np.arange(10000, dtype=np.uint16).reshape(100, 100)
    scaled = to_eight_bits(pixels)
    assert (scaled[0, 0], scaled[-1, -1], scaled.dtype) == (0, 255, np.uint8)
    quarter = int(100 + (9979 - 100) / 4)
    assert scaled.ravel()[quarter] == pytest.approx(127, abs=1)
    assert to_eight_bits(np.full((3, 3), 7, np.uint8)).max() == 0


def test_tiles() -> None:
    assert even_edges(869, 256) == [0, 217, 434, 652, 869] and even_edges(200, 256) == [0, 200]
    for split in ("train", "test"):
        covered = np.zeros((230, 310), int)
        for x0, y0, x1, y1 in tile_windows((230, 310), split, CellOptions(eval_tile=100)):
            covered[y0:y1, x0:x1] += 1
        assert covered.min() == 1 and (covered.max() == 1) == (split == "test")


@pytest.mark.parametrize("turn", [lambda a: a * 2, lambda a: np.rot90(a), lambda a: a[:, ::-1]])
def test_an_image_in_two_splits_is_refused(turn: Any) -> None:
    image = np.random.default_rng(0).integers(0, 9999, (20, 30))
    pixels = {"a/1": image, "b/7": turn(image), "c": image + np.arange(30)}
    check_splits({"train": ["a/1", "b/7"], "test": ["c"]}, pixels)
    with pytest.raises(ValueError, match="b/7 of test has the same pixels as a/1 of train"):
        check_splits({"train": ["a/1"], "val": ["c"], "test": ["b/7"]}, pixels)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"enlarge": 0}, "enlarge is 0"),
        ({"stride": 129}, "stride 129 is larger than tile 128"),
        ({"min_visible": 0.0}, r"min_visible is 0.0.*\(0, 1\]"),
        ({"quality": 101}, "quality is 101.*1..100"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CellOptions(**options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any, wheel_cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    assert prepare_cells(folder, cache=wheel_cache)  # which counts all instances
    return folder


def test_the_dataset(root: Path) -> None:
    found = {split: _read(root, split) for split in cells.SPLITS}
    photos = {split: {i["photo"] for i in content["images"]} for split, content in found.items()}
    assert {split: len(names) for split, names in photos.items()} == dict(train=29, val=3, test=16)
    assert not set(cells.LEFT_OUT) & set().union(*photos.values())
    for split, content in found.items():
        assert [category["name"] for category in content["categories"]] == list(CLASSES)
        crowds = Counter(a["iscrowd"] for a in content["annotations"])
        assert (crowds[1] == 0) == (split == "train") and crowds[0] > 400
    image = found["test"]["images"][0]
    with Image.open(root / "cells" / "test" / image["file_name"]) as tile:
        assert (tile.size, tile.mode) == ((image["width"], image["height"]), "L")
        pixels = np.asarray(tile)
    here = [a for a in found["test"]["annotations"] if a["image_id"] == image["id"]]
    inside = np.any([mask_util.decode(a["segmentation"]) for a in here], axis=0)
    assert pixels[inside].mean() > 2 * pixels[~inside].mean()  # what is annotated is bright
    assert not prepare_cells(root, cache=Path("nowhere"))


def test_the_sides_differ_five_to_sixfold(root: Path) -> None:
    annotations = _read(root, "test")["annotations"]
    sides = [
        np.median([np.sqrt(a["area"]) for a in annotations if a["category_id"] == i])
        for i in (1, 2)
    ]
    assert 4 < sides[0] / sides[1] < 7


def _read(root: Path, split: str) -> dict[str, Any]:
    return json.loads((root / "cells" / "annotations" / f"{split}.json").read_text())
