"""Pictures of an evaluation's results: the ground truth on the left, the detections on the right.

The detections are those that COCOEvaluator writes
(`OUTPUT_DIR/inference/coco_instances_results.json`), so no model has to run again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import matplotlib
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fpn_plugin.data.deep_images import read_image
from fpn_plugin.visualize.images import (
    all_records,
    class_names,
    dataset_records,
    report_unreadable,
    skeleton,
    without_unreadable,
)
from fpn_plugin.visualize.objects import (
    ImageObject,
    count_classes,
    draw_objects,
    highest_score,
    nothing_found,
    objects_of_annotations,
)

# in inches: the longer side of each half, what is above it, and between both
_SIDE, _TITLE_HEIGHT, _GAP = 6.0, 0.27, 0.06
_DPI, _MOST_SIDE = 130, 10.0  # of a photo alone: dots per inch, until the longer side is so long
_LEAST_PIXELS = 800  # of the longer side, if the image has not more
# bright, because a dark line vanishes on a photo
_COLOURS = (
    *("#ffd400", "#ff4fa3", "#00d5ff", "#ff7a1a", "#a4ff3c"),
    *("#b98cff", "#ff3b3b", "#3dffb5", "#ffffff", "#5a8cff"),
)


def load_results(path: str | Path, dataset: str) -> dict[Any, list[dict[str, Any]]]:
    """The detections in a file of COCO results, by image id, as Detectron2's annotations.

    Args:
        dataset: the registered dataset that they are of.

    Raises:
        FileNotFoundError: if there is no such file.
        KeyError: if there is no such dataset.
        ValueError: naming the file, if it is no list of COCO results or is of another dataset.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{str(path)!r} does not exist: an evaluation writes"
            " coco_instances_results.json to OUTPUT_DIR/inference"
        )
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    images = {record["image_id"] for record in all_records(dataset)}
    # a file's category id -> Detectron2's, which start from 0
    categories = MetadataCatalog.get(dataset).get("thing_dataset_id_to_contiguous_id")
    detections: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for number, result in enumerate(results if isinstance(results, list) else [None]):
        _check_result(f"{str(path)!r}, result {number}", result, images, categories)
        category = categories[result["category_id"]] if categories else result["category_id"]
        annotation = {**result, "category_id": category, "bbox_mode": BoxMode.XYWH_ABS}
        detections[result["image_id"]].append(annotation)
    return detections


def _check_result(
    where: str, result: object, images: set[Any], categories: Mapping[int, int] | None
) -> None:
    needed = ("image_id", "category_id", "bbox", "score")
    if not isinstance(result, dict) or any(key not in result for key in needed):
        raise ValueError(f"{where}: {result!r} is no detection with {', '.join(needed)}")
    if result["image_id"] not in images:
        raise ValueError(
            f"{where}: the dataset has no image of id {result['image_id']!r};"
            f" it has {len(images)} others"
        )
    if categories is not None and result["category_id"] not in categories:
        raise ValueError(
            f"{where}: category_id {result['category_id']!r} is not one of {sorted(categories)}"
        )


def draw_results(
    results: str | Path,
    dataset: str,
    output: str | Path,
    num: int = 4,
    score: float = 0.5,
    deep_images: str = "percentile",
    say: Callable[[str], object] = print,
) -> list[Path]:
    """Write pictures of some images of a dataset: ground truth and detections side by side.

    The images are those with objects, evenly spread over the dataset's order. The files are named
    `detections_<number>_<image>.jpg`; no other file in the folder is touched.

    Args:
        results: the file that COCOEvaluator wrote.
        output: a folder; it is created if it does not exist.
        num: of pictures, at most.
        score: detections below it are not drawn.
        deep_images: `INPUT.DEEP_IMAGES`.
        say: gets a line for people, if no detection reaches `score`.

    Returns:
        the files, in the dataset's order.

    Raises:
        FileNotFoundError: if there is no such file of results.
        KeyError: if there is no such dataset.
        ValueError: naming the argument or file and what is valid; at the end, if some images cannot
            be read.
    """
    if not 0 <= score <= 1:
        raise ValueError(f"--score: {score} is not from 0 to 1")
    records = dataset_records(dataset, num)
    detections = load_results(results, dataset)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    read = lambda record: read_image(record["file_name"], "RGB", deep_images)  # noqa: E731
    good, faults = without_unreadable(records, read)
    kept, paths = set(map(id, good)), []
    scores: list[float] = []
    for number, record in enumerate(records, 1):
        if id(record) not in kept:
            continue
        detected = detections[record["image_id"]]
        scores += [detection["score"] for detection in detected]
        pixels = read(record)
        figure = draw_pair(pixels, record.get("annotations", []), detected, dataset, score)
        paths.append(folder / f"detections_{number}_{Path(record['file_name']).stem}.jpg")
        figure.savefig(paths[-1], dpi="figure", pil_kwargs={"quality": 90})
    if paths and max(scores, default=-1.0) < score:
        say(nothing_found(scores, score))
    report_unreadable(faults, len(paths), folder)
    return paths


