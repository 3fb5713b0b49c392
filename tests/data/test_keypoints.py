"""Keypoints of one's own data: what the JSON says, what flips swap, and what does not fit."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest
from coco_data import config
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin_meta
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from tiny import TINY

from fpn_plugin.data import DatasetError, check_config_datasets, register_coco_format, register_own
from fpn_plugin.data.checks import training_keypoints
from fpn_plugin.data.keypoints import (
    connection_rules,
    flip_pairs,
    model_keypoints,
    require_keypoints,
    set_keypoints,
)
from fpn_plugin.data.mapper import Mapper
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.evaluation.build import check_evaluators

pytestmark = pytest.mark.usefixtures("registry")
Write = Callable[..., "tuple[str, str]"]
NAMES = ["head", "left_wing", "right_wing"]
SKELETON = [[1, 2], [1, 3]]


@pytest.mark.parametrize(
    "names, pairs",
    [
        (["nose", "left_eye", "right_eye"], [(1, 2)]),
        (["right eye", "left eye"], [(0, 1)]),
        (["l_eye", "r_eye", "tail"], [(0, 1)]),
        (["L-Eye", "R-Eye"], [(0, 1)]),
        (["eye_left", "eye_right", "eye_top"], [(0, 1)]),
        (["eyeLeft", "eyeRight", "LEar", "REar"], [(0, 1), (2, 3)]),
        (["leftEye", "rightEye"], [(0, 1)]),
        (["LEFT_EYE", "RIGHT_EYE"], [(0, 1)]),
        (["lefteye", "righteye"], [(0, 1)]),
        (["eye.L", "eye.R"], [(0, 1)]),
        (["l1", "r1", "l2", "r2"], [(0, 1), (2, 3)]),
        (["lshoulder", "rshoulder", "leg", "rump"], [(0, 1)]),
        (["top left", "top right", "bottom right", "bottom left"], [(0, 1), (2, 3)]),
        (["left_eye", "left_ear"], []),
        (["upright", "bright", "front", "rear", ""], []),
    ],
)
def test_flips_follow_from_the_names(names: list[str], pairs: list[tuple[int, int]]) -> None:
    assert flip_pairs(names) == tuple((names[i], names[j]) for i, j in pairs)


def test_flips_of_cocos_persons_are_detectron2s() -> None:
    names = builtin_meta.COCO_PERSON_KEYPOINT_NAMES
    assert flip_pairs(names) == builtin_meta.COCO_PERSON_KEYPOINT_FLIP_MAP


@pytest.fixture
def birds(sound: Any) -> Any:
    """The sound file with three keypoints at the first category, and at each object."""
    sound["categories"][0].update(keypoints=list(NAMES), skeleton=[list(p) for p in SKELETON])
    for annotation in sound["annotations"]:
        x, y = annotation["bbox"][:2]
        annotation.update(keypoints=[x, y, 2, x + 5, y + 6, 1, x + 9, y, 2], num_keypoints=3)
    return sound


def own(train: tuple[str, str], val: tuple[str, str] = ("", "")) -> CfgNode:
    keys = ("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES")
    cfg = config(classes=80, **dict(zip(keys, (*train, *val))))
    cfg.MODEL.KEYPOINT_ON = True
    return cfg


def checked(cfg: CfgNode) -> CfgNode:
    """As a run does before it trains."""
    register_own(cfg)
    set_keypoints(cfg, training_keypoints(cfg, check_config_datasets(cfg)))
    require_keypoints(cfg)
    check_evaluators(cfg)
    return cfg


def test_names_flips_and_skeleton_come_from_the_file(
    birds: Any, write: Write, log: pytest.LogCaptureFixture
) -> None:
    cfg = checked(own(write(birds), write(birds, name="val.json")))
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 3
    assert cfg.DATASETS.KEYPOINTS.NAMES == NAMES
    assert cfg.DATASETS.KEYPOINTS.FLIP_MAP == [["left_wing", "right_wing"]]
    assert cfg.DATASETS.KEYPOINTS.SKELETON == [["head", "left_wing"], ["head", "right_wing"]]
    assert create_keypoint_hflip_indices(["own_train"]) == [0, 2, 1]
    rules = MetadataCatalog.get("own_val").keypoint_connection_rules
    assert [rule[:2] for rule in rules] == [("head", "left_wing"), ("head", "right_wing")]
    assert "swaps left_wing and right_wing" in log.text
    assert "KEYPOINT_OKS_SIGMAS is empty: AP of keypoints takes 0.05 for each of 3" in log.text
    # and a copy of the config knows them without the data
    again = CfgNode.load_cfg(cfg.dump())
    assert model_keypoints(again) == model_keypoints(cfg)


def test_sigmas_must_fit(birds: Any, write: Write) -> None:
    cfg = own(write(birds), write(birds, name="val.json"))
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1] * 17
    with pytest.raises(
        ValueError, match=r"TEST.KEYPOINT_OKS_SIGMAS has 17 .* \[0.05, 0.05, 0.05\]"
    ):
        checked(cfg)


def test_a_file_without_names_has_numbers(
    birds: Any, write: Write, log: pytest.LogCaptureFixture
) -> None:
    del birds["categories"][0]["keypoints"], birds["categories"][0]["skeleton"]
    cfg = checked(own(write(birds)))
    assert cfg.DATASETS.KEYPOINTS.NAMES == ["keypoint_1", "keypoint_2", "keypoint_3"]
    assert "swaps no keypoints" in log.text
    assert create_keypoint_hflip_indices(["own_train"]) == [0, 1, 2]


def test_cocos_persons_have_detectron2s_lines(birds: Any, write: Write) -> None:
    names = builtin_meta.COCO_PERSON_KEYPOINT_NAMES
    birds["categories"][0]["keypoints"] = list(names)
    for annotation in birds["annotations"]:
        annotation["keypoints"] = annotation["keypoints"] + [0, 0, 0] * 14
    cfg = checked(own(write(birds)))
    known = model_keypoints(cfg)
    assert known and known.flips == builtin_meta.COCO_PERSON_KEYPOINT_FLIP_MAP
    assert connection_rules(known) is builtin_meta.KEYPOINT_CONNECTION_RULES


def test_a_registered_file_without_metadata(birds: Any, write: Write) -> None:
    register_coco_format("birds", *write(birds))
    cfg = config(("birds",), ("birds",))
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(ValueError, match="NUM_KEYPOINTS is 17, but birds has 3 keypoints: set it"):
        checked(cfg)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    checked(cfg)
    assert create_keypoint_hflip_indices(["birds"]) == [0, 2, 1]


def test_a_function_must_name_its_keypoints() -> None:
    DatasetCatalog.register("dicts", lambda: [])
    cfg = config(("dicts",))
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(ValueError, match="'dicts' .* does not name its keypoints"):
        checked(cfg)
    MetadataCatalog.get("dicts").set(keypoint_names=NAMES)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    set_keypoints(cfg, training_keypoints(cfg, check_config_datasets(cfg)))
    assert create_keypoint_hflip_indices(["dicts"]) == [0, 2, 1]


def other_lists(birds: Any) -> None:
    birds["categories"][1]["keypoints"] = ["a", "b", "c"]


def twice(birds: Any) -> None:
    birds["categories"][0]["keypoints"] = ["head", "wing", "wing"]


def two_points(birds: Any) -> None:
    birds["annotations"][1]["keypoints"] = [1, 1, 2, 1, 1, 2]


def no_points(birds: Any) -> None:
    for annotation in birds["annotations"]:
        del annotation["keypoints"]


def parts_of_the_image(birds: Any) -> None:
    for annotation in birds["annotations"]:
        annotation["keypoints"] = [0.1, 0.2, 2, 0.5, 0.5, 2, 0.9, 0.2, 2]


def unlabelled(birds: Any) -> None:
    for annotation in birds["annotations"]:
        annotation["keypoints"][2::3] = [0, 0, 0]


def infinite(birds: Any) -> None:
    birds["annotations"][1]["keypoints"][0] = float("nan")


@pytest.mark.parametrize(
    "change, text",
    [
        (other_lists, "'cat' and category 'dog' have different keypoints"),
        (twice, "'wing' more than once"),
        (two_points, r"annotation 2 \(image 'b.jpg'\): 'keypoints' has 6 numbers, but must have 9"),
        (no_points, "none of 4 annotations has 'keypoints', but MODEL.KEYPOINT_ON is True"),
        (parts_of_the_image, "all keypoints lie between 0 and 1"),
        (unlabelled, "no keypoint is labelled"),
        (infinite, "annotation 2 .*'keypoints' must be finite"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_faults_are_found_before_training(
    split: str, change: Callable[[Any], None], text: str, birds: Any, write: Write
) -> None:
    good = write(birds, name="good.json")
    change(birds)
    bad = write(birds, name="bad.json")
    with pytest.raises(DatasetError, match=text):
        checked(own(bad) if split == "train" else own(good, bad))
    if split == "train" and change is not infinite:  # Detectron2 reads the numbers nevertheless
        cfg = own(bad)
        cfg.MODEL.KEYPOINT_ON = False
        check_config_datasets(register_own(cfg))


@pytest.mark.parametrize("names", [["head", "right_wing", "left_wing"], [*NAMES, "tail"]])
def test_a_test_set_with_other_keypoints(names: list[str], birds: Any, write: Write) -> None:
    good = write(birds, name="good.json")
    birds["categories"][0]["keypoints"] = names
    for annotation in birds["annotations"]:
        annotation["keypoints"] += [1, 1, 1] * (len(names) - 3)
    with pytest.raises(ValueError, match="keypoint [13] is .* in own_train and .* in own_val"):
        checked(own(good, write(birds, name="val.json")))
    # and with --eval-only, by what the run has recorded
    cfg = own(("", ""), write(birds, name="val.json"))
    set_keypoints(cfg, model_keypoints(checked(own(good))))
    register_own(cfg, needed=("VAL",))
    with pytest.raises(ValueError, match="in the model and .* in own_val"):
        check_config_datasets(cfg)


def test_what_is_said_of_single_annotations(
    birds: Any, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, three, four = birds["annotations"]
    del one["keypoints"]
    two["keypoints"][2] = 3
    three["keypoints"][0] = 900
    four["num_keypoints"] = 0
    birds["categories"][0]["skeleton"] = [[1, 9]]
    cfg = checked(own(write(birds)))
    for text in (
        "1 × annotation without keypoints",
        "1 × visibility that is not 0, 1 or 2",
        "1 × labelled keypoint outside the image",
        "1 × 'num_keypoints' that is not the number",
        "1 × skeleton that is no list of pairs",
    ):
        assert text in caplog.text
    assert cfg.DATASETS.KEYPOINTS.SKELETON == []


def test_a_skeleton_that_counts_from_zero(birds: Any, write: Write) -> None:
    birds["categories"][0]["skeleton"] = [[0, 1], [0, 2]]
    cfg = checked(own(write(birds)))
    assert cfg.DATASETS.KEYPOINTS.SKELETON == [["head", "left_wing"], ["head", "right_wing"]]


def test_objects_without_keypoints_beside_others(birds: Any, write: Write) -> None:
    del birds["annotations"][0]["keypoints"]
    cfg = checked(own(write(birds)))
    mapper = Mapper(cfg, is_train=True)
    keypoints = mapper(DatasetCatalog.get("own_train")[0])["instances"].gt_keypoints.tensor
    assert keypoints.shape == (2, 3, 3)
    assert not keypoints[0].any() and np.isin(keypoints[1, :, 2], (1, 2)).all()


def test_an_evaluation_needs_no_training_data(birds: Any, write: Write) -> None:
    cfg = own(("", ""), write(birds))
    register_own(cfg, needed=("VAL",))
    cfg.DATASETS.TRAIN = ()
    cfg.INPUT.MIN_SIZE_TEST = TINY["INPUT.MIN_SIZE_TEST"]
    sample = next(iter(Trainer.build_test_loader(cfg, "own_val")))[0]
    assert "instances" not in sample and cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 3
