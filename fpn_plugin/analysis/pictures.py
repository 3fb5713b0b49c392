"""Pictures of a trained detector's work: the truth on the left, the detections on the right.

The detections are those that COCOEvaluator writes
(`OUTPUT_DIR/inference/coco_instances_results.json`), so nothing has to run again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from fpn_plugin.registry import unknown_name

Object = Mapping[
    str, Any
]  # bbox, bbox_mode, category_id (from 0), and if there are any: score, segmentation
_MAX_LABELS = 15  # more texts than this hide the objects
_WIDTH = 800  # pixels of a smaller image's longer side in the picture
# bright, because a dark line vanishes on a photo
_COLOURS = (
    *((255, 212, 0), (255, 79, 163), (0, 213, 255), (255, 122, 26), (164, 255, 60)),
    *((185, 140, 255), (255, 59, 59), (61, 255, 181), (255, 255, 255), (90, 140, 255)),
)
_STRIP = 36  # pixels of the line of text above each half


def load_results(path: str | Path, dataset: str) -> dict[Any, list[dict[str, Any]]]:
    """The detections in a file of COCO results, by image id.

    Their category ids are made to start from 0, as in Detectron2's dicts.

    Args:
        dataset: the registered dataset that they are of.

    Raises:
        FileNotFoundError: if there is no such file.
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
    records = _records(dataset)
    categories = MetadataCatalog.get(dataset).get("thing_dataset_id_to_contiguous_id")
    known = {record["image_id"] for record in records}
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for number, result in enumerate(results if isinstance(results, list) else [None]):
        where = f"{str(path)!r}, result {number}"
        _check_result(where, result, known, categories)
        category = categories[result["category_id"]] if categories else result["category_id"]
        found[result["image_id"]].append(
            {**result, "category_id": category, "bbox_mode": BoxMode.XYWH_ABS}
        )
    return found


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


def _records(dataset: str) -> list[dict[str, Any]]:
    if dataset not in DatasetCatalog.list():
        raise unknown_name("dataset", dataset, DatasetCatalog.list())
    return DatasetCatalog.get(dataset)


def draw_dataset(
    results: str | Path,
    dataset: str,
    output: str | Path,
    num: int = 4,
    score: float = 0.5,
) -> list[Path]:
    """Write pictures of some images of a dataset: truth and detections side by side.

    The images are those with objects, evenly spread over the dataset's order. The files are named
    `detections_<number>_<image>.jpg`; no other file in the folder is touched.

    Args:
        results: the file that COCOEvaluator wrote.
        output: a folder; it is made if it does not exist.
        num: of pictures, at most.
        score: detections below it are not drawn.

    Returns:
        the files, in the dataset's order.

    Raises:
        ValueError: (KeyError for an unknown dataset) naming the argument or file and what is valid.
    """
    if num < 1:
        raise ValueError(f"num: {num!r} is not a number of pictures of 1 or more")
    if not 0 <= score <= 1:
        raise ValueError(f"score: {score!r} is not from 0 to 1")
    records = _records(dataset)
    found = load_results(results, dataset)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, record in enumerate(choose(records, num), 1):
        detections = [item for item in found.get(record["image_id"], []) if item["score"] >= score]
        picture = draw_detections(
            record["file_name"], record.get("annotations", []), detections, dataset, score
        )
        paths.append(folder / f"detections_{number}_{Path(record['file_name']).stem}.jpg")
        picture.save(paths[-1], quality=90)
    return paths


def choose(records: Sequence[dict[str, Any]], num: int) -> list[dict[str, Any]]:
    """At most `num` of the images, evenly spread; images without objects only if all are."""
    candidates = [record for record in records if record.get("annotations")] or list(records)
    count = min(num, len(candidates))
    return [candidates[(2 * i + 1) * len(candidates) // (2 * count)] for i in range(count)]


def draw_detections(
    image: str | Path | np.ndarray,
    truth: Sequence[Object],
    detections: Sequence[Object],
    dataset: str,
    score: float = 0.5,
) -> Image.Image:
    """One picture: the image with its true objects on the left, with the detections on the right.

    Args:
        image: a file, or an array `(H, W, 3)` in BGR.
        truth: annotations as in Detectron2's dataset dicts.
        detections: the same with "score"; all of them are drawn.
        dataset: whose class names and colours to use.
        score: the threshold that the title names.
    """
    pixels = (
        np.asarray(image)[:, :, ::-1]
        if isinstance(image, np.ndarray)
        else utils.read_image(str(image), "RGB")
    )
    shown = [item for item in truth if not item.get("iscrowd")]
    with_text = max(len(shown), len(detections)) <= _MAX_LABELS
    left = _overlay(pixels, shown, dataset, with_text)
    right = _overlay(pixels, detections, dataset, with_text)
    height, width = left.shape[:2]
    gap = 8
    picture = Image.new("RGB", (2 * width + gap, height + _STRIP), "white")
    font = ImageFont.truetype(findfont("DejaVu Sans"), 18)
    titles = (
        f"ground truth: {len(shown)}",
        f"detections with score ≥ {score:g}: {len(detections)}",
    )
    for half, x, title in ((left, 0, titles[0]), (right, width + gap, titles[1])):
        picture.paste(Image.fromarray(half), (x, _STRIP))
        ImageDraw.Draw(picture).text((x + 8, 7), title, fill=(30, 40, 50), font=font)
    return picture


def _overlay(
    pixels: np.ndarray, objects: Sequence[Object], dataset: str, with_text: bool
) -> np.ndarray:
    """Boxes, and masks if there are any, over an image `(H, W, 3)` in RGB: one colour per class."""
    metadata = MetadataCatalog.get(dataset)
    scale = max(1.0, _WIDTH / max(pixels.shape[:2]))
    visualizer = Visualizer(np.ascontiguousarray(pixels), metadata, scale=scale)
    if not objects:
        return visualizer.output.get_image()
    boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in objects]
    colours = [_colour(item["category_id"], metadata) for item in objects]
    has_masks = all(item.get("segmentation") for item in objects)
    visualizer.overlay_instances(
        boxes=np.array(boxes),
        masks=[item["segmentation"] for item in objects] if has_masks else None,
        labels=_labels(objects, metadata) if with_text else None,
        assigned_colors=colours,
        alpha=0.35,
    )
    # once more, as Detectron2's own lines are half transparent
    for box, colour in zip(boxes, colours):
        visualizer.draw_box(box, alpha=0.9, edge_color=colour)
    return visualizer.output.get_image()


def _labels(objects: Sequence[Object], metadata: Any) -> list[str]:
    names = metadata.get("thing_classes") or []
    labels = []
    for item in objects:
        index = item["category_id"]
        name = names[index] if index < len(names) else str(index)
        labels.append(f"{name} {100 * item['score']:.0f}%" if "score" in item else name)
    return labels


def _colour(index: int, metadata: Any) -> tuple[float, ...]:
    """Of a class: the dataset's own, or one of ours; red, green and blue from 0 to 1."""
    colours = metadata.get("thing_colors") or _COLOURS
    return tuple(value / 255 for value in colours[index % len(colours)])