def draw_pair(
    pixels: np.ndarray,
    annotations: Sequence[Mapping[str, Any]],
    detections: Sequence[Mapping[str, Any]],
    dataset: str,
    score: float,
) -> Figure:
    """The image with its true objects on the left, with the detections on the right.

    Args:
        pixels: `(H, W, 3)`, RGB, 0 to 255.
        annotations: as in Detectron2's dataset dicts.
        detections: the same with "score".
        dataset: whose class names and colours to use.
        score: detections below it are not drawn.
    """
    names, lines = class_names([dataset]), skeleton([dataset])
    truth = objects_of_annotations(annotations, names, lines)
    shown = [detection for detection in detections if detection["score"] >= score]
    detected = objects_of_annotations(shown, names, lines)
    best = highest_score([detection["score"] for detection in detections])
    found = count_classes(detected, names) if detected else f"0; {best}"
    height, width = (_SIDE * side / max(pixels.shape[:2]) for side in pixels.shape[:2])
    size = np.array([2 * width + _GAP, height + _TITLE_HEIGHT])
    halves = (
        (0.0, truth, f"ground truth: {count_classes(truth, names)}"),
        (width + _GAP, detected, f"detections with score ≥ {score:g}: {found}"),
    )
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(size, facecolor="white", dpi=max(_LEAST_PIXELS, *pixels.shape) / _SIDE)
        FigureCanvasAgg(figure)
        for left, objects, title in halves:
            axes = figure.add_axes((left / size[0], 0, width / size[0], height / size[1]))
            axes.spines[:].set_visible(False)
            axes.set_title(f" {title}", loc="left", fontsize=10, color="#1e2832")
            draw_objects(axes, pixels, objects, class_colours(objects, [dataset]))
    return figure


def photo_figure(
    pixels: np.ndarray, objects: Sequence[ImageObject], colours: Sequence[str], least: int = 0
) -> Figure:
    """A photo with objects on it and nothing else, in its own size.

    Args:
        pixels: `(H, W, 3)`, RGB, 0 to 255.
        least: the longer side of the figure in pixels, if the photo's is shorter.
    """
    height, width = pixels.shape[:2]
    longer = max(height, width, least)
    zoom = longer / max(height, width)
    # texts have the same size in inches: readable on small photos, and growing with large ones
    dpi = longer / min(longer / _DPI, _MOST_SIDE)
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        size = ((round(side * zoom) + 0.01) / dpi for side in (width, height))
        figure = Figure(tuple(size), dpi=dpi)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.spines[:].set_visible(False)
        draw_objects(axes, pixels, objects, colours)
        axes.set_aspect("auto")
    return figure


def class_colours(objects: Sequence[ImageObject], datasets: Sequence[str]) -> list[str]:
    """The colour of each object's class: the first dataset's, or one of _COLOURS."""
    named = [MetadataCatalog.get(name).get("thing_colors", ()) for name in datasets]
    colours = [to_hex(np.array(rgb) / 255) for rgb in next(filter(None, named), ())] or _COLOURS
    return [colours[obj.category % len(colours)] for obj in objects]
