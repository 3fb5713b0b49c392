"""The training loader: Detectron2's samplers and mapper, able to go on at any iteration.

Which images make a batch is decided in the sampler, before any image is read, and what a sample's
augmentation draws follows from its position alone. So the batches are a function of the run's seed
and the iteration, for any number of workers; a resumed run skips what is done without loading it.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import torch.utils.data as torchdata
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.utils import comm
from PIL import Image

from fpn_plugin.data.image_checks import READ_ERRORS, upright_size
from fpn_plugin.engine.faults.skipping import KEY, SKIPPED, ImageError, check_on_error, image_fault
from fpn_plugin.engine.rng import SAMPLE_STREAM, derive_seed, seeded

logger = logging.getLogger(__name__)

_MAPPER_TRIES = 100


class Token(NamedTuple):
    """A sample of this process: its position in the sampler's order, its index in the dataset."""

    position: int
    item: int


class ResumableSampler(torchdata.Sampler):
    """Yields the tokens of whole batches, from any batch on.

    Args:
        sampler: an endless sampler of this process's indices that starts over, in the same order,
            each time it is iterated; Detectron2's training samplers do.
        batch_size: images per batch of this process.
        groups: the group of every dataset index; a batch holds images of one group. None: no
            grouping.
    """

    def __init__(
        self, sampler: torchdata.Sampler, batch_size: int, groups: Sequence[int] | None = None
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.groups = groups
        # Set before iteration: how many batches the run has done.
        self.start_batch = 0

    def __iter__(self) -> Iterator[Token]:
        for number, batch in enumerate(self._batches()):
            if number >= self.start_batch:
                yield from batch

    def _batches(self) -> Iterator[list[Token]]:
        buckets: dict[int, list[Token]] = {}
        for position, index in enumerate(self.sampler):
            group = self.groups[index] if self.groups is not None else 0
            bucket = buckets.setdefault(group, [])
            bucket.append(Token(position, index))
            if len(bucket) == self.batch_size:
                del buckets[group]
                yield bucket


class SeededDataset(torchdata.Dataset):
    """Maps a token to a training sample, with a seed that follows from the token.

    Detectron2's MapDataset is not used because its replacement for a sample that the mapper
    refuses (returns None for) depends on what the worker did before; here it is drawn from the
    token's seed as well.

    Args:
        dataset: dataset dicts by index.
        mapper: a dataset dict -> the model's input, or None to refuse it.
        seed: the run's seed.
        skip: whether an image that cannot be read is treated as if it were refused. The sample that
            comes in its place has the files and their errors under "skipped".
    """

    def __init__(
        self,
        dataset: torchdata.Dataset,
        mapper: Callable[[dict], Any],
        seed: int,
        skip: bool = False,
    ) -> None:
        self.dataset = dataset
        self.mapper = mapper
        self.seed = seed
        self.skip = skip
        self.rank = comm.get_rank()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, token: Token) -> Any:
        skipped: list[tuple[str, str]] = []
        for attempt in range(_MAPPER_TRIES):
            # The seed covers which image replaces a refused one, so a retry needs its own.
            seed = derive_seed(self.seed, SAMPLE_STREAM, self.rank, token.position, attempt)
            index = token.item if attempt == 0 else seed % len(self)
            with seeded(seed):
                sample = self._map(index, skipped)
            if sample is not None:
                return {**sample, SKIPPED: skipped} if skipped else sample
        first = f" ({': '.join(skipped[0])})" if skipped else ""
        raise ValueError(
            f"the mapper refused {_MAPPER_TRIES} images in a row, the first at index {token.item}"
            f"{first}"
        )

    def _map(self, index: int, skipped: list[tuple[str, str]]) -> Any:
        """The sample of an image, or None."""
        try:
            return self.mapper(self.dataset[index])
        except READ_ERRORS as error:
            fault = image_fault(error)
            if fault is None:
                raise
            file = str(self.dataset[index].get("file_name", "without a file"))
            if not self.skip:
                raise ImageError(
                    f"training image {file} (index {index} of DATASETS.TRAIN) cannot be used:"
                    f" {fault}. Repair or remove it, or set {KEY} to 'skip'"
                ) from error
            skipped.append((file, fault))
            return None


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], Any] | None = None) -> Any:
    """Detectron2's `build_detection_train_loader`, resumable: see the module's docstring.

    Args:
        cfg: with `SEED` not negative; Detectron2's keys keep their meaning.
        mapper: by default Detectron2's DatasetMapper for training.

    Returns:
        a DataLoader that gives lists of mapped samples; pass it to :func:`start_at` before it is
        iterated.

    Raises:
        ValueError: if SOLVER.IMS_PER_BATCH is no multiple of the number of processes, or a key of
            DATALOADER does not fit.
        KeyError: if DATALOADER.ON_ERROR is unknown.
    """
    batch_size = _batch_per_process(cfg)
    skip = check_on_error(cfg.DATALOADER.ON_ERROR) == "skip"
    dataset = _training_dicts(cfg)
    mapper = mapper or DatasetMapper(cfg, is_train=True)
    if isinstance(dataset, torchdata.IterableDataset):
        if skip:
            raise ValueError(f"{KEY} 'skip': DATASETS.TRAIN {cfg.DATASETS.TRAIN} is a stream")
        logger.warning(
            "DATASETS.TRAIN %s is a stream: a resumed run starts it over", cfg.DATASETS.TRAIN
        )
        return build_detection_train_loader(cfg, mapper=mapper, dataset=dataset, **_options(cfg))
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    groups = [_is_wide(record) for record in dataset] if grouped else None
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    sampler = ResumableSampler(_detectron2_sampler(cfg, dataset), batch_size, groups)
    return build_detection_train_loader(
        SeededDataset(dataset, mapper, cfg.SEED, skip),
        mapper=None,
        sampler=sampler,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        # Without a generator of its own the loader would draw from the training step's.
        seed=cfg.SEED,
        **_options(cfg),
    )


