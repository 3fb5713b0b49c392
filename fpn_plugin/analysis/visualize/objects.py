"""Objects on a photo: boxes, masks if there are any, key points if there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import numpy as np
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import GenericMask
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from fpn_plugin.analysis.visualize.style import SMALL

MOST_LABELS = 12  # more texts than this hide the objects
_ALPHA = 0.4  # of a mask


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        box: x0, y0, x1, y1 in pixels.
        label: a text on it, or "".
        mask: `(H, W)` of bool, or None.
        points: key points `(K, 2)`, or None.
        category: the number of its class, from 0.
        score: of a detection.
    """

    box: tuple[float, float, float, float]
    label: str = ""
    mask: np.ndarray | None = None
    points: np.ndarray | None = None
    category: int = 0
    score: float = 1.0

    @property
    def size(self) -> float:
        """The square root of the box's area, in pixels."""
        x0, y0, x1, y1 = self.box
        return float(max(x1 - x0, 0) * max(y1 - y0, 0)) ** 0.5


def detected(found: Instances, names: Sequence[str]) -> list[Thing]:
    """What a model found.

    Args:
        names: of the classes; a class without one is called by its number.
    """
    masks = found.pred_masks.numpy() if found.has("pred_masks") else None
    points = found.pred_keypoints.numpy() if found.has("pred_keypoints") else None
    things = []
    for i, (x0, y0, x1, y1) in enumerate(found.pred_boxes.tensor.tolist()):
        category, score = int(found.pred_classes[i]), float(found.scores[i])
        label = f"{_name(category, names)} {100 * score:.0f}%"
        mask = None if masks is None else masks[i]
        place = None if points is None else points[i, :, :2]
        things.append(Thing((x0, y0, x1, y1), label, mask, place, category, score))
    return things


def annotated(
    annotations: Sequence[Mapping[str, Any]], names: Sequence[str], size: tuple[int, int]
) -> list[Thing]:
    """What an annotation file says; crowds are left out.

    Args:
        size: height and width of the image.
    """
    things = []
    for item in annotations:
        if item.get("iscrowd"):
            continue
        x0, y0, x1, y1 = BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS)
        shape = item.get("segmentation")
        mask = GenericMask(shape, *size).mask.astype(bool) if shape else None
        label = _name(item["category_id"], names)
        things.append(Thing((x0, y0, x1, y1), label, mask, category=item["category_id"]))
    return things


def _name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else f"class {number}"


def draw_things(
    axes: Axes, pixels: np.ndarray, things: Sequence[Thing], colours: Sequence[str]
) -> None:
    """A photo with objects on it, each in its colour; labels if there are few.

    Args:
        pixels: `(H, W, 3)`, 0 to 255.
    """
    axes.imshow(_with_masks(pixels, things, colours))
    boxes = [Rectangle((x0, y0), x1 - x0, y1 - y0) for x0, y0, x1, y1 in (t.box for t in things)]
    # a dark line under a bright one is seen on any photo
    for width, edges in ((2.4, ["#000000"] * len(boxes)), (1.2, list(colours))):
        style: dict[str, Any] = {"facecolors": "none", "edgecolors": edges, "linewidths": width}
        axes.add_collection(PatchCollection(boxes, alpha=0.35 if width > 2 else 1, **style))
    for thing, colour in zip(things, colours):
        if thing.points is not None:
            axes.plot(*thing.points.T, ".", color=colour, markersize=3)
        if len(things) <= MOST_LABELS and thing.label:
            _draw_label(axes, thing, colour)
    height, width = pixels.shape[:2]
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])


def _draw_label(axes: Axes, thing: Thing, colour: str) -> None:
    box: dict[str, Any] = {"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none"}
    x, y = max(thing.box[0], 0), max(thing.box[1], 0)
    text: dict[str, Any] = {"fontsize": SMALL, "va": "top", "color": "black", "clip_on": True}
    axes.text(x, y, thing.label, bbox={**box, "alpha": 0.85}, **text)


def _with_masks(pixels: np.ndarray, things: Sequence[Thing], colours: Sequence[str]) -> np.ndarray:
    picture = pixels.astype(np.float32) / 255
    for thing, colour in zip(things, colours):
        if thing.mask is not None:
            inside = thing.mask
            picture[inside] = (1 - _ALPHA) * picture[inside] + _ALPHA * np.array(to_rgb(colour))
    return picture
