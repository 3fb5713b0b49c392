#!/usr/bin/env python3
"""Draw $DETECTRON2_DATASETS/scenes: textured shapes with masks, the same for the same seed."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scene_shapes import (
    SHAPES,
    TEXTURES,
    mask_to_polygons,
    paint,
    polygon_mask,
    shape_points,
    value_noise,
)
from storage import prepare_folder, write_json

from fpn_plugin.paths import dataset_root

CLASSES = tuple(SHAPES)
SPLITS = ("train", "val")
_LAYOUT_VERSION = 1
_PLACEMENT_TRIES = 20
_MIN_VISIBLE_PIXELS = 16


@dataclass(frozen=True)
class SceneOptions:
    """What to draw.

    Attributes:
        train: number of training pictures.
        val: number of validation pictures.
        width: of a picture in pixels.
        height: of a picture in pixels.
        min_size: longer side of the smallest object's bounding box in pixels.
        max_size: the same for the largest.
        min_objects: fewest objects per picture that are tried to be placed.
        max_objects: the same for the most.
        min_visible: fraction of every object that stays visible.
        seed: of everything random.
    """

    train: int = 600
    val: int = 100
    width: int = 320
    height: int = 320
    min_size: float = 8.0
    max_size: float = 256.0
    min_objects: int = 4
    max_objects: int = 12
    min_visible: float = 0.35
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("train", "val", "width", "height", "min_objects"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, but must be at least 1")
        if not 4 <= self.min_size <= self.max_size:
            raise ValueError(
                f"sizes {self.min_size}..{self.max_size}: need 4 <= min_size <= max_size"
            )
        if self.max_objects < self.min_objects:
            raise ValueError(
                f"max_objects {self.max_objects} is less than min_objects {self.min_objects}"
            )
        if not 0 < self.min_visible <= 1:
            raise ValueError(f"min_visible is {self.min_visible}, but must be in (0, 1]")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but must not be negative")


@dataclass
class Scene:
    """A picture ``pixels (H, W, 3)`` and its objects, in the order in which they were painted.

    ``owner (H, W)`` holds the index of the object that is seen at a pixel, -1 for the background.
    """

    pixels: np.ndarray
    owner: np.ndarray
    classes: list[int]
    areas: list[int]

    def mask(self, index: int) -> np.ndarray:
        """Return the visible region of one object, ``(H, W)``."""
        return self.owner == index


def draw_scene(options: SceneOptions, split: str, index: int) -> Scene:
    """Draw one picture; the same arguments give the same bytes.

    Every picture has a seed of its own, ``(seed, split, index)``: a smaller dataset is a prefix of
    a larger one, and training and validation are independent.

    Raises:
        KeyError: the split is neither ``train`` nor ``val``.
    """
    if split not in SPLITS:
        raise KeyError(f"split {split!r} is unknown, choose from {SPLITS}")
    rng = np.random.default_rng([options.seed, SPLITS.index(split), index])
    base = rng.integers(40, 216, 3).astype(np.float64)
    height, width = options.height, options.width
    scene = Scene(_background(rng, height, width, base), np.full((height, width), -1), [], [])
    count = int(rng.integers(options.min_objects, options.max_objects, endpoint=True))
    span = math.log(options.max_size / options.min_size)
    sizes = [options.min_size * math.exp(span * float(rng.random())) for _ in range(count)]
    # Roughly from large to small: drawn later, a large object would bury the small ones. The
    # factor leaves room for the opposite.
    sizes.sort(key=lambda size: -size * math.exp(float(rng.uniform(-1, 1))))
    for size in sizes:
        _add_object(rng, scene, size, base, options)
    return scene


def _background(rng: np.random.Generator, height: int, width: int, base: np.ndarray) -> np.ndarray:
    """Return a textured background: smooth noise of three sizes around a colour."""
    ground = np.broadcast_to(base, (height, width, 3)).copy()
    for cell, strength in ((64, 0.35), (16, 0.2), (4, 0.12)):
        noise = value_noise(rng, height, width, cell).astype(np.float64) - 127.5
        ground += strength * noise[..., None] * rng.uniform(0.5, 1.0, 3)
    return np.rint(np.clip(ground, 0, 255)).astype(np.uint8)


def _add_object(
    rng: np.random.Generator, scene: Scene, size: float, base: np.ndarray, options: SceneOptions
) -> None:
    """Paint one object where it leaves enough of all others visible; give up after some tries."""
    height, width = scene.owner.shape
    label = int(rng.integers(len(CLASSES)))
    for _ in range(_PLACEMENT_TRIES):
        aspect, angle = float(rng.uniform(0.6, 1.0)), float(rng.uniform(0, 2 * math.pi))
        outline = shape_points(CLASSES[label], size, aspect, angle)
        centre = rng.uniform(0, 1, 2) * [width, height]
        mask = polygon_mask(outline + centre, height, width)
        # What the border cuts off counts as hidden.
        area = max(_polygon_area(outline), _MIN_VISIBLE_PIXELS)
        if not _leaves_enough(scene, mask, area, options.min_visible):
            continue
        colours = _colours(rng, base)
        texture = sorted(TEXTURES)[int(rng.integers(len(TEXTURES)))]
        period = float(rng.uniform(4, max(6.0, size / 3)))
        paint(rng, scene.pixels, mask, texture, colours, float(rng.uniform(0, math.pi)), period)
        scene.owner[mask] = len(scene.classes)
        scene.classes.append(label)
        scene.areas.append(math.ceil(area))
        return


def _leaves_enough(scene: Scene, mask: np.ndarray, area: float, min_visible: float) -> bool:
    visible = int(mask.sum())
    if visible < max(min_visible * area, _MIN_VISIBLE_PIXELS):
        return False
    left = np.bincount(scene.owner[~mask] + 1, minlength=len(scene.areas) + 1)[1:]
    needed = [max(min_visible * area, _MIN_VISIBLE_PIXELS) for area in scene.areas]
    return bool(np.all(left >= needed))


def _polygon_area(points: np.ndarray) -> float:
    x, y = points[:, 0], points[:, 1]
    return abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))) / 2


def _colours(rng: np.random.Generator, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw two colours; the first stands out from the background's."""
    while True:
        first, second = rng.integers(0, 256, (2, 3)).astype(np.float64)
        if float(np.abs(first - base).sum()) > 120:
            return first, second


