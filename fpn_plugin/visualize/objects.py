"""Objects on a photo, true or detected: boxes, and masks and key points if there are any."""

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

MOST_LABELS = 15  # more texts than this hide the objects
_LABEL_SIZE = 7.0  # in points
_MASK_ALPHA = 0.4


@dataclass(frozen=True)
class ImageObject:
    """One object.

    Attributes:
        box: x0, y0, x1, y1 in pixels.
        category: the number of its class, from 0.
        label: a text on it, or "".
        score: of a detection.
        mask: polygons or RLE as in COCO's files, or `(H, W)` of bool; None if there is none.
        points: key points `(K, 2)`, nan where one is not labelled, or None.
        lines: pairs of indices of key points that a line joins.
    """

    box: tuple[float, float, float, float]
    category: int = 0
    label: str = ""
    score: float = 1.0
    mask: Any = None
    points: np.ndarray | None = None
    lines: Sequence[tuple[int, int]] = ()

    @property
    def size(self) -> float:
        """The square root of the box's area, in pixels."""
        x0, y0, x1, y1 = self.box
        return float(max(x1 - x0, 0) * max(y1 - y0, 0)) ** 0.5


def objects_of_instances(
    instances: Instances, names: Sequence[str], skeleton: Sequence[tuple[int, int]] = ()
) -> list[ImageObject]:
    """The objects that a model found.

    Args:
        names: of the classes; a class without one is called by its number.
        skeleton: pairs of indices of key points to join.
    """
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
    points = instances.pred_keypoints.numpy() if instances.has("pred_keypoints") else None
    objects = []
    for i, (x0, y0, x1, y1) in enumerate(instances.pred_boxes.tensor.tolist()):
        category, score = int(instances.pred_classes[i]), float(instances.scores[i])
        objects.append(
            ImageObject(
                (x0, y0, x1, y1),
                category,
                _label(category, names, score),
                score,
                None if masks is None else masks[i],
                None if points is None else points[i, :, :2],
                skeleton,
            )
        )
    return objects


def objects_of_annotations(
    annotations: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    skeleton: Sequence[tuple[int, int]] = (),
) -> list[ImageObject]:
    """The objects of Detectron2's annotations, crowds left out; detections if they have a "score".

    Args:
        names: and `skeleton`: as for :func:`objects_of_instances`.
    """
    objects = []
    for annotation in annotations:
        if annotation.get("iscrowd"):
            continue
        x0, y0, x1, y1 = BoxMode.convert(
            annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS
        )
        category, score = annotation["category_id"], annotation.get("score")
        mask = annotation.get("segmentation") or None
        label = _label(category, names, score)
        score = 1.0 if score is None else score
        points = _labelled_points(annotation.get("keypoints"))
        box = (x0, y0, x1, y1)
        objects.append(ImageObject(box, category, label, score, mask, points, skeleton))
    return objects


def _labelled_points(keypoints: Sequence[float] | None) -> np.ndarray | None:
    if not keypoints:
        return None
    points: np.ndarray = np.reshape(keypoints, (-1, 3)).astype(float)
    return np.where(points[:, 2:] > 0, points[:, :2], np.nan)


def _label(category: int, names: Sequence[str], score: float | None) -> str:
    name = names[category] if category < len(names) else f"class {category}"
    return name if score is None else f"{name} {100 * score:.0f}%"


def draw_objects(
    axes: Axes,
    pixels: np.ndarray,
    objects: Sequence[ImageObject],
    colours: Sequence[str],
    labels: bool = True,
) -> None:
    """A photo with objects on it, each in its colour.

    Args:
        pixels: `(H, W, 3)`, RGB, 0 to 255.
        labels: whether to write them, if there are few.
    """
    height, width = pixels.shape[:2]
    picture = pixels.astype(np.float32) / 255
    for obj, colour in zip(objects, colours):
        if obj.mask is not None:
            inside = GenericMask(obj.mask, height, width).mask.astype(bool)
            picture[inside] = (1 - _MASK_ALPHA) * picture[inside] + _MASK_ALPHA * _rgb(colour)
    axes.imshow(picture, extent=(0, width, height, 0))  # pixel 0 is from 0 to 1, as in boxes
    boxes = [Rectangle((x0, y0), x1 - x0, y1 - y0) for x0, y0, x1, y1 in (o.box for o in objects)]
    # a dark line under a bright one is seen on any photo
    style: dict[str, Any] = {"facecolors": "none"}
    axes.add_collection(
        PatchCollection(boxes, edgecolors="#000000", linewidths=2.4, alpha=0.35, **style)
    )
    axes.add_collection(PatchCollection(boxes, edgecolors=list(colours), linewidths=1.2, **style))
    for obj, colour in zip(objects, colours):
        if obj.points is not None:
            for pair in obj.lines:
                axes.plot(*obj.points[list(pair)].T, "-", color=colour, linewidth=1)
            axes.plot(*obj.points.T, ".", color=colour, markersize=3)
        if labels and len(objects) <= MOST_LABELS:
            x, y = max(obj.box[0], 0), max(obj.box[1], 0)
            box = {"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none"}
            text: dict[str, Any] = {"va": "top", "color": "black", "clip_on": True}
            axes.text(x, y, obj.label, fontsize=_LABEL_SIZE, bbox={**box, "alpha": 0.85}, **text)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def _rgb(colour: str) -> np.ndarray:
    return np.array(to_rgb(colour), dtype=np.float32)
