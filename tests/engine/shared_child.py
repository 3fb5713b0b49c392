"""What two processes do that share dataset dicts."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from fpn_plugin.data.shared_records import SharedRecords, one_copy_per_host

RECORDS = [{"file_name": f"{i}.jpg", "annotations": [{"bbox": [i] * 4}] * i} for i in range(5)]


def read_together(folder: str) -> None:
    tempfile.tempdir = folder

    def load() -> list[dict]:
        (Path(folder) / f"read_by_{comm.get_rank()}").touch()
        MetadataCatalog.get("shared").thing_classes = ["a", "b"]
        return list(RECORDS)

    def fail() -> list[dict]:
        raise ValueError("DATASETS.TRAIN: nothing")

    shared = one_copy_per_host(load, ["shared"])
    assert isinstance(shared, SharedRecords) and list(shared) == RECORDS
    assert MetadataCatalog.get("shared").thing_classes == ["a", "b"]
    with pytest.raises(ValueError, match="DATASETS.TRAIN: nothing"):
        one_copy_per_host(fail, [])
    dist.barrier()
