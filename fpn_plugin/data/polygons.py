"""Polygons of a mask, along the edges of its pixels and without holes."""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["mask_to_polygons"]


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
