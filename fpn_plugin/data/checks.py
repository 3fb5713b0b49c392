"""Finds the faults of a dataset before training starts, and names the file and the annotation."""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from fpn_plugin.checkpoint.plain import read_pickle

from .annotation_checks import check_annotations, check_categories, check_images
from .coco_json import DatasetError, Findings, read_json
from .deep_images import check_rule
from .file_names import ImageFolder
from .image_checks import check_image_files, image_file_name, name_fault

__all__ = ["IMAGE_CHECKS", "Report", "check_config_datasets", "check_dataset"]

IMAGE_CHECKS = ("auto", "full", "headers", "annotations", "off")
_FULL_LIMIT, _HEADERS_LIMIT = 5_000, 20_000
_CHECKED = {
    "full": "annotations, and every image decoded",
    "headers": "annotations, and every image's existence and size (not decoded)",
    "annotations": "annotations only (no image opened)",
}
_CLASS_KEYS = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "FCOS": "FCOS",
}
_CLASS_AGNOSTIC = ("ProposalNetwork", "SemanticSegmentor")
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
        json_file: its annotations; empty if it is not in COCO's format.
        level: one of ``IMAGE_CHECKS``, never "auto"; "off" if nothing was checked.
        num_images: images in the JSON.
        num_annotations: annotations in the JSON.
        classes: names of the categories, in the order of their ids.
        warnings: how often each warning was found.
    """

    name: str
    json_file: str
    level: str
    num_images: int = 0
    num_annotations: int = 0
    classes: tuple[str, ...] = ()
    warnings: dict[str, int] = field(default_factory=dict)


def check_dataset(
    name: str,
    images: str = "auto",
    training: bool = True,
    masks: bool = False,
    evaluation: bool = False,
    outside: bool = False,
    polygons: bool = False,
    deep_images: str = "percentile",
) -> Report:
    """Check a registered dataset in COCO's format; others are skipped with a line in the log.

    Args:
        name: as in ``DatasetCatalog``.
        images: how the image files are checked: "full" (decode all), "headers" (existence and
            size), "annotations" (not at all), "off" (no check of anything), or "auto": full up to
            5,000 images, headers up to 20,000, annotations above.
        training: False for a dataset that is only evaluated, which may lack ``annotations``
            (COCO's own test sets do).
        masks: whether every annotation must have a ``segmentation``.
        evaluation: whether every annotation must have what its evaluator reads: ``area``, and
            ``iscrowd`` unless it is LVIS's. Implied if ``training`` is False.
        outside: whether its JSON may name files outside of the image folder.
        polygons: whether training accepts masks as polygons only (``INPUT.MASK_FORMAT``).
        deep_images: how images of more than 8 bits per channel are read (``INPUT.DEEP_IMAGES``).

    Raises:
        KeyError: the dataset is not registered.
        ValueError: ``images`` is none of the above.
        DatasetError: the dataset has errors; the message counts them all.
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
    if panoptic := metadata.get("panoptic_json"):
        _check_panoptic_names(str(panoptic), findings, outside)
    num_annotations = 0
    if training or "annotations" in content:
        keys = _EVALUATION_KEYS.get(evaluator, ()) if evaluation or not training else ()
        masks, polygons = masks and (training or bool(keys)), polygons and training
        num_annotations = check_annotations(
            content, records, categories, findings, masks, keys, polygons
        )
    else:
        logger.info("Dataset %s has no annotations: it gives predictions, but no AP", name)
    level = _image_check(images, len(records))
    if level != "annotations":
        decode = level == "full"
        check_image_files(records.values(), root, decode, findings, deep_images, folder.hint)
    for line in findings.warning_lines():
        logger.warning("Dataset %s: %s", name, line)
    findings.raise_errors()
    classes = tuple(categories[key] for key in sorted(categories))
    counts = (len(records), num_annotations)
    report = Report(name, findings.source, level, *counts, classes, dict(findings.counts))
    logger.info(
        "Dataset %s is sound: %d images, %d annotations, %d classes; checked %s",
        *(name, report.num_images, report.num_annotations, len(report.classes)),
        _CHECKED[level],
    )
    return report


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
    """Check every dataset of ``DATASETS.TRAIN`` and ``DATASETS.TEST`` once, as the config asks.

    Also compares the datasets' classes with each other, since a different order gives a wrong AP,
    and their number with the model's, since too many end in a CUDA assertion and too few go
    unnoticed.

    Raises:
        KeyError: a dataset is not registered.
        ValueError: ``DATASETS.CHECK`` is unknown, the classes or their number differ, or a file of
            proposals calls code.
        DatasetError: a dataset has errors.
        FileNotFoundError: a file of proposals does not exist.
    """
    _check_proposal_files(cfg)
    training = list(dict.fromkeys(cfg.DATASETS.TRAIN))
    testing = [name for name in dict.fromkeys(cfg.DATASETS.TEST) if name not in training]
    level, masks = cfg.DATASETS.CHECK, bool(cfg.MODEL.MASK_ON)
    outside, deep_images = cfg.DATASETS.OUTSIDE_FILES, check_rule(cfg.INPUT.DEEP_IMAGES)
    polygons = masks and cfg.INPUT.MASK_FORMAT == "polygon"
    for name in training + testing:
        _require_registered(name)
    # The loader skips bad training images; those that AP is computed from must be good.
    skip = cfg.DATALOADER.ON_ERROR == "skip" and level in ("auto", "full", "headers")
    reports = []
    for name in training:
        tested = name in cfg.DATASETS.TEST
        images = "annotations" if skip and not tested else level
        reports.append(
            check_dataset(name, images, True, masks, tested, outside, polygons, deep_images)
        )
    reports += [
        check_dataset(name, level, False, masks, outside=outside, deep_images=deep_images)
        for name in testing
    ]
    if cfg.MODEL.META_ARCHITECTURE not in _CLASS_AGNOSTIC:
        _compare_classes([report for report in reports if report.level != "off"])
    for report in reports:
        _check_class_count(cfg, report)
    return reports


def _check_proposal_files(cfg: CfgNode) -> None:
    """Read the files that Detectron2 will unpickle by a reader that runs none of their code."""
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for split in ("TRAIN", "TEST"):
        key = f"DATASETS.PROPOSAL_FILES_{split}"
        for path in cfg.DATASETS[f"PROPOSAL_FILES_{split}"] if cfg.DATASETS[split] else ():
            file = Path(PathManager.get_local_path(path))
            if not file.is_file():
                raise FileNotFoundError(f"{key}: there is no file {path!r}")
            read_pickle(file, f"{key}: {path}")


def _compare_classes(reports: list[Report]) -> None:
    """Compare the classes in the order of their ids: a model knows them by their index only."""
    for other in reports[1:]:
        first = reports[0]
        if other.classes == first.classes:
            continue
        pairs = enumerate(zip_longest(first.classes, other.classes))
        index, names = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        here, there = ("no class" if name is None else repr(name) for name in names)
        raise ValueError(
            "the datasets in DATASETS.TRAIN and DATASETS.TEST must have the same categories in the "
            f"order of their ids, but class {index} is {here} in {first.name} and {there} in "
            f"{other.name}:\n  {_class_list(first)}\n  {_class_list(other)}"
        )


def _class_list(report: Report, shown: int = 20) -> str:
    names = ", ".join(report.classes[:shown]) + (", …" if len(report.classes) > shown else "")
    return f"{report.json_file} has {len(report.classes)}: {names}"


def _check_class_count(cfg: CfgNode, report: Report) -> None:
    section = _CLASS_KEYS.get(cfg.MODEL.META_ARCHITECTURE)
    if section is None or report.level == "off":
        return
    expected, count = cfg.MODEL[section].NUM_CLASSES, len(report.classes)
    if expected != count:
        names = ", ".join(report.classes[:10]) + (", …" if count > 10 else "")
        raise ValueError(
            f"MODEL.{section}.NUM_CLASSES is {expected}, but dataset {report.name} "
            f"({report.json_file}) has {count} categories: {names}"
        )
