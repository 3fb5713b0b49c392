"""Registers datasets in COCO's format: those that datasets/prepare_*.py make, and a user's own."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any, NamedTuple, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic_separated

from fpn_plugin.paths import dataset_root, from_folder, makers_dir

from .annotation_checks import check_categories
from .classes import Classes, has_classes, set_classes
from .coco_json import Findings, read_json, unify_ids
from .coco_records import OWN_LOADER, load_records
from .file_names import ImageFolder
from .image_checks import OUTSIDE_KEY, check_loaded
from .keypoints import (
    Keypoints,
    fit_num_keypoints,
    model_keypoints,
    read_keypoints,
    set_keypoints,
)

__all__ = ["needed_splits", "register_all", "register_coco_format", "register_own"]

# The splits and classes of the prepared datasets, as datasets/prepare_<name>.py writes them.
_PREPARED = {
    "trees": (("train", "val"), ["tree"]),
    "cells": (("train", "val", "test"), ["nucleus", "micronucleus"]),
    "scenes": (
        ("train", "val"),
        ["ellipse", "rectangle", "triangle", "star", "cross", "arrow"],
    ),
}
_SAMPLE = "coco_sample"
_CLASS_SECTIONS = ("ROI_HEADS", "RETINANET", "FCOS")
# The parts of DATASETS.OWN, each with the key that it fills and the dataset's name
_SPLITS = {"TRAIN": ("TRAIN", "own_train"), "VAL": ("TEST", "own_val")}
_PARTS = ("JSON", "IMAGES")

logger = logging.getLogger(__name__)


def register_all() -> None:
    """Register the prepared datasets with Detectron2, except for names that are taken.

    No file is read: a dataset that was not prepared is an error when it is used.
    """
    for dataset, (splits, classes) in _PREPARED.items():
        for split in splits:
            name = f"{dataset}_{split}"
            if name not in DatasetCatalog.list():
                folder = dataset_root() / dataset
                register_coco_format(
                    name,
                    str(folder / "annotations" / f"{split}.json"),
                    str(folder / split),
                    thing_classes=classes,
                    prepare_command=f"fpn demo {dataset} --data-only",
                )
    if _SAMPLE not in DatasetCatalog.list():
        _register_coco_sample()


def _register_coco_sample() -> None:
    """Register COCO's photos of datasets/prepare_coco_sample.py, with and without stuff, as
    Detectron2 registers those of COCO."""
    names = ["images", "annotations/instances.json"]
    names += ["panoptic", "annotations/panoptic.json", "panoptic_stuff"]
    paths = [str(dataset_root() / _SAMPLE / name) for name in names]
    images, instances, segments, panoptic, stuff = paths
    command: dict[str, Any] = {
        "prepare_command": f"python {makers_dir() / 'prepare_coco_sample.py'}"
    }
    register_coco_format(_SAMPLE, instances, images, **command, **_classes_of("coco_2017_val"))
    metadata = {**command, **_classes_of("coco_2017_val_panoptic_separated")}
    register_coco_panoptic_separated(
        f"{_SAMPLE}_panoptic", metadata, images, segments, panoptic, stuff, instances
    )


def _classes_of(name: str) -> dict[str, Any]:
    """The classes in the metadata of one of Detectron2's datasets."""
    entries = MetadataCatalog.get(name).as_dict().items()
    return {key: value for key, value in entries if key.startswith(("thing_", "stuff_"))}


