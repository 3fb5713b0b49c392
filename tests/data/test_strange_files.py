"""What strangers' data could do: proposals with code in them, names that lead elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_data import config
from detectron2.data import DatasetCatalog, MetadataCatalog
from wheels import read_members

from fpn_plugin.data import (
    DatasetError,
    check_config_datasets,
    check_dataset,
    register_coco_format,
    register_own,
)

pytestmark = pytest.mark.usefixtures("registry")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_proposals_run_no_code(split: str, tmp_path: Path) -> None:
    cfg = config()
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


NAMES = ["../x.jpg", "a/../../x.jpg", "/x.jpg", "C:x.jpg", "c:\\x.jpg", "a\\..\\..\\x.jpg", "//h/x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_out_of_the_folder_is_an_error_unless_allowed(
    name: str, sound: Any, write: Any
) -> None:
    sound["images"][0]["file_name"] = name
    register_coco_format("t", *write(sound))
    with pytest.raises(DatasetError, match="'file_name' must stay below .*DATASETS.OUTSIDE_FILES"):
        check_dataset("t", "annotations")
    assert check_dataset("t", "annotations", outside=True).num_images == 2


@pytest.mark.parametrize("name", ["a\0.jpg", "\ud800.jpg"])
def test_a_name_that_no_file_can_have_is_an_error(name: str, sound: Any, write: Any) -> None:
    sound["images"][0]["file_name"] = name
    register_coco_format("t", *write(sound))
    with pytest.raises(DatasetError, match="cannot be the name of a file"):
        check_dataset("t", "annotations", outside=True)


def test_ones_own_data_stays_in_its_folder_also_without_checks(sound: Any, write: Any) -> None:
    sound["images"][0]["file_name"] = "../images/a.jpg"
    json_file, images = write(sound)
    cfg = config(TRAIN_JSON=json_file, TRAIN_IMAGES=images)
    cfg.DATASETS.CHECK = "off"
    register_own(cfg)
    check_config_datasets(cfg)
    assert len(DatasetCatalog.get("own_train")) == 2  # it comes back into the folder
    sound["images"][0]["file_name"] = "../a.jpg"
    write(sound)
    with pytest.raises(DatasetError, match="own.json: image id 1: .*a.jpg' must stay below"):
        DatasetCatalog.get("own_train")
    cfg.DATASETS.OUTSIDE_FILES = True
    with pytest.raises(ValueError, match="'own_train' is registered already, with DATASETS.OUT"):
        register_own(cfg)
    DatasetCatalog.remove("own_train")
    MetadataCatalog.remove("own_train")
    register_own(cfg)
    assert len(DatasetCatalog.get("own_train")) == 2


def test_a_link_in_the_folder_may_lead_out(tmp_path: Path, sound: Any, write: Any) -> None:
    json_file, folder = write(sound)
    Path(folder, "a.jpg").rename(tmp_path / "elsewhere.jpg")
    Path(folder, "a.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    register_coco_format("t", json_file, folder)
    assert check_dataset("t", "full").num_images == 2
    assert len(DatasetCatalog.get("t")) == 2


def test_the_names_of_panoptic_files_are_checked_too(
    tmp_path: Path, sound: Any, write: Any
) -> None:
    panoptic = tmp_path / "panoptic.json"
    panoptic.write_text(json.dumps({"annotations": [{"file_name": "../../x.png"}]}))
    register_coco_format("t", *write(sound), panoptic_json=str(panoptic))
    with pytest.raises(DatasetError, match="panoptic.json: annotation of '../../x.png'.*must stay"):
        check_dataset("t", "annotations")
    assert check_dataset("t", "annotations", outside=True).num_images == 2


def test_members_of_an_archive_are_read_and_never_written(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("../../evil", b"1")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    before = sorted(tmp_path.parent.iterdir())
    content = read_members(tmp_path / "x.whl", ["../../evil", "link"])
    assert content == {"../../evil": b"1", "link": b"/etc/passwd"}  # not what the link leads to
    assert sorted(tmp_path.parent.iterdir()) == before and len(list(tmp_path.iterdir())) == 1
