"""Registers datasets in COCO's format: those that datasets/prepare_*.py make, and a user's own."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from fpn_plugin.paths import dataset_root

from .annotation_checks import check_categories
from .coco_json import Findings, read_json
from .file_names import ImageFolder
from .image_checks import OUTSIDE_KEY, check_loaded

__all__ = ["register_all", "register_coco_format", "register_own"]

# The classes of the prepared datasets, as datasets/prepare_<name>.py writes them.
_PREPARED = {
    "trees": ["tree"],
    "scenes": ["ellipse", "rectangle", "triangle", "star", "cross", "arrow"],
}
_CLASS_SECTIONS = ("ROI_HEADS", "RETINANET", "FCOS")

logger = logging.getLogger(__name__)


def register_all() -> None:
    """Register the prepared datasets with Detectron2, except for names that are taken.

    No file is read: a dataset that was not prepared is an error when it is used.
    """
    for dataset, classes in _PREPARED.items():
        for split in ("train", "val"):
            name = f"{dataset}_{split}"
            if name not in DatasetCatalog.list():
                folder = dataset_root() / dataset
                register_coco_format(
                    name,
                    str(folder / "annotations" / f"{split}.json"),
                    str(folder / split),
                    thing_classes=classes,
                    prepare_command=f"python datasets/prepare_{dataset}.py",
                )


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
        MetadataCatalog.get(name).set(**files, evaluator_type="coco", **metadata)
        return
    taken = MetadataCatalog.get(name)
    present = (taken.get("json_file"), taken.get("image_root"))
    if present != (json_file, image_root):
        raise ValueError(
            f"dataset {name!r} is registered already, with {present[0]} and {present[1]}; "
            f"now it would be {json_file} and {image_root}"
        )
    if taken.get("outside_files", False) != outside_files:
        raise ValueError(
            f"dataset {name!r} is registered already, with {OUTSIDE_KEY} {not outside_files}"
        )


def _load(name: str, json_file: str, image_root: str, outside_files: bool) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = load_coco_json(json_file, image_root, name)
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


def register_own(cfg: CfgNode, keep_json: bool = False) -> CfgNode:
    """Register the data that ``DATASETS.OWN`` names and make the config use it.

    With ``TRAIN_JSON`` or ``VAL_JSON`` set, ``DATASETS.TRAIN`` becomes ``("own_train",)`` and
    ``DATASETS.TEST`` becomes ``("own_val",)``; a split that is not given becomes empty. The model's
    number of classes becomes that of the data, whatever it was.

    Args:
        cfg: the config, changed in place.
        keep_json: whether the datasets are checked next in this process, so that the JSON with the
            classes stays in memory and is not read again for it.

    Returns:
        The config that was given; unchanged if ``DATASETS.OWN`` is empty.

    Raises:
        ValueError: a JSON is given without its image folder or the other way round, or does not
            exist; or the JSON's categories have faults.
    """
    train, val = _split_paths(cfg, "TRAIN"), _split_paths(cfg, "VAL")
    if not (train or val):
        return cfg
    for name, paths in (("own_train", train), ("own_val", val)):
        if paths:
            register_coco_format(name, *paths, cfg.DATASETS.OUTSIDE_FILES)
    for key, name, paths in (("TRAIN", "own_train", train), ("TEST", "own_val", val)):
        if not paths and cfg.DATASETS[key]:
            logger.warning("DATASETS.%s becomes empty: DATASETS.OWN names nothing for it", key)
        cfg.DATASETS[key] = (name,) if paths else ()
    _fit_num_classes(cfg, (train or val or ("", ""))[0], keep_json and cfg.DATASETS.CHECK != "off")
    return cfg


def _split_paths(cfg: CfgNode, split: str) -> tuple[str, str] | None:
    keys = (f"{split}_JSON", f"{split}_IMAGES")
    paths = (cfg.DATASETS.OWN[keys[0]], cfg.DATASETS.OWN[keys[1]])
    if not any(paths):
        return None
    for i, (key, other) in enumerate((keys, keys[::-1])):
        if not paths[i]:
            raise ValueError(
                f"DATASETS.OWN.{key} is empty, but DATASETS.OWN.{other} is {paths[1 - i]!r}: "
                "give both or neither"
            )
    if not os.path.isfile(paths[0]):
        raise ValueError(f"DATASETS.OWN.{keys[0]} is {paths[0]!r}, which is not a file")
    if not os.path.isdir(paths[1]):
        raise ValueError(f"DATASETS.OWN.{keys[1]} is {paths[1]!r}, which is not a folder")
    return paths


def _fit_num_classes(cfg: CfgNode, json_file: str, keep_json: bool) -> None:
    stat = os.stat(json_file)
    count = _count_classes(json_file, stat.st_size, stat.st_mtime_ns, keep_json)
    for section in filter(cfg.MODEL.__contains__, _CLASS_SECTIONS):  # FCOS is a key of ours
        node = cfg.MODEL[section]
        if node.NUM_CLASSES != count:
            values = (section, node.NUM_CLASSES, count, json_file)
            logger.info("MODEL.%s.NUM_CLASSES: %d -> %d, as in %s", *values)
            node.NUM_CLASSES = count


@functools.lru_cache(maxsize=4)
def _count_classes(json_file: str, size: int, mtime: int, keep_json: bool) -> int:
    """Cached, since a process asks twice and a large file takes seconds to read."""
    findings = Findings(json_file)
    count = len(check_categories(read_json(json_file, keep_json), findings))
    findings.raise_errors()
    return count
