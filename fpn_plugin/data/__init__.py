"""The datasets this project registers, and the checks on any dataset in COCO's format."""

from __future__ import annotations

from detectron2.data import DatasetCatalog

from fpn_plugin.paths import dataset_root

from . import scenes, trees
from .checks import DatasetError, Report, check_config_datasets, check_dataset
from .coco_format import register_coco_format, register_own

__all__ = [
    "DatasetError",
    "Report",
    "check_config_datasets",
    "check_dataset",
    "register_all",
    "register_coco_format",
    "register_own",
]


def register_all() -> None:
    """Register this project's datasets with Detectron2; names that are taken are left alone.

    No file is read: a dataset that was not prepared is only missed when it is used.
    """
    for folder, module in (("trees", trees), ("scenes", scenes)):
        for split in ("train", "val"):
            if f"{folder}_{split}" in DatasetCatalog.list():
                continue
            base = dataset_root() / folder
            register_coco_format(
                f"{folder}_{split}",
                str(base / "annotations" / f"{split}.json"),
                str(base / split),
                thing_classes=list(module.CLASSES),
                prepare_command=module.PREPARE_COMMAND,
            )
