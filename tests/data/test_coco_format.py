"""Datasets by name: those that datasets/prepare_*.py make, and one's own from the config."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from coco_data import config
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from folders import run_setup
from prepare_scenes import SceneOptions, prepare_scenes

from fpn_plugin.data import (
    DatasetError,
    check_config_datasets,
    check_dataset,
    register_all,
    register_coco_format,
    register_own,
)
from fpn_plugin.paths import makers_dir

PREPARED = ("trees_train", "trees_val", "scenes_train", "scenes_val")
PREPARED += ("cells_train", "cells_val", "cells_test")
pytestmark = pytest.mark.usefixtures("registry")


def own(train: tuple[str, str] = ("", ""), val: tuple[str, str] = ("", "")) -> CfgNode:
    keys = ("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES")
    return config(("coco_2017_val",), ("coco_2017_val",), 80, **dict(zip(keys, (*train, *val))))


def test_own_data_is_registered_and_used(sound: Any, write: Any, caplog: Any) -> None:
    paths = write(sound)
    cfg = own(paths, paths)
    with caplog.at_level(logging.INFO, "fpn_plugin"):
        assert register_own(cfg) is cfg
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("own_train",), ("own_val",))
    assert len(check_config_datasets(cfg)) == 2
    assert len(DatasetCatalog.get("own_train")) == 2
    assert MetadataCatalog.get("own_val").evaluator_type == "coco"


def test_nothing_given_changes_nothing() -> None:
    cfg = own()
    before = cfg.dump()
    assert register_own(cfg).dump() == before


@pytest.mark.parametrize("classes", [1, 80])
def test_class_count_of_the_config_gives_way(
    classes: int, sound: Any, write: Any, caplog: Any
) -> None:
    paths = write(sound)
    cfg = own(paths)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = classes
    stuff = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    with caplog.at_level(logging.INFO, "fpn_plugin"):
        register_own(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == stuff
    for section in ("ROI_HEADS", "RETINANET"):
        assert cfg.MODEL[section].NUM_CLASSES == 2
        assert f"MODEL.{section}.NUM_CLASSES: {classes} -> 2, as in {paths[0]}" in caplog.text
    caplog.clear()
    register_own(cfg)
    assert "NUM_CLASSES" not in caplog.text


def test_split_that_is_not_given_becomes_empty(sound: Any, write: Any, caplog: Any) -> None:
    cfg = register_own(own(val=write(sound)))
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == ((), ("own_val",))
    assert "DATASETS.TRAIN becomes empty" in caplog.text


@pytest.mark.parametrize(
    "train, val, message",
    [
        (("x.json", ""), ("", ""), "OWN.TRAIN_IMAGES is empty, but DATASETS.OWN.TRAIN_JSON is 'x"),
        (("", ""), ("", "x"), "OWN.VAL_JSON is empty, but DATASETS.OWN.VAL_IMAGES is 'x'"),
        (("", ""), ("x.json", "x"), "OWN.VAL_JSON is 'x.json', which is not a file"),
        ((__file__, "x"), ("", ""), "OWN.TRAIN_IMAGES is 'x', which is not a folder"),
    ],
)
def test_bad_keys_are_named(train: tuple[str, str], val: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_own(own(train, val))


def test_registering_twice() -> None:
    register_coco_format("t", "a.json", "images")
    register_coco_format("t", "a.json", "images")
    with pytest.raises(ValueError, match="'t' is registered already, with .*a.json.*b.json"):
        register_coco_format("t", "b.json", "images")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the JSON files that are read, in order."""
    names: list[str] = []
    load = json.load

    def count(stream: Any, **options: Any) -> Any:
        names.append(Path(stream.name).name)
        return load(stream, **options)

    monkeypatch.setattr(json, "load", count)
    return names


def test_a_run_reads_each_json_once(
    sound: Any, write: Any, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpn_plugin.engine.setup.setup_logger", lambda *args, **kwargs: None)
    flags = ["--train-json", "--train-images", "--val-json", "--val-images"]
    paths = (*write(sound, "train.json"), *write(sound, "val.json"))
    data = [word for pair in zip(flags, paths) for word in pair]
    cfg = run_setup(*data, "OUTPUT_DIR", str(tmp_path / "run")).clone()
    register_own(cfg, keep_json=True)  # as `begin` does
    check_config_datasets(cfg)
    assert reads == ["train.json", "val.json"]
    check_config_datasets(cfg)  # nothing was kept
    assert reads == ["train.json", "val.json"] * 2


def test_a_json_is_kept_only_for_the_next_reading_of_the_same_file(
    sound: Any, write: Any, reads: list[str]
) -> None:
    paths = write(sound)
    register_own(own(paths))
    cfg = register_own(own(paths), keep_json=True)
    register_coco_format("other", *write(sound, "other.json"))
    check_dataset("other")
    check_config_datasets(cfg)
    assert reads == ["own.json", "own.json", "other.json", "own.json"]
    register_own(own(paths), keep_json=True)
    sound["annotations"][0]["image_id"] = 77
    write(sound)
    with pytest.raises(DatasetError, match="image id 77 is unknown"):
        check_config_datasets(cfg)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Register the prepared datasets anew below a temporary folder, and as they were afterwards."""
    forget()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all()
    yield tmp_path
    forget()
    monkeypatch.undo()
    register_all()


def forget() -> None:
    for name in PREPARED:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_prepared_sets_are_registered_without_files(fresh: Path) -> None:
    register_all()
    assert set(PREPARED) <= set(DatasetCatalog.list())
    assert MetadataCatalog.get("trees_val").thing_classes == ["tree"]
    assert MetadataCatalog.get("trees_val").json_file == str(fresh / "trees/annotations/val.json")
    assert list(fresh.iterdir()) == []


@pytest.mark.parametrize("name", PREPARED)
def test_unprepared_set_names_its_command(name: str, fresh: Path) -> None:
    dataset = name.split("_")[0]
    with pytest.raises(DatasetError, match=f"run `fpn demo {dataset} --data-only`"):
        check_dataset(name)
    assert (makers_dir() / f"prepare_{dataset}.py").is_file()


def test_scenes_load_and_pass_the_checks(fresh: Path) -> None:
    prepare_scenes(fresh, SceneOptions(train=3, val=1, width=96, height=96, max_size=64))
    report = check_dataset("scenes_train", "full", masks=True)
    classes = MetadataCatalog.get("scenes_train").thing_classes
    assert (report.num_images, list(report.classes), report.warnings) == (3, classes, {})
    records = DatasetCatalog.get("scenes_train")
    assert len(records) == 3 and all(Path(r["file_name"]).is_file() for r in records)
    assert sum(len(r["annotations"]) for r in records) == report.num_annotations
