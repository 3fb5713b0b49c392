"""The datasets this project registers, and the checks on any dataset in COCO's format."""

from .checks import check_config_datasets
from .coco_format import register_all, register_coco_format, register_own
from .coco_json import DatasetError
from .dataset_checks import Report, check_dataset

__all__ = [
    "DatasetError",
    "Report",
    "check_config_datasets",
    "check_dataset",
    "register_all",
    "register_coco_format",
    "register_own",
]
