#!/usr/bin/env python3
"""Make $DETECTRON2_DATASETS/trees: tiles of aerial photos with a box around every tree crown."""

from __future__ import annotations

import argparse
import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from storage import prepare_folder, write_json
from wheels import fetch_wheel, read_members

from fpn_plugin.paths import dataset_root

# Boxes are (x0, y0, x1, y1) in pixels, x1 and y1 exclusive; arrays of them (N, 4).

REQUIREMENT = "deepforest==2.1.0"
SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
TRAIN_PHOTOS = ("2019_YELL_2_528000_4978000_image_crop2", "OSBS_029", "SOAP_061")
VAL_PHOTOS = ("2019_YELL_2_541000_4977000_image_crop",)
NUM_BOXES = 951
_LAYOUT_VERSION = 1


@dataclass(frozen=True)
class TreeOptions:
    """How the photos are cut.

    Attributes:
        tile: side of a tile in pixels.
        stride: distance between the training tiles of a photo in pixels.
        val_stride: the same for validation; equal to ``tile``, most trees are counted only once.
        min_visible: a box is kept if at least this fraction of its area lies inside the tile.
        quality: JPEG quality of the tiles.
    """

    tile: int = 400
    stride: int = 200
    val_stride: int = 400
    min_visible: float = 0.5
    quality: int = 95

    def __post_init__(self) -> None:
        for key in ("tile", "stride", "val_stride"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, but must be at least 1 pixel")
        if not 0 < self.min_visible <= 1:
            raise ValueError(f"min_visible is {self.min_visible}, but must be in (0, 1]")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}, but must be in 1..100")
        for key in ("stride", "val_stride"):
            if getattr(self, key) > self.tile:
                raise ValueError(
                    f"{key} {getattr(self, key)} is larger than tile {self.tile}: "
                    "the trees between two tiles would be lost"
                )


@dataclass(frozen=True)
class Photo:
    """A source photo ``pixels (H, W, 3)`` with its ``boxes (N, 4)``."""

    name: str
    pixels: np.ndarray
    boxes: np.ndarray


def load_photos(wheel: Path, names: Sequence[str]) -> list[Photo]:
    """Read photos and their boxes from the wheel.

    The labels are ignored, since the photos do not share a vocabulary (three say "Tree", one says
    "Dead" and "Alive"): everything is a tree.
    """
    members = [f"deepforest/data/{name}.{ext}" for name in names for ext in ("png", "xml")]
    content = read_members(wheel, members)
    photos = []
    for name in names:
        with Image.open(io.BytesIO(content[f"deepforest/data/{name}.png"])) as image:
            pixels = np.asarray(image.convert("RGB"))
        photos.append(Photo(name, pixels, _read_boxes(content[f"deepforest/data/{name}.xml"])))
    return photos


def _read_boxes(xml: bytes) -> np.ndarray:
    corners = [
        [float(box.findtext(key, "nan")) for key in ("xmin", "ymin", "xmax", "ymax")]
        for box in ElementTree.fromstring(xml).iter("bndbox")
    ]
    boxes = np.array(corners, dtype=np.float64).reshape(-1, 4)
    # VOC counts pixels from 1 and includes the last one, so (1, W) spans the whole photo.
    boxes[:, :2] -= 1
    return boxes


def tile_origins(size: int, tile: int, stride: int) -> list[int]:
    """Return where tiles start along one side; the last one is aligned with the photo's border."""
    last = max(size - tile, 0)
    return [*range(0, last, stride), last]


