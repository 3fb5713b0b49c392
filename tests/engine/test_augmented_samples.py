"""Samples of `INPUT.LSJ` and `INPUT.COPY_PASTE`: their sizes, masks and boxes, and that they follow
from the seed and the position alone."""

from __future__ import annotations

import itertools
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scene_data
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.structures import BitMasks
from detectron2.structures.masks import polygons_to_bitmask
from helpers import own_datasets
from pycocotools.mask import encode
from scene_data import TRAIN

from fpn_plugin.config import load_config
from fpn_plugin.config.learning import check_schedule
from fpn_plugin.data.copy_paste import CopyPasteMapper
from fpn_plugin.data.mapper import Mapper
from fpn_plugin.engine.data import SampleKey, build_train_loader, start_at

CONFIG = "quickstart/mask_rcnn_scenes_FPN.yaml"
AUGMENTED = {
    "INPUT.LSJ.ENABLED": True,
    "INPUT.LSJ.IMAGE_SIZE": 64,
    "INPUT.COPY_PASTE.ENABLED": True,
    "DATALOADER.NUM_WORKERS": 0,
    "DATASETS.TRAIN": (TRAIN,),
    "SEED": 3,
}


def config(**keys: Any) -> Any:
    values = {**AUGMENTED, **{key.replace("__", "."): value for key, value in keys.items()}}
    opts = [str(part) for pair in values.items() for part in pair]
    return load_config(Namespace(config_file=CONFIG, opts=opts))


@pytest.fixture
def scenes(tmp_path: Path) -> Any:
    with own_datasets():
        scene_data.register(tmp_path)
        yield


