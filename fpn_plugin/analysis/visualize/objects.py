"""Objects on a photo, true or detected: boxes, and masks and key points if there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import numpy as np
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer

MOST_LABELS = 15  # more texts than this hide the objects
_MASK_ALPHA = 0.35
_POINT_RADIUS = 0.004  # of a key point, in larger sides of the image


@dataclass(frozen=True)
class ImageObject:
    """One object.

    Attributes:
        box: x0, y0, x1, y1 in pixels.
        category: the number of its class, from 0.
        label: a text on it, or "".
        score: of a detection.
        mask: polygons or RLE as in COCO's files, or `(H, W)` of bool; None if there is none.
        points: key points `(K, 2)`, or None.
    """

    box: tuple[float, float, float, float]
    category: int = 0
    label: str = ""
    score: float = 1.0
    mask: Any = None
    points: np.ndarray | None = None

    @property
    def size(self) -> float:
        """The square root of the box's area, in pixels."""
        x0, y0, x1, y1 = self.box
        return float(max(x1 - x0, 0) * max(y1 - y0, 0)) ** 0.5


def objects_of_instances(instances: Instances, names: Sequence[str]) -> list[ImageObject]:
    """The objects that a model found.

    Args:
        names: of the classes; a class without one is called by its number.
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
            )
        )
    return objects


def objects_of_annotations(
    annotations: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[ImageObject]:
    """The objects of Detectron2's annotations, crowds left out; detections if they have a "score".

    Args:
        names: as for :func:`objects_of_instances`.
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
        objects.append(ImageObject((x0, y0, x1, y1), category, label, score, mask))
    return objects


def _label(category: int, names: Sequence[str], score: float | None) -> str:
    name = names[category] if category < len(names) else f"class {category}"
    return name if score is None else f"{name} {100 * score:.0f}%"


def draw_objects(
    pixels: np.ndarray,
    objects: Sequence[ImageObject],
    colours: Sequence[Any],
    scale: float = 1.0,
    labels: bool = True,
) -> np.ndarray:
    """A photo with objects on it, each in its colour, by Detectron2's Visualizer.

    Args:
        pixels: `(H, W, 3)`, RGB, 0 to 255.
        colours: matplotlib's, one per object.
        scale: by how much the photo is enlarged.
        labels: whether to write the labels.

    Returns:
        `(scale * H, scale * W, 3)`, RGB, 0 to 255.
    """
    visualizer = Visualizer(np.ascontiguousarray(pixels), scale=scale)
    if objects:
        visualizer.overlay_instances(
            boxes=np.array([obj.box for obj in objects]),
            masks=[[] if obj.mask is None else obj.mask for obj in objects],
            labels=[obj.label for obj in objects] if labels else None,
            assigned_colors=list(colours),
            alpha=_MASK_ALPHA,
        )
    radius = max(1, round(_POINT_RADIUS * max(pixels.shape)))
    for obj, colour in zip(objects, colours):
        # again, as Detectron2's own lines are half transparent
        visualizer.draw_box(obj.box, alpha=0.9, edge_color=colour)
        for point in [] if obj.points is None else obj.points:
            visualizer.draw_circle(point, colour, radius)
    return visualizer.output.get_image()