def prepare_scenes(root: Path, options: SceneOptions = SceneOptions()) -> bool:
    """Make ``root/scenes``: PNG files in ``train`` and ``val``, COCO JSON in ``annotations``.

    Returns:
        False if the same dataset was there already.

    Raises:
        ValueError: ``root/scenes`` holds something else.
    """

    def build(folder: Path) -> None:
        for split, count in (("train", options.train), ("val", options.val)):
            _write_split(folder, split, count, options)

    parameters = {"layout": _LAYOUT_VERSION, **asdict(options)}
    return prepare_folder(root / "scenes", parameters, build)


def _write_split(folder: Path, split: str, count: int, options: SceneOptions) -> None:
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene = draw_scene(options, split, index)
        image_id, file_name = index + 1, f"{index:06d}.png"
        Image.fromarray(scene.pixels).save(folder / split / file_name, compress_level=3)
        height, width = scene.owner.shape
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for number in range(len(scene.classes)):
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**ids, **coco_annotation(scene, number)})
    content = {
        "info": {"description": f"Drawn scenes, seed {options.seed}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    write_json(folder / "annotations" / f"{split}.json", content)


def coco_annotation(scene: Scene, number: int) -> dict[str, Any]:
    """COCO's annotation of one object, without its ids."""
    mask = scene.mask(number)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "category_id": scene.classes[number] + 1,
        "iscrowd": 0,
        "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
        "area": int(mask.sum()),
        "segmentation": mask_to_polygons(mask),
    }


def main() -> None:
    default = SceneOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=dataset_root(), help="folder of all datasets")
    parser.add_argument("--train", type=int, default=default.train, help="training pictures")
    parser.add_argument("--val", type=int, default=default.val, help="validation pictures")
    parser.add_argument("--width", type=int, default=default.width, help="of a picture, pixels")
    parser.add_argument("--height", type=int, default=default.height, help="of a picture, pixels")
    parser.add_argument("--seed", type=int, default=default.seed, help="of everything random")
    args = parser.parse_args()
    options = SceneOptions(
        train=args.train, val=args.val, width=args.width, height=args.height, seed=args.seed
    )
    built = prepare_scenes(args.root, options)
    print(f"{'Made' if built else 'Already there'}: {args.root / 'scenes'}")


if __name__ == "__main__":
    main()