def cut_tiles(
    photo: Photo, tile: int, stride: int, min_visible: float
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Yield ``x, y, pixels, boxes`` per tile, row by row; boxes are clipped, relative to the tile.

    Args:
        tile: side of a tile; a photo that is smaller gives a tile of the photo's size.
        stride: distance between tiles.
        min_visible: fraction of a box's area that has to lie inside the tile.
    """
    height, width = photo.pixels.shape[:2]
    areas = np.prod(photo.boxes[:, 2:] - photo.boxes[:, :2], axis=1)
    for y in tile_origins(height, tile, stride):
        for x in tile_origins(width, tile, stride):
            pixels = photo.pixels[y : y + tile, x : x + tile]
            limit = np.array(pixels.shape[1::-1] * 2)
            boxes = np.clip(photo.boxes - [x, y, x, y], 0, limit)
            inside = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
            yield x, y, pixels, boxes[(inside > 0) & (inside >= min_visible * areas)]


def prepare_trees(
    root: Path, options: TreeOptions = TreeOptions(), cache: Path | None = None
) -> bool:
    """Make ``root/trees``: JPEG tiles in ``train`` and ``val``, COCO JSON in ``annotations``.

    Args:
        root: the folder of all datasets.
        options: how to cut the photos.
        cache: where the downloaded wheel is kept, by default ``root/.wheels``.

    Returns:
        False if the same dataset was there already.

    Raises:
        RuntimeError: the download failed.
        ValueError: ``root/trees`` holds something else.
    """

    def build(folder: Path) -> None:
        wheel = fetch_wheel(REQUIREMENT, SHA256, cache or root / ".wheels")
        photos = {photo.name: photo for photo in load_photos(wheel, TRAIN_PHOTOS + VAL_PHOTOS)}
        num_boxes = sum(len(photo.boxes) for photo in photos.values())
        if num_boxes != NUM_BOXES:
            raise ValueError(f"{wheel.name}: expected {NUM_BOXES} boxes, found {num_boxes}")
        splits = (("train", TRAIN_PHOTOS, options.stride), ("val", VAL_PHOTOS, options.val_stride))
        for split, names, stride in splits:
            _write_split(folder, split, [photos[name] for name in names], stride, options)

    parameters = {"layout": _LAYOUT_VERSION, "source": REQUIREMENT, **asdict(options)}
    return prepare_folder(root / "trees", parameters, build)


def _write_split(
    folder: Path, split: str, photos: Sequence[Photo], stride: int, options: TreeOptions
) -> None:
    (folder / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for photo in photos:
        for x, y, pixels, boxes in cut_tiles(photo, options.tile, stride, options.min_visible):
            image_id = len(images) + 1
            file_name = f"{photo.name}_{x:04d}_{y:04d}.jpg"
            # Without chroma subsampling: crowns of ten pixels differ from the ground by colour.
            Image.fromarray(pixels).save(
                folder / split / file_name, quality=options.quality, subsampling=0
            )
            height, width = pixels.shape[:2]
            record = {"id": image_id, "file_name": file_name, "width": width, "height": height}
            images.append({**record, "photo": photo.name, "offset": [x, y]})
            for box in boxes:
                annotations.append(_annotation(len(annotations) + 1, image_id, box))
    content = {
        "info": {"description": f"Tree crowns in aerial photos, from {REQUIREMENT}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "tree"}],
    }
    write_json(folder / "annotations" / f"{split}.json", content)


def _annotation(annotation_id: int, image_id: int, box: np.ndarray) -> dict[str, Any]:
    x0, y0, x1, y1 = box.tolist()
    bbox = [x0, y0, x1 - x0, y1 - y0]
    record = {"id": annotation_id, "image_id": image_id, "category_id": 1, "iscrowd": 0}
    return {**record, "bbox": bbox, "area": bbox[2] * bbox[3]}


def main() -> None:
    default = TreeOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=dataset_root(), help="folder of all datasets")
    parser.add_argument("--cache", type=Path, help="folder of downloads, if not ROOT/.wheels")
    parser.add_argument("--tile", type=int, default=default.tile, help="side of a tile, pixels")
    parser.add_argument("--stride", type=int, default=default.stride, help="of training tiles")
    parser.add_argument("--val-stride", type=int, default=default.val_stride, help="of validation")
    parser.add_argument(
        "--min-visible",
        type=float,
        default=default.min_visible,
        help="keep a box cut by a tile's border if this fraction of its area is inside",
    )
    args = parser.parse_args()
    options = TreeOptions(args.tile, args.stride, args.val_stride, args.min_visible)
    built = prepare_trees(args.root, options, args.cache)
    print(f"{'Made' if built else 'Already there'}: {args.root / 'trees'}")


if __name__ == "__main__":
    main()
