"""What strangers' data could do: proposals with code in them, names that lead elsewhere."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg

from fpn_plugin import add_fpn_config
from fpn_plugin.data import check_config_datasets


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_proposals_run_no_code(split: str, tmp_path: Path) -> None:
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.MODEL.LOAD_PROPOSALS, key = True, f"PROPOSAL_FILES_{split}"
    file = tmp_path / "proposals.pkl"
    cfg.DATASETS[split], cfg.DATASETS[key] = ("no_such",), (str(file),)
    with pytest.raises(FileNotFoundError, match=f"DATASETS.{key}: there is no file"):
        check_config_datasets(cfg)
    file.write_bytes(pickle.dumps({"boxes": [Payload(tmp_path / "ran")]}))
    with pytest.raises(ValueError, match=f"DATASETS.{key}: .*proposals.pkl cannot be read.*mkdir"):
        check_config_datasets(cfg)
    assert not (tmp_path / "ran").exists()
    file.write_bytes(pickle.dumps({"boxes": [np.zeros((3, 4))], "ids": [1], "bbox_mode": 0}))
    with pytest.raises(KeyError, match="'no_such' is not registered"):  # what comes next
        check_config_datasets(cfg)
    cfg.MODEL.LOAD_PROPOSALS = False
    file.unlink()
    with pytest.raises(KeyError, match="'no_such' is not registered"):
        check_config_datasets(cfg)
