"""The checks of all datasets of a config, which also compare them with each other and the model."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from fpn_plugin.checkpoint.plain import read_pickle

from .annotation_checks import check_categories
from .classes import Classes, compare_classes, dataset_classes, has_classes, model_classes
from .coco_json import DatasetError, Findings
from .dataset_checks import Report, check_dataset, count_reasons, read_content, require_registered
from .deep_images import check_rule
from .keypoints import (
    Keypoints,
    check_keypoints,
    dataset_keypoints,
    model_keypoints,
    read_keypoints,
)

__all__ = [
    "check_config_datasets",
    "check_federated_loss",
    "training_classes",
    "training_keypoints",
]

_CLASS_KEYS = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "FCOS": "FCOS",
}
_SEMANTIC = ("PanopticFPN", "SemanticSegmentor")


def check_config_datasets(cfg: CfgNode) -> list[Report]:
    """Check every dataset of ``DATASETS.TRAIN`` and ``DATASETS.TEST`` once, as the config asks.

    Also compares the datasets' classes with each other, since a different order gives a wrong AP,
    and their number with the model's, since too many end in a CUDA assertion and too few go
    unnoticed. Without training data they are compared with those that the config knows of the
    model, ``DATASETS.CLASSES``.

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
    keypoints = bool(cfg.MODEL.KEYPOINT_ON)
    for name in training + testing:
        require_registered(name)
    # The loader skips bad training images; those that AP is computed from must be good.
    skip = cfg.DATALOADER.ON_ERROR == "skip" and level in ("auto", "full", "headers")
    reports = []
    for name in training:
        tested = name in cfg.DATASETS.TEST
        images = "annotations" if skip and not tested else level
        reports.append(
            check_dataset(
                *(name, images, True, masks, tested, outside, polygons, keypoints, deep_images)
            )
        )
    _require_objects(reports)
    reports += [
        check_dataset(
            *(name, level, False, masks),
            outside=outside,
            keypoints=keypoints,
            deep_images=deep_images,
        )
        for name in testing
    ]
    if has_classes(cfg):
        known = [model_classes(cfg)] if not training else []
        known += [report.known_classes for report in reports]
        compare_classes([classes for classes in known if classes])
    if keypoints:
        known_points = [model_keypoints(cfg)] if not training else []
        known_points += [report.keypoints for report in reports]
        check_keypoints(cfg, [points for points in known_points if points])
    for report in reports:
        _check_class_count(cfg, report)
    if level != "off" and cfg.MODEL.META_ARCHITECTURE in _SEMANTIC:
        _check_stuff(cfg, training + testing)
    return reports


def check_federated_loss(cfg: CfgNode) -> None:
    """Check that the federated loss finds the frequencies of the classes, which the model's
    constructor reads from the first dataset of ``DATASETS.TRAIN``, at an evaluation too.

    Raises:
        ValueError: there is no such dataset, or it does not say how often its classes occur.
    """
    key = "MODEL.ROI_BOX_HEAD.USE_FED_LOSS"
    if not cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS:
        return
    if not cfg.DATASETS.TRAIN:
        raise ValueError(
            f"{key} is True, but DATASETS.TRAIN is empty: the model needs the name of the dataset"
            " that it was trained on, for class_image_count in that one's metadata"
        )
    for name in cfg.DATASETS.TRAIN:
        if MetadataCatalog.get(name).get("class_image_count") is None:
            raise ValueError(
                f"{key} is True, but MetadataCatalog.get({name!r}) has no class_image_count, a list"
                " such as [{'id': 1, 'image_count': 20}, …] as LVIS's: set it, or set the key False"
            )


def _require_objects(reports: list[Report]) -> None:
    """Refuse training data of which every object is left out, as Detectron2 says no reason."""
    if not reports or any(report.level == "off" for report in reports):
        return
    total = sum(report.num_annotations for report in reports)
    if total and sum(sum(report.left_out.values()) for report in reports) == total:
        reasons = "; ".join(f"{r.json_file}: {count_reasons(r.left_out)}" for r in reports)
        raise DatasetError(
            f"DATASETS.TRAIN {tuple(report.name for report in reports)}: all {total} annotations"
            f" are left out of training, so that nothing is left to learn from ({reasons})"
        )


def training_classes(cfg: CfgNode, reports: list[Report]) -> Classes | None:
    """The classes of the training data, or None where it does not tell, or the model has none.

    Args:
        reports: of :func:`check_config_datasets`.
    """
    if not has_classes(cfg):
        return None
    for report in reports:
        if report.name not in cfg.DATASETS.TRAIN:
            continue
        if classes := report.known_classes or dataset_classes(report.name):
            return classes
        if report.json_file and (classes := _read_classes(report)):
            return classes
    return None


def training_keypoints(cfg: CfgNode, reports: list[Report]) -> Keypoints | None:
    """The keypoints of the training data, or None where it does not tell, or the model has none.

    Args:
        reports: of :func:`check_config_datasets`.
    """
    for report in reports if cfg.MODEL.KEYPOINT_ON else ():
        if report.name not in cfg.DATASETS.TRAIN:
            continue
        if keypoints := report.keypoints or dataset_keypoints(report.name):
            return keypoints
        if report.json_file:  # its check is off
            findings = Findings(report.json_file)
            content = read_content(report.name, MetadataCatalog.get(report.name))
            keypoints = read_keypoints(content, findings, report.name)
            findings.raise_errors()
            return keypoints
    return None


def _read_classes(report: Report) -> Classes | None:
    """The classes of a dataset whose check is off, without a complaint about its other faults."""
    findings = Findings(report.json_file)
    try:
        content = read_content(report.name, MetadataCatalog.get(report.name))
        categories = check_categories(content, findings)
    except (DatasetError, OSError):
        return None
    if findings.num_errors or not categories:
        return None
    ids = tuple(sorted(categories))
    return Classes(tuple(categories[key] for key in ids), ids, report.name, report.json_file)


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


def _check_class_count(cfg: CfgNode, report: Report) -> None:
    section = _CLASS_KEYS.get(cfg.MODEL.META_ARCHITECTURE)
    classes = report.known_classes
    if section is None or classes is None:
        return
    expected, count = cfg.MODEL[section].NUM_CLASSES, len(classes.names)
    if expected != count:
        names = ", ".join(classes.names[:10]) + (", …" if count > 10 else "")
        raise ValueError(
            f"MODEL.{section}.NUM_CLASSES is {expected}, but dataset {report.name} "
            f"({classes.source}) has {count} categories: {names}"
        )


def _check_stuff(cfg: CfgNode, names: list[str]) -> None:
    """Compare the semantic classes of datasets with each other, and their number."""
    expected, all_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, []
    for name in names:
        stuff = tuple(map(str, MetadataCatalog.get(name).get("stuff_classes") or ()))
        if not stuff:
            continue
        source = f"MetadataCatalog.get({name!r}).stuff_classes"
        all_classes.append(Classes(stuff, (), name, source))
        if expected != len(stuff):
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {expected}, but for dataset {name}"
                f" {all_classes[-1]}"
            )
    compare_classes(all_classes)