def _options(cfg: CfgNode) -> dict[str, Any]:
    """What of `DATALOADER` torch's DataLoader is given beside Detectron2's own arguments.

    Raises:
        ValueError: naming the key, if it is for workers and there are none, or is negative.
    """
    loader = cfg.DATALOADER
    options: dict[str, Any] = {"pin_memory": loader.PIN_MEMORY}
    if loader.PREFETCH_FACTOR < 0:
        raise ValueError(f"DATALOADER.PREFETCH_FACTOR: {loader.PREFETCH_FACTOR} is negative")
    for key, name in (
        ("PERSISTENT_WORKERS", "persistent_workers"),
        ("PREFETCH_FACTOR", "prefetch_factor"),
    ):
        if not loader[key]:
            continue
        if loader.NUM_WORKERS == 0:
            raise ValueError(
                f"DATALOADER.{key} {loader[key]} is for workers, but DATALOADER.NUM_WORKERS is 0"
            )
        options[name] = loader[key]
    return options


def start_at(loader: Any, iteration: int) -> None:
    """Let a loader of :func:`build_train_loader` begin with the batch of this iteration."""
    sampler = getattr(getattr(loader, "dataset", None), "sampler", None)
    if isinstance(sampler, ResumableSampler):
        sampler.start_batch = iteration


def _training_dicts(cfg: CfgNode) -> Any:
    """The records of `DATASETS.TRAIN`.

    Raises:
        ValueError: if none is left that could be trained on.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    try:
        return get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except AssertionError as error:  # Detectron2's word for a dataset that nothing is left of
        raise ValueError(f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}: {error}") from error


def _detectron2_sampler(cfg: CfgNode, dataset: Any) -> torchdata.Sampler:
    """Detectron2's sampler of `DATALOADER.SAMPLER_TRAIN`, with every seed from the run's.

    Only some of its samplers can be given a seed; the rest draw one from numpy, so it is numpy
    that is seeded.
    """
    with seeded(cfg.SEED):
        loader = build_detection_train_loader(
            cfg,
            mapper=lambda record: record,
            dataset=dataset,
            aspect_ratio_grouping=False,
            num_workers=0,
        )
    return loader.dataset.sampler


def _batch_per_process(cfg: CfgNode) -> int:
    total, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if total < processes or total % processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {total}; "
            f"with {processes} processes choose a multiple of {processes}"
        )
    return total // processes


def _is_wide(record: dict[str, Any]) -> int:
    """1 for an image that is wider than high: Detectron2's two aspect ratio groups."""
    if "width" in record and "height" in record:
        return int(record["width"] > record["height"])
    with Image.open(record["file_name"]) as image:
        width, height = upright_size(image)
    return int(width > height)
