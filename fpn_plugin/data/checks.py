"""Finds the faults of a dataset before training starts, and names the file and the annotation."""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from .annotation_checks import check_annotations, check_categories, check_images, read_json
from .findings import DatasetError, Findings
from .image_checks import check_pictures

__all__ = ["IMAGE_CHECKS", "DatasetError", "Report", "check_config_datasets", "check_dataset"]

IMAGE_CHECKS = ("auto", "full", "headers", "annotations", "off")
_FULL_LIMIT, _HEADERS_LIMIT = 5_000, 20_000
_DONE = {
    "full": "annotations, and every image decoded",
    "headers": "annotations, and every image's existence and size (not decoded)",
    "annotations": "annotations only (no image opened)",
}
_CLASS_KEYS = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What was checked, and what was found that is no error.

    Attributes:
        name: of the dataset.
        json_file: its annotations; empty if it is not in COCO's format.
        level: one of ``IMAGE_CHECKS``, never "auto"; "off" if nothing was checked.
        num_images: images in the JSON.
        num_annotations: annotations in the JSON.
        classes: names of the categories, in the order of their ids.
        warnings: count of each kind of warning.
    """

    name: str
    json_file: str
    level: str
    num_images: int = 0
    num_annotations: int = 0
    classes: tuple[str, ...] = ()
    warnings: dict[str, int] = field(default_factory=dict)


def check_dataset(
    name: str, images: str = "auto", training: bool = True, masks: bool = False
) -> Report:
    """Check a registered dataset in COCO's format; others are skipped with a line in the log.

    Args:
        name: as in ``DatasetCatalog``.
        images: how the pictures are checked: "full" (decode all), "headers" (existence and size),
            "annotations" (not at all), "off" (no check of anything), or "auto": full up to 5,000
            pictures, headers up to 20,000, annotations above.
        training: False for a dataset that is only evaluated, which may lack ``annotations``
            (COCO's own test sets do).
        masks: whether every annotation must have a ``segmentation``.

    Raises:
        KeyError: the dataset is not registered.
        ValueError: ``images`` is none of the above.
        DatasetError: the dataset has errors, all of which the message counts.
    """
    if images not in IMAGE_CHECKS:
        raise ValueError(f"DATASETS.CHECK is {images!r}, choose from {', '.join(IMAGE_CHECKS)}")
    _require_registered(name)
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if images == "off" or not json_file:
        reason = "DATASETS.CHECK is 'off'" if images == "off" else "it is not in COCO's format"
        logger.info("Dataset %s is not checked: %s", name, reason)
        return Report(name, str(json_file or ""), "off")
    content = _read(name, metadata)
    findings = Findings(str(json_file))
    report = _check_content(name, content, metadata, images, training, masks, findings)
    for line in findings.warning_lines():
        logger.warning("Dataset %s: %s", name, line)
    findings.raise_errors()
    logger.info(
        "Dataset %s is sound: %d images, %d annotations, %d classes; checked %s",
        *(name, report.num_images, report.num_annotations, len(report.classes)),
        _DONE[report.level],
    )
    return report


def _check_content(
    name: str,
    content: dict[str, Any],
    metadata: Any,
    level: str,
    training: bool,
    masks: bool,
    findings: Findings,
) -> Report:
    categories = check_categories(content, findings)
    records = check_images(content, findings)
    annotations = 0
    if training or "annotations" in content:
        annotations = check_annotations(content, records, categories, findings, masks and training)
    else:
        logger.info("Dataset %s has no annotations: it gives predictions, but no AP", name)
    if level == "auto":
        level = "full" if len(records) <= _FULL_LIMIT else "headers"
        level = level if len(records) <= _HEADERS_LIMIT else "annotations"
    if level != "annotations":
        folder = PathManager.get_local_path(str(metadata.get("image_root", "")))
        check_pictures(records.values(), folder, level == "full", findings)
    classes = tuple(categories[key] for key in sorted(categories))
    counts = (len(records), annotations)
    return Report(name, findings.source, level, *counts, classes, dict(findings.counts))


def _require_registered(name: str) -> None:
    registered = DatasetCatalog.list()
    if name not in registered:
        close = difflib.get_close_matches(name, registered, n=5, cutoff=0.5)
        hint = f"close to it: {', '.join(close)}" if close else "no registered name is close to it"
        raise KeyError(f"dataset {name!r} is not registered; {hint} ({len(registered)} in all)")


def _read(name: str, metadata: Any) -> dict[str, Any]:
    path = PathManager.get_local_path(str(metadata.json_file))
    if not os.path.isfile(path):
        command = metadata.get("prepare_command")
        remedy = f"run `{command}`" if command else "see datasets/README.md for where it belongs"
        raise DatasetError(f"{path}: dataset {name} has no such file: {remedy}")
    return read_json(path)


def check_config_datasets(cfg: CfgNode) -> list[Report]:
    """Check every dataset of ``DATASETS.TRAIN`` and ``DATASETS.TEST`` once, as a config asks for.

    Also compares a dataset's number of classes with the model's, since too many would end in a CUDA
    assertion and too few would go unnoticed.

    Raises:
        KeyError: a dataset is not registered.
        ValueError: ``DATASETS.CHECK`` is unknown, or a number of classes differs.
        DatasetError: a dataset has errors.
    """
    training = list(dict.fromkeys(cfg.DATASETS.TRAIN))
    testing = [name for name in dict.fromkeys(cfg.DATASETS.TEST) if name not in training]
    level, masks = cfg.DATASETS.CHECK, bool(cfg.MODEL.MASK_ON)
    for name in training + testing:
        _require_registered(name)
    reports = [check_dataset(name, level, True, masks) for name in training]
    reports += [check_dataset(name, level, False) for name in testing]
    for report in reports:
        _check_class_count(cfg, report)
    return reports


def _check_class_count(cfg: CfgNode, report: Report) -> None:
    section = _CLASS_KEYS.get(cfg.MODEL.META_ARCHITECTURE)
    if section is None or report.level == "off":
        return
    expected, found = cfg.MODEL[section].NUM_CLASSES, len(report.classes)
    if expected != found:
        names = ", ".join(report.classes[:10]) + (", …" if found > 10 else "")
        raise ValueError(
            f"MODEL.{section}.NUM_CLASSES is {expected}, but dataset {report.name} "
            f"({report.json_file}) has {found} categories: {names}"
        )
