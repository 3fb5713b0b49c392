"""Files that a JSON names in another way are found where that is unambiguous, and only below the
image folder."""

from __future__ import annotations

import logging
import os
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from coco_data import config
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from fpn_plugin.data import (
    DatasetError,
    check_config_datasets,
    check_dataset,
    register_own,
)
from fpn_plugin.data.file_names import ImageFolder

FILES = ["a.jpg", "day1/b 1.png", "day2/c.png", "day3/c.png", "e.jpg", "Ä.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (tmp_path / "outside.jpg").touch()
    return root


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.JPG", "a.jpg"),
        ("A.jpg", "a.jpg"),
        ("images/a.jpg", "a.jpg"),
        ("/data/set/images/a.jpg", "a.jpg"),
        (r"C:\data\images\a.jpg", "a.jpg"),
        ("file:///data/images/a.jpg", "a.jpg"),
        ("/data/local-files/?d=images/a.jpg", "a.jpg"),
        ("../images/a.jpg", "a.jpg"),
        ("day1\\b 1.png", "day1/b 1.png"),
        ("day1/b%201.png", "day1/b 1.png"),
        (".\\day1\\b%201.PNG", "day1/b 1.png"),
        ("b 1.png", "day1/b 1.png"),
        ("DAY2/c.png", "day2/c.png"),
        (" a.jpg", "a.jpg"),
        (unicodedata.normalize("NFD", "Ä.png"), "Ä.png"),
        ("./a.jpg", ""),  # as it is
        ("a.jpg", ""),
        ("c.png", ""),  # of two
        ("day9/c.png", ""),
        ("a.jpeg", ""),
        ("../outside.jpg", ""),
        ("../a.jpg", ""),
        ("..\\a.jpg", ""),
        ("/etc/passwd", ""),
        ("day1", ""),
        ("a\0.jpg", ""),
        ("\ud800.jpg", ""),
    ],
)
def test_a_name(name: str, expected: str, folder: Path) -> None:
    found = ImageFolder(str(folder)).find([name])
    assert found == ({name: expected} if expected else {})


def test_no_two_names_are_one_file(folder: Path) -> None:
    files = ImageFolder(str(folder))
    assert files.find(["x/a.jpg", "y/a.jpg", "E.jpg"]) == {"E.jpg": "e.jpg"}
    assert files.find(["./a.jpg", "A.jpg"]) == {}
    own = {str(folder / "a.jpg"): "a.jpg"}  # the folder itself
    assert files.find(own) == own
    assert ImageFolder(str(folder), outside=True).find(own) == {}


def test_the_nearest_names_are_said(folder: Path) -> None:
    files = ImageFolder(str(folder))
    assert files.hint("a.jpeg") == "; there is 'a.jpg', 'e.jpg'"
    assert files.hint("day9/c.png") == "; there is 'day2/c.png', 'day3/c.png'"
    assert files.hint("quite another.bmp") == ""


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("check", ["full", "annotations", "off"])
def test_training_and_evaluation_get_the_files(
    check: str, sound: Any, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sound["images"][0]["file_name"] = r"C:\set\images\A.JPG"
    json_file, images = write(sound)
    cfg = config(TRAIN_JSON=json_file, TRAIN_IMAGES=images)
    cfg.DATASETS.CHECK = check
    register_own(cfg)
    with caplog.at_level(logging.INFO):
        (report,) = check_config_datasets(cfg)
        records = DatasetCatalog.get("own_train")
    assert list(report.warnings.values()) == ([] if check == "off" else [1])
    assert [record["file_name"] for record in records] == [
        os.path.join(images, name) for name in ("a.jpg", "b.jpg")
    ]
    assert "A.JPG' is 'a.jpg'" in caplog.text


@pytest.mark.usefixtures("registry")
def test_a_dataset_that_detectron2_loads_must_name_its_files(sound: Any, write: Any) -> None:
    sound["images"][0]["file_name"] = "A.JPG"
    register_coco_instances("t", {}, *write(sound))
    with pytest.raises(DatasetError, match="A.JPG does not exist; there is 'a.jpg'"):
        check_dataset("t", "headers")


def test_many_names_take_little_time(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(3_000)]
    for name in names:
        (tmp_path / name).touch()
    present, other_case = [], []
    for _ in range(3):  # the best, as other work on the machine takes caches and clock away
        start = time.process_time()
        assert ImageFolder(str(tmp_path)).find(names) == {}
        present.append(time.process_time() - start)
        found = ImageFolder(str(tmp_path)).find([name.upper() for name in names])
        other_case.append(time.process_time() - start)
        assert len(found) == len(names)
    assert min(present) < 0.2 and min(other_case) < 1