def register_coco_format(
    name: str, json_file: str, image_root: str, outside_files: bool = False, **metadata: Any
) -> None:
    """Register a dataset with Detectron2; no file is read before it is used.

    Registering it again with the same arguments changes nothing.

    Args:
        name: for ``DatasetCatalog``.
        json_file: annotations in COCO's format.
        image_root: the folder that the JSON's file names are relative to.
        outside_files: whether the JSON may name files outside of that folder; if it does so
            without being allowed to, loading raises a DatasetError.
        metadata: further entries for ``MetadataCatalog``.

    Raises:
        ValueError: the name is taken by other files.
    """
    json_file, image_root = os.path.abspath(json_file), os.path.abspath(image_root)
    if name not in DatasetCatalog.list():
        load = functools.partial(_load, name, json_file, image_root, outside_files)
        DatasetCatalog.register(name, load)
        files = {"json_file": json_file, "image_root": image_root, "outside_files": outside_files}
        files[OWN_LOADER] = True
        MetadataCatalog.get(name).set(**files, evaluator_type="coco", **metadata)
        return
    taken = MetadataCatalog.get(name)
    present = (taken.get("json_file"), taken.get("image_root"))
    if present != (json_file, image_root):
        raise ValueError(
            f"dataset {name!r} is registered already, with {present[0]} and {present[1]}; "
            f"now it would be {json_file} and {image_root}: take another name, or another process"
        )
    if taken.get("outside_files", False) != outside_files:
        raise ValueError(
            f"dataset {name!r} is registered already, with {OUTSIDE_KEY} {not outside_files}"
        )


def _load(name: str, json_file: str, image_root: str, outside_files: bool) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = load_records(json_file, image_root, name)
    _find_files(records, ImageFolder(image_root, outside_files), json_file)
    if not outside_files:  # also if DATASETS.CHECK is off
        check_loaded(records, image_root, json_file)
    return records


def _find_files(records: list[dict[str, Any]], folder: ImageFolder, source: str) -> None:
    """Let records, as Detectron2 has loaded them, name the files that their names stand for."""
    below = os.path.join(folder.path, "")
    names = [record["file_name"].removeprefix(below) for record in records]
    found = folder.find(names)
    for record, name in zip(records, names):
        if name in found:
            record["file_name"] = os.path.join(folder.path, found[name])
    if found:
        name = next(iter(found))
        logger.info(
            "%s: %d names of images are not exactly those of files, which were found all the same:"
            " %r is %r",
            *(source, len(found), name, found[name]),
        )


def register_own(
    cfg: CfgNode, keep_json: bool = False, needed: Sequence[str] | None = None
) -> CfgNode:
    """Register the data that ``DATASETS.OWN`` names and make the config use it.

    With ``TRAIN_JSON`` or ``VAL_JSON`` set, ``DATASETS.TRAIN`` becomes ``("own_train",)`` and
    ``DATASETS.TEST`` becomes ``("own_val",)``; a split that is not given becomes empty. For a
    training the model's classes and their number become those of the data, whatever they were. For
    a trained model the config says them, and the data only where it does not.

    Args:
        cfg: the config, changed in place.
        keep_json: whether the datasets are checked next in this process, so that the JSON with the
            classes stays in memory and is not read again for it.
        needed: of a trained model, the splits that are used (TRAIN, VAL). Another one is
            registered if its files are there, and becomes empty if they are not. None for a
            training, which needs all that is given.

    Returns:
        The config that was given; unchanged if ``DATASETS.OWN`` is empty.

    Raises:
        ValueError: a JSON is given without its image folder or the other way round, or does not
            exist; or the JSON's categories have faults.
    """
    if not any(cfg.DATASETS.OWN[f"{split}_{part}"] for split in _SPLITS for part in _PARTS):
        return cfg
    trains, needed = needed is None, tuple(_SPLITS) if needed is None else needed
    files = {split: _split_paths(cfg, split, split in needed) for split in _SPLITS}
    for key, path in cfg.DATASETS.OWN.items():  # for the run's config.yaml, which is elsewhere
        cfg.DATASETS.OWN[key] = from_folder(path)
    for split, (key, name) in _SPLITS.items():
        if paths := files[split]:
            register_coco_format(name, *paths, cfg.DATASETS.OUTSIDE_FILES)
        elif cfg.DATASETS[key] and split in needed:
            logger.warning("DATASETS.%s becomes empty: DATASETS.OWN names nothing for it", key)
        cfg.DATASETS[key] = (name,) if paths else ()
    train, val = files["TRAIN"], files["VAL"]
    trains = trains and train is not None
    paths, keep = train or val, keep_json and cfg.DATASETS.CHECK != "off"
    if cfg.DATASETS.CLASSES.NAMES and not trains:
        _fit_num_classes(cfg, len(cfg.DATASETS.CLASSES.NAMES), "DATASETS.CLASSES.NAMES")
    elif paths:
        names, ids, _ = _read_outputs(cfg, paths[0], keep)
        if trains and has_classes(cfg):
            set_classes(cfg, Classes(names, ids, "own_train", paths[0]))
        _fit_num_classes(cfg, len(names), paths[0])
    if cfg.MODEL.KEYPOINT_ON:
        keypoints = None if trains else model_keypoints(cfg)
        if keypoints is None and paths:
            keypoints = _read_outputs(cfg, paths[0], keep)[2]
        if keypoints:
            fit_num_keypoints(cfg, keypoints)
            set_keypoints(cfg, keypoints)
    return cfg


