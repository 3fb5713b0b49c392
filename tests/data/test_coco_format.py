"""A user's own data, named in the config."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from fpn_plugin.data import check_config_datasets, register_coco_format, register_own

pytestmark = pytest.mark.usefixtures("registry")


def config(**own: str) -> CfgNode:
    cfg = get_cfg()
    keys = ("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES")
    cfg.DATASETS.OWN = CfgNode({key: own.get(key, "") for key in keys})
    cfg.DATASETS.CHECK = "auto"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("coco_2017_val",)
    return cfg


def test_own_data_is_registered_and_used(sound: Any, write: Any, caplog: Any) -> None:
    json_file, images = write(sound)
    cfg = config(TRAIN_JSON=json_file, TRAIN_IMAGES=images, VAL_JSON=json_file, VAL_IMAGES=images)
    with caplog.at_level(logging.INFO, "fpn_plugin"):
        assert register_own(cfg) is cfg
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("own_train",), ("own_val",))
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CLASSES) == (2, 2)
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 2" in caplog.text
    assert len(check_config_datasets(cfg)) == 2
    assert len(DatasetCatalog.get("own_train")) == 2
    assert MetadataCatalog.get("own_val").evaluator_type == "coco"


def test_nothing_given_changes_nothing() -> None:
    cfg = config()
    before = cfg.dump()
    assert register_own(cfg).dump() == before


def test_class_count_that_was_set_is_kept(sound: Any, write: Any) -> None:
    json_file, images = write(sound)
    cfg = config(TRAIN_JSON=json_file, TRAIN_IMAGES=images)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    register_own(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    with pytest.raises(ValueError, match="NUM_CLASSES is 3, but dataset own_train .* has 2"):
        check_config_datasets(cfg)


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
