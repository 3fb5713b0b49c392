"""The resumable sampler and the seeded dataset."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from PIL import Image
from tiny import TRAIN

from fpn_plugin.data.image_checks import upright_size
from fpn_plugin.engine.data import (
    ResumableSampler,
    SeededDataset,
    Token,
    _is_wide,
    build_train_loader,
    start_at,
)
from fpn_plugin.engine.rng import derive_seed, seeded

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
    tokens = head(ResumableSampler(inner, 2), 30)
    assert [token.item for token in tokens] == head(inner, 30)
    assert [token.position for token in tokens] == list(range(30))
    assert {token.item for token in tokens[:10]} == set(range(10))


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
    tokens = head(ResumableSampler(TrainingSampler(10, seed=3), 3, groups), 60)
    for number in range(0, 60, 3):
        assert len({groups[token.item] for token in tokens[number : number + 3]}) == 1
    assert {token.item for token in tokens} == set(range(10))
    assert len({token.position for token in tokens}) == 60


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_of_detectron2_follows_the_seed(
    name: str, make_config: Callable[..., CfgNode]
) -> None:
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


@pytest.mark.parametrize("grouping", [True, False])
def test_batches_do_not_depend_on_workers_or_on_where_they_start(
    grouping: bool, make_config: Callable[..., CfgNode]
) -> None:
    def batches(workers: int, start: int, stop: int) -> list[Any]:
        cfg = make_config(
            DATALOADER__NUM_WORKERS=workers, DATALOADER__ASPECT_RATIO_GROUPING=grouping
        )
        loader = build_train_loader(cfg)
        start_at(loader, start)
        samples = itertools.chain.from_iterable(itertools.islice(loader, stop - start))
        return [(sample["file_name"], sample["image"].double().sum().item()) for sample in samples]

    whole = batches(0, 0, 9)
    assert batches(3, 0, 9) == whole
    assert batches(2, 5, 9) == batches(0, 5, 9) == whole[10:]
    assert len({image for image in whole}) > 10, "an image is augmented anew each time"


def test_mapping_leaves_the_steps_randomness_alone(make_config: Callable[..., CfgNode]) -> None:
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

    replaced = [dataset()[Token(position, 0)]["name"] for position in range(20)]
    again = dataset()
    assert [again[Token(position, 0)]["name"] for position in reversed(range(20))] == replaced[::-1]
    assert len(set(replaced)) > 2 and all(name % 2 for name in replaced)
    with pytest.raises(ValueError, match="refused 100 images"):
        SeededDataset(records, lambda record: None, 5)[Token(0, 0)]  # type: ignore[arg-type]


def test_size_is_read_from_the_image_where_the_record_has_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    image = Image.new("RGB", (8, 4))
    image.save(path)
    assert _is_wide({"file_name": str(path)}) == 1
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    assert _is_wide({"file_name": str(path)}) == 0
    assert _is_wide({"file_name": "", "width": 3, "height": 3}) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_pictures_size_is_that_of_detectron2s_reader(orientation: int, tmp_path: Path) -> None:
    path = str(tmp_path / "a.jpg")
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 4)).save(path, exif=exif)
    height, width = read_image(path, "RGB").shape[:2]
    with Image.open(path) as picture:
        assert upright_size(picture) == (width, height)
    assert _is_wide({"file_name": path}) == int(width > height)


def test_batch_size_error(make_config: Callable[..., CfgNode]) -> None:
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH is 0"):
        build_train_loader(make_config(SOLVER__IMS_PER_BATCH=0))


def test_derived_seeds_differ() -> None:
    seeds = {derive_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125 and derive_seed(1, 2) == derive_seed(1, 2)