def test_samples_follow_from_the_seed_and_the_position(scenes: None) -> None:
    def samples(start: int, **keys: Any) -> list[dict[str, Any]]:
        loader = build_train_loader(config(**keys))
        start_at(loader, start)
        return [x for batch in itertools.islice(loader, 8 - start) for x in batch]

    whole = samples(0)
    for start, keys in ((5, {}), (3, {"DATALOADER__NUM_WORKERS": 2})):
        for one, other in zip(samples(start, **keys), whole[2 * start :], strict=True):
            assert torch.equal(one["image"], other["image"])
            assert torch.equal(one["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)
            assert torch.equal(one["instances"].gt_masks.tensor, other["instances"].gt_masks.tensor)
    plain = samples(0, INPUT__COPY_PASTE__ENABLED=False)
    for one, other in zip(whole, plain, strict=True):
        assert one["file_name"] == other["file_name"]
        assert one["image"].shape == other["image"].shape == (3, 64, 64)
        masks = one["instances"].gt_masks
        assert isinstance(masks, BitMasks) and masks.tensor.any(dim=2).any(dim=1).all()
        boxes = masks.get_bounding_boxes().tensor
        assert torch.equal(one["instances"].gt_boxes.tensor, boxes)
        changed = (one["image"] != other["image"]).any(dim=0)
        assert not (changed & ~masks.tensor.any(dim=0)).any(), "only objects are pasted"
    counts = [len(x["instances"]) - len(y["instances"]) for x, y in zip(whole, plain)]
    assert sum(count > 0 for count in counts) > 8
    assert {x["instances"].gt_classes.dtype for x in whole} == {torch.int64}


def test_a_partner_that_cannot_be_read_is_skipped_and_counted(scenes: None) -> None:
    dataset = build_train_loader(config(DATALOADER__ON_ERROR="skip")).dataset.dataset
    broken = dataset.dataset[1]["file_name"]
    Path(broken).write_bytes(b"nothing")
    dataset.mapper.augmentations.augs.clear()
    samples = [dataset[SampleKey(position, 0)] for position in range(12)]
    skipped = [[file for file, _ in x.get("skipped", [])] for x in samples]
    assert {tuple(files) for files in skipped} == {(), (broken,)}
    assert {x["file_name"] for x in samples} == {dataset.dataset[0]["file_name"]}


def test_python_configs(scenes: None) -> None:
    mapper = LazyCall(Mapper)(
        is_train=True,
        augmentations=[],
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",
    )
    dataset = LazyCall(get_detection_dataset_dicts)(names=TRAIN)
    paste = instantiate(LazyCall(CopyPasteMapper)(mapper=mapper, dataset=dataset, max_objects=1))
    record = paste.dataset[0]
    before, after = paste.mapper(record)["image"], [paste(record)["image"] for _ in range(20)]
    assert any((image != before).any() for image in after), "the partner may be the image itself"


def test_padding_is_part_of_no_mask_and_ignored_in_semantic_labels(scenes: None) -> None:
    keys = {
        "INPUT__LSJ__MIN_SCALE": 0.5,
        "INPUT__LSJ__MAX_SCALE": 0.5,
        "INPUT__RANDOM_FLIP": "none",
    }
    mapper = Mapper(config(**keys), is_train=True)
    polygons = DatasetCatalog.get(TRAIN)[0]
    size = polygons["height"], polygons["width"]
    objects = [
        {
            **x,
            "segmentation": encode(
                np.asfortranarray(polygons_to_bitmask(x["segmentation"], *size))
            ),
        }
        for x in polygons["annotations"]
    ]
    labels = polygons["file_name"].replace("train0", "labels_train0")
    sample = mapper({**polygons, "annotations": objects, "sem_seg_file_name": labels})
    height, width = 27, 32  # of 80 and 96
    masks, boxes = sample["instances"].gt_masks.tensor, sample["instances"].gt_boxes.tensor
    assert len(masks) > 1 and (sample["image"][:, height:] == 128).all()
    assert not masks[:, height:].any() and not masks[:, :, width:].any() and masks.any()
    assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    assert (sample["sem_seg"][height:] == 255).all()


def test_an_image_without_objects_is_cropped_too(scenes: None) -> None:
    for empty in (True, False):
        mapper = Mapper(config(INPUT__COPY_PASTE__ENABLED=empty), is_train=True)
        record = {**DatasetCatalog.get(TRAIN)[0], "annotations": [{"iscrowd": 1}] * empty}
        assert len(mapper(record)["instances"]) == 0


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"LR_SCHEDULER_NAME": "Cosine"}, "SOLVER.LR_SCHEDULER_NAME: .*'Cosine'.*WarmupCosineLR"),
        (
            {"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 1.0},
            "SOLVER.BASE_LR_END: 1.0 .* SOLVER.BASE_LR: 0.0004",
        ),
        ({"MAX_ITER": 460}, r"SOLVER.STEPS: \(380, 460\) .* SOLVER.MAX_ITER: 460"),
        ({"STEPS": (30, 20)}, r"SOLVER.STEPS: \(30, 20\) "),
    ],
)
def test_schedules_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        check_schedule(config(**{f"SOLVER__{key}": value for key, value in keys.items()}))
    check_schedule(config(SOLVER__MAX_ITER=400))  # Detectron2 warns of a later step


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"INPUT__LSJ__MIN_SCALE": 0.0}, "INPUT.LSJ.MIN_SCALE: 0.0 "),
        ({"INPUT__LSJ__MAX_SCALE": 0.05}, r"INPUT.LSJ.MAX_SCALE: 0.05 .*MIN_SCALE 0.1 on"),
        ({"INPUT__LSJ__IMAGE_SIZE": 0}, "INPUT.LSJ.IMAGE_SIZE: 0 "),
        ({"INPUT__CROP__ENABLED": True}, "INPUT.CROP.ENABLED: True and INPUT.LSJ.ENABLED: True"),
        ({"MODEL__MASK_ON": False}, "INPUT.COPY_PASTE.ENABLED: True needs MODEL.MASK_ON: True"),
        ({"INPUT__COPY_PASTE__PROB": 1.1}, "INPUT.COPY_PASTE.PROB: 1.1 "),
        ({"INPUT__COPY_PASTE__MAX_OBJECTS": 0}, "INPUT.COPY_PASTE.MAX_OBJECTS: 0 "),
        ({"INPUT__COPY_PASTE__MIN_VISIBLE": -1.0}, "INPUT.COPY_PASTE.MIN_VISIBLE: -1.0 "),
        ({"MODEL__EMA__DECAY": 1.0}, "MODEL.EMA.DECAY: 1.0 "),
        (
            {"MODEL__EMA__ENABLED": True, "TEST__PRECISE_BN__ENABLED": True},
            "TEST.PRECISE_BN.ENABLED: True .* MODEL.EMA.ENABLED: True",
        ),
        ({"INPUT__COPY_PASTE__CHANCE": 1.0}, "INPUT.COPY_PASTE.CHANCE"),
    ],
)
def test_mistakes_are_found_when_the_config_is_read(keys: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        config(**keys)
