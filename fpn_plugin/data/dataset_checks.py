"""The checks of one dataset: its annotations, the names of its files, its images."""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass, field
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from fpn_plugin.registry import HOW_TO_ADD

from .annotation_checks import check_annotations, check_categories, check_images
from .classes import Classes, dataset_classes
from .coco_json import DatasetError, Findings, is_plain_utf8, read_json, unify_ids
from .coco_records import is_own_loader
from .file_names import ImageFolder
from .image_checks import check_image_files, image_file_name, name_fault
from .keypoint_checks import check_keypoint_annotations
from .keypoints import OWN_NAMES, Keypoints, dataset_keypoints, read_keypoints
from .record_checks import check_records

__all__ = [
    "Report",
    "check_dataset",
    "count_reasons",
    "read_content",
    "require_registered",
]

IMAGE_CHECKS = ("auto", "full", "headers", "annotations", "off")
_FULL_LIMIT, _HEADERS_LIMIT = 5_000, 20_000
_CHECKED = {
    "full": "annotations, and every image decoded",
    "headers": "annotations, and every image's existence and size (not decoded)",
    "annotations": "annotations only (no image opened)",
}
_MANY = 0.1  # the share of annotations that training leaves out from which it is a warning
# What pycocotools and the lvis package read from every annotation, by `evaluator_type`.
_EVALUATION_KEYS = {
    "coco": ("area", "iscrowd"),
    "coco_panoptic_seg": ("area", "iscrowd"),
    "lvis": ("area",),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What was checked of a dataset without errors.

    Attributes:
        name: of the dataset.
        json_file: its annotations; empty if it is not in COCO's format, but loaded by a function.
        level: one of ``IMAGE_CHECKS``, never "auto"; "off" if nothing was checked.
        num_images: images in the JSON.
        num_annotations: annotations in the JSON.
        classes: names of the categories, in the order of their ids.
        warnings: how often each warning was found.
        class_ids: of the categories, in the same order as their names.
        left_out: how many annotations training leaves out, for each reason.
        keypoints: of its metadata, else of its file, if they are asked for and there.
    """

    name: str
    json_file: str
    level: str
    num_images: int = 0
    num_annotations: int = 0
    classes: tuple[str, ...] = ()
    warnings: dict[str, int] = field(default_factory=dict)
    class_ids: tuple[int, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    keypoints: Keypoints | None = None

    @property
    def known_classes(self) -> Classes | None:
        """None if the dataset was not checked, or does not name them."""
        if self.level == "off" or not self.classes:
            return None
        source = self.json_file or f"MetadataCatalog.get({self.name!r}).thing_classes"
        return Classes(self.classes, self.class_ids, self.name, source)


def check_dataset(
    name: str,
    images: str = "auto",
    training: bool = True,
    masks: bool = False,
    evaluation: bool = False,
    outside: bool = False,
    polygons: bool = False,
    keypoints: bool = False,
    deep_images: str = "percentile",
) -> Report:
    """Check a registered dataset in COCO's format; of others, only what stands in their records.

    A dataset of another format without class names is skipped with a line in the log.

    Args:
        name: as in ``DatasetCatalog``.
        images: how the image files are checked: "full" (decode all), "headers" (existence and
            size), "annotations" (not at all), "off" (no check of anything), or "auto": full up to
            5,000 images, headers up to 20,000, annotations above.
        training: False for a dataset that is only evaluated, which may lack ``annotations``
            (COCO's own test sets do).
        masks: whether every annotation must have a ``segmentation``.
        evaluation: whether its evaluator must be able to read every annotation. What is missing of
            ``area`` and ``iscrowd`` is filled in, with a warning; LVIS's needs the ``area``.
            Implied if ``training`` is False.
        outside: whether its JSON may name files outside of the image folder.
        polygons: whether training accepts masks as polygons only (``INPUT.MASK_FORMAT``).
        keypoints: whether the model has a keypoint head.
        deep_images: how images of more than 8 bits per channel are read (``INPUT.DEEP_IMAGES``).

    Raises:
        KeyError: the dataset is not registered.
        ValueError: ``images`` is none of the above.
        DatasetError: the dataset has errors; the message counts them all.
    """
    if images not in IMAGE_CHECKS:
        raise ValueError(f"DATASETS.CHECK is {images!r}, choose from {', '.join(IMAGE_CHECKS)}")
    require_registered(name)
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if images == "off":
        logger.info("Dataset %s is not checked: DATASETS.CHECK is 'off'", name)
        known = dataset_keypoints(name) if keypoints else None
        return Report(name, str(json_file or ""), "off", keypoints=known)
    if not json_file:
        return _check_function(name, masks)
    content = read_content(name, metadata)
    findings = Findings(str(json_file))
    own = is_own_loader(name)
    if not own and not is_plain_utf8(PathManager.get_local_path(str(json_file))):
        findings.error(
            "is not UTF-8, or starts with a byte order mark, which Detectron2's loader does not"
            " read: save it as UTF-8, or register it by fpn_plugin.data.register_coco_format"
        )
    evaluator = str(metadata.get("evaluator_type"))
    if evaluator == "lvis":
        _name_images_by_url(content, findings)
    categories = check_categories(content, findings)
    root = PathManager.get_local_path(str(metadata.get("image_root", "")))
    folder = ImageFolder(root, outside)
    # the loader of `register_coco_format` finds files likewise, Detectron2's own does not
    if metadata.get("outside_files") is not None:
        _correct_names(content, folder, findings)
    records = check_images(content, findings, outside)
    points = None
    if keypoints:
        # a run writes its training data's keypoints into the metadata of its own data
        points = None if name in OWN_NAMES else dataset_keypoints(name)
        points = points or read_keypoints(content, findings, name)
    if panoptic := metadata.get("panoptic_json"):
        _check_panoptic_names(str(panoptic), findings, outside)
    num_annotations = 0
    if training or "annotations" in content:
        keys = _EVALUATION_KEYS.get(evaluator, ()) if evaluation or not training else ()
        masks, polygons = masks and (training or bool(keys)), polygons and training
        num_annotations = check_annotations(
            *(content, records, categories, findings, masks, keys, polygons, training, own)
        )
        if keypoints:
            count = len(points.names) if points else 0
            check_keypoint_annotations(content, records, count, findings)
    else:
        logger.info("Dataset %s has no annotations: it gives predictions, but no AP", name)
    level = _image_check(images, len(records))
    if level != "annotations":
        decode = level == "full"
        check_image_files(records.values(), root, decode, findings, deep_images, folder.hint)
    for line in findings.warning_lines():
        logger.warning("Dataset %s: %s", name, line)
    findings.raise_errors()
    left_out = findings.left_out_counts()
    if left_out:
        few = sum(left_out.values()) < _MANY * num_annotations
        logger.log(
            logging.INFO if few else logging.WARNING,
            "Dataset %s: %d of %d annotations are left out of training: %s",
            *(name, sum(left_out.values()), num_annotations, count_reasons(left_out)),
        )
    ids = tuple(sorted(categories))
    classes = _class_names(content, categories, evaluator)
    counts = (len(records), num_annotations)
    warnings = dict(findings.counts)
    report = Report(name, findings.source, level, *counts, classes, warnings, ids, left_out, points)
    logger.info(
        "Dataset %s is sound: %d images, %d annotations, %d classes; checked %s",
        *(name, report.num_images, report.num_annotations, len(report.classes)),
        _CHECKED[level],
    )
    if training and num_annotations:
        _name_classes_without_objects(name, content, dict(zip(ids, classes)))
    return report


def _name_classes_without_objects(
    dataset: str, content: dict[str, Any], classes: dict[Any, str]
) -> None:
    """Warn of categories such as the root that some exports have, which nothing belongs to."""
    present = {annotation["category_id"] for annotation in content["annotations"]}
    names = [name for key, name in classes.items() if key not in present]
    if names:
        logger.warning(
            "%s: %d of %d classes have no object to train on, and keep an output each: %s%s",
            *(dataset, len(names), len(classes), ", ".join(names[:10])),
            ", …" if len(names) > 10 else "",
        )


def count_reasons(left_out: dict[str, int]) -> str:
    """The reasons for which annotations are left out, each with its count."""
    return ", ".join(f"{count} × {reason}" for reason, count in left_out.items())


def _class_names(
    content: dict[str, Any], categories: dict[int, str], evaluator: str
) -> tuple[str, ...]:
    """The names of the classes as Detectron2's loaders give them: LVIS's are the first synonyms."""
    names = dict(categories)
    for category in content["categories"] if evaluator == "lvis" else ():
        if synonyms := category.get("synonyms"):
            names[category["id"]] = str(synonyms[0])
    return tuple(names[key] for key in sorted(names))


def _check_function(name: str, masks: bool) -> Report:
    """Check what a dataset's own function gives: Detectron2's dataset dicts."""
    records = DatasetCatalog.get(name)
    classes = dataset_classes(name)
    if classes is None or not isinstance(records, list):
        logger.info("Dataset %s is not checked: it is not in COCO's format", name)
        return Report(name, "", "off", keypoints=dataset_keypoints(name))
    findings = Findings(f"dataset {name}")
    num_annotations = check_records(records, classes, masks, findings)
    findings.raise_errors()
    logger.info(
        "Dataset %s is sound: %d images, %d annotations, %d classes; checked the records that its"
        " function gives (no image opened)",
        *(name, len(records), num_annotations, len(classes.names)),
    )
    counts = (len(records), num_annotations)
    points = dataset_keypoints(name)
    return Report(
        name, "", "annotations", *counts, classes.names, {}, classes.ids, keypoints=points
    )


def _image_check(images: str, num_images: int) -> str:
    """How the image files are checked, with "auto" decided by their number."""
    if images != "auto":
        return images
    if num_images <= _FULL_LIMIT:
        return "full"
    return "headers" if num_images <= _HEADERS_LIMIT else "annotations"


def _name_images_by_url(content: dict[str, Any], findings: Findings) -> None:
    """Replace every ``file_name`` by the end of ``coco_url``, the only name LVIS's loader reads.

    The two differ in LVIS v0.5: ``COCO_val2014_….jpg`` is the file ``val2017/….jpg``.
    """
    images = content.get("images")
    for image in images if isinstance(images, list) else ():
        if not isinstance(image, dict):
            continue
        url = image.get("coco_url")
        if isinstance(url, str) and "/" in url:
            image["file_name"] = "/".join(url.split("/")[-2:])
        else:
            findings.error(
                f"image id {image.get('id')!r}: 'coco_url' is {url!r}, but Detectron2's LVIS "
                "loader takes the image's folder and name from its end: '…/val2017/1.jpg'"
            )


def _correct_names(content: dict[str, Any], folder: ImageFolder, findings: Findings) -> None:
    """Replace every ``file_name`` by that of the file which it stands for."""
    records = content.get("images")
    records = records if isinstance(records, list) else []
    images = [image for image in records if isinstance(image, dict) and image_file_name(image)]
    found = folder.find(image["file_name"] for image in images)
    for image in images if found else ():
        image["file_name"] = found.get(image["file_name"], image["file_name"])
    pairs = list(found.items())
    fault = "a 'file_name' that is not exactly a file's, which was found all the same"
    findings.warn(fault, len(pairs), lambda i: f"{pairs[i][0]!r} is {pairs[i][1]!r}")


def _check_panoptic_names(path: str, findings: Findings, outside: bool) -> None:
    """Check the names of the PNG files that the panoptic evaluator reads."""
    local = PathManager.get_local_path(path)
    content = read_json(local) if os.path.isfile(local) else {}  # Detectron2 reports its absence
    records = content.get("annotations")
    for record in records if isinstance(records, list) else ():
        name = record.get("file_name") if isinstance(record, dict) else None
        if isinstance(name, str) and (fault := name_fault(name, outside)):
            findings.error(f"{path}: annotation of {name!r}: 'file_name' {fault}")


def require_registered(name: str) -> None:
    """Raise a KeyError for a name that no dataset has, with those that are close to it."""
    registered = DatasetCatalog.list()
    if name not in registered:
        close = difflib.get_close_matches(name, registered, n=5, cutoff=0.5)
        hint = f"close to it: {', '.join(close)}" if close else "no registered name is close to it"
        text = f"dataset {name!r} is not registered; {hint} ({len(registered)} in all)"
        raise KeyError(f"{text}; {HOW_TO_ADD}")


def read_content(name: str, metadata: Any) -> dict[str, Any]:
    """The content of a dataset's JSON file as its loader takes it: ours unifies ids and sizes.

    Raises:
        DatasetError: there is no such file, or it cannot be read.
    """
    path = PathManager.get_local_path(str(metadata.json_file))
    if not os.path.isfile(path):
        command = metadata.get("prepare_command")
        remedy = f"run `{command}`" if command else "see datasets/README.md for where it belongs"
        raise DatasetError(f"{path}: dataset {name} has no such file: {remedy}")
    content = read_json(path)
    if is_own_loader(name):
        unify_ids(content)
    return content
