"""Shapes and textures of the drawn scenes, and the polygons of their masks.

Images must be byte-identical on every machine, so only operations with exact results are used on
arrays (no sines, no matrix products, OpenCV's exact resizing); scalars go through ``math``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

_SUBPIXEL_BITS = 4


def _regular(corners: int, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [2 * math.pi * (i + turn) / corners for i in range(corners)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def _star() -> list[tuple[float, float]]:
    points = _regular(10, 0.0)
    return [(x, y) if i % 2 == 0 else (0.45 * x, 0.45 * y) for i, (x, y) in enumerate(points)]


def _cross() -> list[tuple[float, float]]:
    arm, end = 0.33, 1.0
    quarter = [(arm, -end), (arm, -arm), (end, -arm)]
    points = []
    for cos, sin in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        points += [(cos * x - sin * y, sin * x + cos * y) for x, y in quarter]
    return points


# Outlines around the origin, all within [-1, 1]. Only the outline identifies a class: colour and
# texture are drawn at random.
SHAPES: dict[str, list[tuple[float, float]]] = {
    "ellipse": _regular(48),
    "rectangle": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": _regular(3),
    "star": _star(),
    "cross": _cross(),
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.9), (1, 0), (0.1, 0.9), (0.1, 0.3), (-1, 0.3)],
}


def shape_points(name: str, size: float, aspect: float, angle: float) -> np.ndarray:
    """Return the outline ``(K, 2)`` of a shape around the origin.

    Args:
        name: a key of ``SHAPES``.
        size: longer side of the outline's upright bounding box in pixels, after the rotation.
        aspect: how much the shape is squeezed across before it is rotated, in (0, 1].
        angle: rotation in radians.
    """
    cos, sin = math.cos(angle), math.sin(angle)
    squeezed = [(x, aspect * y) for x, y in SHAPES[name]]
    points = np.array([(cos * x - sin * y, sin * x + cos * y) for x, y in squeezed])
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) * (size / float((high - low).max()))


def polygon_mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the pixels ``(H, W)`` inside a polygon ``(K, 2)``, as a boolean mask."""
    # Pixel centres lie at half coordinates, while OpenCV puts them at whole ones.
    fixed = np.rint((points - 0.5) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
    canvas: np.ndarray = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [fixed], 1, lineType=cv2.LINE_8, shift=_SUBPIXEL_BITS)
    return canvas.astype(bool)


def value_noise(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """Return smooth noise ``(H, W)`` of 0..255 that varies over about ``cell`` pixels."""
    rows, columns = -(-height // cell) + 1, -(-width // cell) + 1
    coarse = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    size = (columns * cell, rows * cell)
    return cv2.resize(coarse, size, interpolation=cv2.INTER_LINEAR_EXACT)[:height, :width]


# A texture mixes two colours: it maps coordinates (in periods, along the object's own axes) to the
# share of the second colour.
Texture = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]


def _plain(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.zeros_like(u)


def _stripes(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (u % 1.0 < 0.5).astype(np.float64)


def _checks(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return ((u % 1.0 < 0.5) ^ (v % 1.0 < 0.5)).astype(np.float64)


def _dots(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return ((u % 1.0 - 0.5) ** 2 + (v % 1.0 - 0.5) ** 2 < 0.09).astype(np.float64)


def _gradient(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    span = float(u.max() - u.min())
    return (u - u.min()) / max(span, 1e-6)


def _noise(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return value_noise(rng, u.shape[0], u.shape[1], cell=4) / 255.0


TEXTURES: dict[str, Texture] = {
    "plain": _plain,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "gradient": _gradient,
    "noise": _noise,
}


def paint(
    rng: np.random.Generator,
    canvas: np.ndarray,
    mask: np.ndarray,
    texture: str,
    colours: tuple[np.ndarray, np.ndarray],
    angle: float,
    period: float,
) -> None:
    """Paint the masked pixels of ``canvas (H, W, 3)``, uint8, in place.

    Args:
        rng: source of randomness of those textures that need one.
        canvas: the picture.
        mask: where to paint ``(H, W)``.
        texture: a key of ``TEXTURES``.
        colours: the two colours that the texture mixes, RGB.
        angle: direction of the texture in radians.
        period: length after which the texture repeats, in pixels.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    window: tuple[slice, slice] = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    y, x = np.mgrid[window].astype(np.float64)
    cos, sin = math.cos(angle) / period, math.sin(angle) / period
    share = TEXTURES[texture](rng, x * cos + y * sin, y * cos - x * sin)[..., None]
    first, second = colours
    mixed = np.rint(first * (1.0 - share) + second * share).astype(np.uint8)
    canvas[window][mask[window]] = mixed[mask[window]]


def mask_to_polygons(mask: np.ndarray, tolerance: float = 0.3) -> list[list[float]]:
    """Return the polygons ``[x0, y0, x1, y1, …]`` that together cover a boolean mask ``(H, W)``.

    COCO's polygons cannot have holes, so a region with a hole is cut in two through the hole.

    Args:
        mask: the pixels to outline.
        tolerance: how far a polygon may stray from the pixel edges, in pixels; up to 0.3,
            pycocotools gives back the same mask.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    crop = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    polygons = []
    for outline in _outlines(crop):
        corners = cv2.approxPolyDP(outline, 2 * tolerance, True)
        # A speck of a few pixels may collapse to a line, which Detectron2 would drop.
        corners = corners if len(corners) >= 3 else outline
        points = corners.reshape(-1, 2) / 2 + [left, top]
        polygons.append([float(value) for value in points.ravel()])
    return polygons


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Return the outlines of a mask in half pixels, counted from its upper left corner."""
    grid = _corner_grid(mask)
    outlines, hierarchy = cv2.findContours(grid, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # hierarchy: (1, C, 4), the last column is the parent, and only holes have one
    holes = [outline for outline, node in zip(outlines, hierarchy[0]) if node[3] >= 0]
    if not holes:
        return list(outlines)
    x, _, width, _ = cv2.boundingRect(holes[0])
    cut = (x + width // 2) // 2
    left = _outlines(mask[:, :cut])
    return left + [part + np.array([2 * cut, 0], np.int32) for part in _outlines(mask[:, cut:])]


def _corner_grid(mask: np.ndarray) -> np.ndarray:
    """Sample the closed squares of a mask's pixels every half pixel, ``(2H + 1, 2W + 1)``.

    ``cv2.findContours`` runs through the centres of border pixels, half a pixel inside the true
    edge, which costs a small object a quarter of its area. On this grid the border nodes *are* the
    edges.
    """
    height, width = mask.shape
    grid = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    for dy in range(3):
        for dx in range(3):
            grid[dy : dy + 2 * height : 2, dx : dx + 2 * width : 2] |= mask
    return grid