def needed_splits(dataset: str) -> list[str]:
    """The splits of ``DATASETS.OWN`` that make up a dataset: none but for those."""
    return [split for split, (_, name) in _SPLITS.items() if name == dataset]


def _split_paths(cfg: CfgNode, split: str, needed: bool) -> tuple[str, str] | None:
    keys = (f"{split}_JSON", f"{split}_IMAGES")
    paths = (cfg.DATASETS.OWN[keys[0]], cfg.DATASETS.OWN[keys[1]])
    if not any(paths):
        return None
    if not needed and not (os.path.isfile(paths[0]) and os.path.isdir(paths[1])):
        return None
    for i, (key, other) in enumerate((keys, keys[::-1])):
        if not paths[i]:
            raise ValueError(
                f"DATASETS.OWN.{key} is empty, but DATASETS.OWN.{other} is {paths[1 - i]!r}: "
                "give both or neither"
            )
    flag, folder = split.lower(), os.getcwd()
    for path, key, part, is_there in (
        (paths[0], keys[0], "json", os.path.isfile),
        (paths[1], keys[1], "images", os.path.isdir),
    ):
        if not is_there(path):
            kind = "file" if part == "json" else "folder"
            raise ValueError(
                f"DATASETS.OWN.{key} is {path!r}, which is not a {kind} (from {folder}): say where"
                f" the data is by --{flag}-{part} or this key"
            )
    return paths


def _fit_num_classes(cfg: CfgNode, count: int, source: str) -> None:
    for section in filter(cfg.MODEL.__contains__, _CLASS_SECTIONS):  # FCOS is a key of ours
        node = cfg.MODEL[section]
        if node.NUM_CLASSES != count:
            values = (section, node.NUM_CLASSES, count, source)
            logger.info("MODEL.%s.NUM_CLASSES: %d -> %d, as in %s", *values)
            node.NUM_CLASSES = count


class _Outputs(NamedTuple):
    """What a file says of a model's outputs: names and ids of the categories, in the order of the
    ids, and keypoints."""

    names: tuple[str, ...]
    ids: tuple[int, ...]
    keypoints: Keypoints | None


def _read_outputs(cfg: CfgNode, json_file: str, keep_json: bool) -> _Outputs:
    stat, keypoints = os.stat(json_file), bool(cfg.MODEL.KEYPOINT_ON)
    return _parse_outputs(json_file, stat.st_size, stat.st_mtime_ns, keep_json, keypoints)


@functools.lru_cache(maxsize=4)
def _parse_outputs(
    json_file: str, size: int, mtime: int, keep_json: bool, keypoints: bool
) -> _Outputs:
    """Cached, since a process asks twice and a large file takes seconds to read."""
    findings = Findings(json_file)
    content = read_json(json_file, keep_json)
    unify_ids(content)
    categories = check_categories(content, findings)
    points = read_keypoints(content, findings, "the own data") if keypoints else None
    findings.raise_errors()
    ids = tuple(sorted(categories))
    return _Outputs(tuple(categories[key] for key in ids), ids, points)
