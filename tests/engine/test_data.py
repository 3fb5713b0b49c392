"""The training loader: resumable, and the same samples with any keys of speed."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from helpers import own_datasets
from PIL import Image
from tiny import TRAIN

from fpn_plugin.data.image_checks import upright_size
from fpn_plugin.engine.data import (
    ResumableSampler,
    SampleKey,
    SeededDataset,
    build_train_loader,
    start_at,
)
from fpn_plugin.engine.rng import derive_seed, seeded

MakeConfig = Callable[..., CfgNode]
SAMPLERS = {
    "TrainingSampler": TrainingSampler,
    "RepeatFactorTrainingSampler": RepeatFactorTrainingSampler,
    "RandomSubsetTrainingSampler": RandomSubsetTrainingSampler,
    "WeightedTrainingSampler": RepeatFactorTrainingSampler,
    "WeightedCategoryTrainingSampler": RepeatFactorTrainingSampler,
}


def head(sampler: Any, count: int) -> list[Any]:
    return list(itertools.islice(sampler, count))


def test_order_is_detectron2s_own() -> None:
    inner = TrainingSampler(10, seed=3)
    keys = head(ResumableSampler(inner, 2), 30)
    assert [key.image for key in keys] == head(inner, 30)
    assert [key.position for key in keys] == list(range(30))


@pytest.mark.parametrize(
    "groups", [None, [0, 1, 0, 0, 1, 0, 0, 1, 0, 0]], ids=["ungrouped", "grouped"]
)
@pytest.mark.parametrize("start", [1, 4, 13])
def test_resumed_sampler_is_the_tail(groups: list[int] | None, start: int) -> None:
    whole = head(ResumableSampler(TrainingSampler(10, seed=3), 2, groups), 60)
    resumed = ResumableSampler(TrainingSampler(10, seed=3), 2, groups)
    resumed.start_batch = start
    assert head(resumed, 60 - 2 * start) == whole[2 * start :]


def test_batches_hold_one_group_and_miss_no_image() -> None:
    groups = [0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    keys = head(ResumableSampler(TrainingSampler(10, seed=3), 3, groups), 60)
    for start in range(0, 60, 3):
        assert len({groups[key.image] for key in keys[start : start + 3]}) == 1
    assert {key.image for key in keys} == set(range(10))
    assert len({key.position for key in keys}) == 60


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_of_detectron2_follows_the_seed(name: str, make_config: MakeConfig) -> None:
    def order(seed: int) -> list[Any]:
        cfg = make_config(DATALOADER__SAMPLER_TRAIN=name, SEED=seed)
        # Detectron2 reads these keys without having them.
        cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.6
        cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(TRAIN, 1.5)]
        sampler = build_train_loader(cfg).dataset.sampler
        assert type(sampler.sampler) is SAMPLERS[name]
        return head(sampler, 40)

    first = order(1)
    np.random.seed(5)
    assert first == order(1)
    assert first != order(2)


WORKERS = {"NUM_WORKERS": 2, "PERSISTENT_WORKERS": True, "PREFETCH_FACTOR": 3, "PIN_MEMORY": True}


@pytest.mark.parametrize("grouping", [True, False])
def test_samples_do_not_depend_on_workers_or_on_where_they_start(
    grouping: bool, make_config: MakeConfig
) -> None:
    def samples(start: int, **keys: Any) -> list[Any]:
        keys |= {"ASPECT_RATIO_GROUPING": grouping}
        loader = build_train_loader(
            make_config(**{f"DATALOADER__{key}": keys[key] for key in keys})
        )
        start_at(loader, start)
        batches = itertools.islice(loader, 9 - start)
        return [
            (sample["file_name"], sample["image"], sample["instances"].gt_boxes.tensor)
            for sample in itertools.chain.from_iterable(batches)
        ]

    whole = samples(0)
    for start, keys in ((0, WORKERS), (5, {"NUM_WORKERS": 1}), (5, {})):
        part = samples(start, **keys)
        assert len(part) == 18 - 2 * start
        for (name, image, boxes), other in zip(part, whole[2 * start :]):
            assert name == other[0] and torch.equal(image, other[1])
            assert torch.equal(boxes, other[2])
    sums = {(name, image.double().sum().item()) for name, image, _ in whole}
    assert len(sums) > 10, "an image is augmented anew each time"


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"PERSISTENT_WORKERS": True}, "DATALOADER.PERSISTENT_WORKERS True .*NUM_WORKERS is 0"),
        ({"PREFETCH_FACTOR": 2}, "DATALOADER.PREFETCH_FACTOR 2 .*NUM_WORKERS is 0"),
        ({"PREFETCH_FACTOR": -1, "NUM_WORKERS": 1}, "DATALOADER.PREFETCH_FACTOR: -1"),
    ],
)
def test_bad_keys_for_workers(keys: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=message):
        build_train_loader(make_config(**{f"DATALOADER__{key}": keys[key] for key in keys}))


def test_mapping_leaves_the_steps_randomness_alone(make_config: MakeConfig) -> None:
    loader = build_train_loader(make_config())

    def draws() -> list[float]:
        return [torch.rand(1).item(), np.random.rand(), random.random()]

    with seeded(11):
        expected = draws()
    with seeded(11):
        next(iter(loader))
        assert draws() == expected


def test_refused_sample_is_replaced_by_one_that_follows_from_its_seed() -> None:
    records = [{"name": number} for number in range(10)]

    def dataset() -> SeededDataset:
        def refuse_even(record: dict) -> dict | None:
            return record if record["name"] % 2 else None

        return SeededDataset(records, refuse_even, 5)  # type: ignore[arg-type]

    keys = [SampleKey(position, 0) for position in range(20)]
    replaced = [dataset()[key]["name"] for key in keys]
    again = dataset()
    assert [again[key]["name"] for key in reversed(keys)] == replaced[::-1]
    assert len(set(replaced)) > 2 and all(name % 2 for name in replaced)
    with pytest.raises(ValueError, match="refused 100 images"):
        SeededDataset(records, lambda record: None, 5)[keys[0]]  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_size_is_that_of_detectron2s_reader(orientation: int, tmp_path: Path) -> None:
    path = str(tmp_path / "a.jpg")
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 4)).save(path, exif=exif)
    height, width = read_image(path, "RGB").shape[:2]
    with Image.open(path) as image:
        assert upright_size(image) == (width, height)


def test_images_without_a_size_in_the_record_are_grouped_too(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for name, options in (("wide", {}), ("high", {"exif": exif})):
        Image.new("RGB", (8, 4)).save(tmp_path / f"{name}.jpg", **options)
    sizes: list[dict[str, Any]] = [{}, {}, {"width": 3, "height": 3}]
    records = [
        {"file_name": str(tmp_path / f"{name}.jpg"), "annotations": [{"iscrowd": 0}], **size}
        for name, size in zip(("wide", "high", "none"), sizes)
    ]
    with own_datasets():
        DatasetCatalog.register("mixed", lambda: records)
        loader = build_train_loader(make_config(DATASETS__TRAIN=("mixed",)))
        assert loader.dataset.sampler.groups == [1, 0, 0]


def test_batch_size_error(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH: 0 images"):
        build_train_loader(make_config(SOLVER__IMS_PER_BATCH=0))


def test_derived_seeds_differ() -> None:
    seeds = {derive_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125 and derive_seed(1, 2) == derive_seed(1, 2)
