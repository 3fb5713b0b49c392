"""Objects on a photo, true or detected: boxes, and masks and key points if there are any."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import numpy as np
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import GenericMask
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

_LABEL_SIZE = 7.0  # in points
_LABEL_PADDING = 0.15  # around a text, in its size
_MOST_COVERED = 0.3  # the part of an object's box that a label may cover
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


def class_name(category: int, names: Sequence[str]) -> str:
    """The name of a class; one without is called by its number."""
    return names[category] if category < len(names) else f"class {category}"


def count_classes(objects: Sequence[ImageObject], names: Sequence[str], most: int = 3) -> str:
    """How many objects of which class there are, such as "3 tree, 1 car"; at most so many named."""
    counts = Counter(obj.category for obj in objects).most_common()
    texts = [f"{count} {class_name(category, names)}" for category, count in counts[:most]]
    if rest := counts[most:]:
        texts.append(f"{sum(count for _, count in rest)} of {len(rest)} other classes")
    return ", ".join(texts) or "0"


def _label(category: int, names: Sequence[str], score: float | None) -> str:
    name = class_name(category, names)
    return name if score is None else f"{name} {100 * score:.0f}%"


def draw_objects(
    axes: Axes, pixels: np.ndarray, objects: Sequence[ImageObject], colours: Sequence[str]
) -> None:
    """A photo with objects on it, each in its colour, labelled where that hides no other one.

    Args:
        pixels: `(H, W, 3)`, RGB, 0 to 255.
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
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    _draw_labels(axes, objects, colours, (width, height))


def highest_score(scores: Sequence[float]) -> str:
    """What a title or message says where no detection reaches the threshold."""
    return f"the highest is {max(scores):.2g}" if len(scores) else "nothing is detected at all"


def nothing_found(scores: Sequence[float], score: float, threshold: str = "") -> str:
    """A message for people where no detection in any image reaches the score that is shown.

    Args:
        threshold: the model's own, which explains why there may be none at all.
    """
    why = f" above {threshold}" if threshold and not len(scores) else ""
    hint = "; give a lower --score" if len(scores) else ""
    return f"No detection has a score ≥ {score:g}: {highest_score(scores)}{why}{hint}"


def _draw_labels(
    axes: Axes, objects: Sequence[ImageObject], colours: Sequence[str], size: tuple[int, int]
) -> None:
    """Write each object's label beside its box, the best detections first.

    A place is free where the text covers no other text, and only a small part of any box. Where no
    place is free for the label, its last word is tried (a detection's score), then it is left out.

    Args:
        size: width and height of the photo.
    """
    figure: Any = axes.figure
    measure = FigureCanvasAgg(figure).get_renderer()
    window = axes.get_window_extent(measure)
    zoom = np.array([size[0] / window.width, size[1] / window.height])  # pixels of the photo
    font = FontProperties(size=_LABEL_SIZE)
    boxes = np.array([obj.box for obj in objects], dtype=float).reshape(-1, 4)
    boxes = boxes.clip(0, [*size, *size])
    texts: np.ndarray = np.zeros((0, 4))
    pad = 2 * _LABEL_PADDING * _LABEL_SIZE * measure.dpi / 72
    for i in sorted(range(len(objects)), key=lambda i: -objects[i].score):
        words = objects[i].label.split()
        for text in dict.fromkeys((objects[i].label, *words[len(words) - (len(words) > 1) :])):
            width, height, _ = measure.get_text_width_height_descent(text, font, False)
            place = _free_place(boxes, i, np.array([width + pad, height + pad]) * zoom, texts, size)
            if not text or place is None:
                continue
            texts = np.vstack([texts, place])
            (left, top), (right, bottom) = place[:2], place[2:]
            box = Rectangle((left, top), right - left, bottom - top)
            box.set(facecolor=colours[i], alpha=0.85, linewidth=0)
            axes.add_patch(box)
            middle = (left + right) / 2, (top + bottom) / 2
            style: dict[str, Any] = {"va": "center_baseline", "ha": "center", "clip_on": True}
            axes.text(*middle, text, fontproperties=font, **style)
            break


def _free_place(
    boxes: np.ndarray, index: int, label: np.ndarray, texts: np.ndarray, size: tuple[int, int]
) -> np.ndarray | None:
    """A place for a label, x0, y0, x1, y1: above its box, below it, inside, or beside it.

    Args:
        boxes: of all objects.
        index: of the label's object.
        label: its width and height.
        texts: the labels that are there.
        size: of the photo.
    """
    x0, y0, x1, y1 = boxes[index]
    (width, height), (right, bottom) = label, size
    x = max(min(x0, right - width), 0.0)
    corners = [(x, y0 - height), (x, y1), (x, y0), (x, y1 - height)]
    corners += [(max(x1 - width, 0.0), y0 - height), (x1, y0), (x0 - width, y0)]
    for left, top in corners:
        place = np.array([left, top, left + width, top + height])
        if left < 0 or top < 0 or place[2] > right + 1e-6 or place[3] > bottom + 1e-6:
            continue
        if _covered(place, texts).any():
            continue
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        if (_covered(place, boxes) <= _MOST_COVERED * areas).all():
            return place
    return None


def _covered(place: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The area of each box that a place covers."""
    low, high = np.maximum(place[:2], boxes[:, :2]), np.minimum(place[2:], boxes[:, 2:])
    return (high - low).clip(0).prod(axis=1)


def _rgb(colour: str) -> np.ndarray:
    return np.array(to_rgb(colour), dtype=np.float32)
