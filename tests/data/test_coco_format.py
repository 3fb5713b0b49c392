"""A user's own data, named in the config."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from fpn_plugin.config import add_fpn_config
from fpn_plugin.data import check_config_datasets, register_coco_format, register_own

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("registry")


def config(**own: str) -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    keys = ("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES")
    cfg.DATASETS.OWN = CfgNode({key: own.get(key, "") for key in keys})
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("coco_2017_val",)
    return cfg


def test_own_data_is_registered_and_used(sound: Any, write: Any, caplog: Any) -> None:
    json_file, images = write(sound)
    cfg = config(TRAIN_JSON=json_file, TRAIN_IMAGES=images, VAL_JSON=json_file, VAL_IMAGES=images)
    with caplog.at_level(logging.INFO, "fpn_plugin"):
        assert register_own(cfg) is cfg
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("own_train",), ("own_val",))
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CLASSES) == (2, 2)
    assert f"MODEL.ROI_HEADS.NUM_CLASSES: 80 -> 2, as in {json_file}" in caplog.text
    assert len(check_config_datasets(cfg)) == 2
    assert len(DatasetCatalog.get("own_train")) == 2
    assert MetadataCatalog.get("own_val").evaluator_type == "coco"


def test_nothing_given_changes_nothing() -> None:
    cfg = config()
    before = cfg.dump()
    assert register_own(cfg).dump() == before


@pytest.mark.parametrize("old", [1, 3, 80])
def test_class_count_of_the_config_gives_way(old: int, sound: Any, write: Any, caplog: Any) -> None:
    json_file, images = write(sound)
    cfg = config(TRAIN_JSON=json_file, TRAIN_IMAGES=images)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = old
    stuff = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    with caplog.at_level(logging.INFO, "fpn_plugin"):
        register_own(cfg)
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CLASSES) == (2, 2)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == stuff
    for section in ("ROI_HEADS", "RETINANET"):
        assert f"MODEL.{section}.NUM_CLASSES: {old} -> 2, as in {json_file}" in caplog.text
    assert len(check_config_datasets(cfg)) == 1
    caplog.clear()
    register_own(cfg)
    assert "NUM_CLASSES" not in caplog.text


def test_readme_config_fits_data_of_any_class_count(sound: Any, write: Any) -> None:
    json_file, images = write(sound)
    cfg = get_cfg()
    add_fpn_config(cfg)
    add_fpn_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/quickstart/faster_rcnn_trees_FPN.yaml"))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
    for split in ("TRAIN", "VAL"):
        cfg.DATASETS.OWN[f"{split}_JSON"], cfg.DATASETS.OWN[f"{split}_IMAGES"] = json_file, images
    assert len(check_config_datasets(register_own(cfg))) == 2


def test_half_that_is_not_given_becomes_empty(sound: Any, write: Any, caplog: Any) -> None:
    json_file, images = write(sound)
    cfg = register_own(config(VAL_JSON=json_file, VAL_IMAGES=images))
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == ((), ("own_val",))
    assert "DATASETS.TRAIN becomes empty" in caplog.text


@pytest.mark.parametrize(
    "own, message",
    [
        ({"TRAIN_JSON": "x.json"}, "OWN.TRAIN_IMAGES is empty, but DATASETS.OWN.TRAIN_JSON is 'x"),
        ({"VAL_IMAGES": "x"}, "OWN.VAL_JSON is empty, but DATASETS.OWN.VAL_IMAGES is 'x'"),
        ({"VAL_JSON": "x.json", "VAL_IMAGES": "x"}, "OWN.VAL_JSON is 'x.json', which is not a"),
        ({"TRAIN_JSON": __file__, "TRAIN_IMAGES": "x"}, "OWN.TRAIN_IMAGES is 'x', which is not a"),
    ],
)
def test_bad_keys_are_named(own: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_own(config(**own))


def test_registering_twice() -> None:
    register_coco_format("t", "a.json", "images")
    register_coco_format("t", "a.json", "images")
    with pytest.raises(ValueError, match="'t' is registered already, with .*a.json.*b.json"):
        register_coco_format("t", "b.json", "images")
