"""The training loader: Detectron2's samplers and mapper, resumable at any iteration.

The sampler decides which images make a batch before any image is read, and a sample's augmentation
is seeded by its position in the sampler's order. So the batches are a function of the run's seed
and the iteration, for any number of workers, and a resumed run skips finished batches without
loading them.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import torch.utils.data as torchdata
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.utils import comm
from PIL import Image

from fpn_plugin.data.coco_records import with_masks
from fpn_plugin.data.copy_paste import CopyPaste
from fpn_plugin.data.image_checks import READ_ERRORS, upright_size
from fpn_plugin.data.mapper import Mapper
from fpn_plugin.data.shared_records import one_copy_per_host
from fpn_plugin.engine.faults.skipping import KEY, SKIPPED, ImageError, check_on_error, image_fault
from fpn_plugin.engine.preflight import check_batch
from fpn_plugin.engine.rng import SAMPLE_STREAM, derive_seed, seeded

logger = logging.getLogger(__name__)

_MAPPER_TRIES = 100


class SampleKey(NamedTuple):
    """One sample of this process.

    Attributes:
        position: in the sampler's order; no two samples of a run share it.
        image: its index in the dataset.
    """

    position: int
    image: int


class ResumableSampler(torchdata.Sampler):
    """Yields the keys of whole batches, starting at any batch.

    Args:
        sampler: an endless sampler of this process's indices that gives the same order each time it
            is iterated, as Detectron2's training samplers do.
        batch_size: images per batch of this process.
        groups: the group of every dataset index, if a batch shall hold images of one group only.

    Attributes:
        start_batch: how many batches the run has done; to be set before iteration.
    """

    def __init__(
        self, sampler: torchdata.Sampler, batch_size: int, groups: Sequence[int] | None = None
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.groups = groups
        self.start_batch = 0

    def __iter__(self) -> Iterator[SampleKey]:
        for number, batch in enumerate(self._batches()):
            if number >= self.start_batch:
                yield from batch

    def _batches(self) -> Iterator[list[SampleKey]]:
        buckets: dict[int, list[SampleKey]] = {}
        for position, index in enumerate(self.sampler):
            group = self.groups[index] if self.groups is not None else 0
            bucket = buckets.setdefault(group, [])
            bucket.append(SampleKey(position, index))
            if len(bucket) == self.batch_size:
                del buckets[group]
                yield bucket


class SeededDataset(torchdata.Dataset):
    """Maps a key to a training sample, seeded by the key's position.

    Detectron2's MapDataset does not do: the image with which it replaces one that the mapper
    refuses (returns None for) depends on what the worker did before. Here it is drawn from the
    sample's seed, too.

    Args:
        dataset: dataset dicts by index.
        mapper: a dataset dict -> the model's input, or None to refuse the image.
        seed: the run's seed.
        skip: whether an image that cannot be read counts as refused. The sample that replaces it
            has pairs of file and error under "skipped".
        paste: puts objects of another image on each, if it is given.
    """

    def __init__(
        self,
        dataset: torchdata.Dataset,
        mapper: Callable[[dict], Any],
        seed: int,
        skip: bool = False,
        paste: CopyPaste | None = None,
    ) -> None:
        self.dataset = dataset
        self.mapper = mapper
        self.seed = seed
        self.skip = skip
        self.paste = paste
        self.rank = comm.get_rank()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: SampleKey) -> Any:
        skipped: list[tuple[str, str]] = []
        for attempt in range(_MAPPER_TRIES):
            # The seed also chooses the image that replaces a refused one.
            seed = derive_seed(self.seed, SAMPLE_STREAM, self.rank, key.position, attempt)
            index = key.image if attempt == 0 else seed % len(self)
            with seeded(seed):
                sample = self._pasted(self._map(index, skipped), skipped)
            if sample is not None:
                return {**sample, SKIPPED: skipped} if skipped else sample
        first = f" ({': '.join(skipped[0])})" if skipped else ""
        raise ValueError(
            f"the mapper refused {_MAPPER_TRIES} images in a row, the first at index {key.image}"
            f"{first}"
        )

    def _pasted(self, sample: Any, skipped: list[tuple[str, str]]) -> Any:
        """A sample with objects of another image; as it was if that is refused or skipped."""
        if self.paste is None or sample is None:
            return sample
        partner = self.paste.draw_partner(len(self))
        other = None if partner is None else self._map(partner, skipped)
        return sample if other is None else self.paste(sample, other)

    def _map(self, index: int, skipped: list[tuple[str, str]]) -> Any:
        """The sample of an image, or None if the image is refused or skipped."""
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
    """Detectron2's `build_detection_train_loader`, but resumable by :func:`start_at`.

    Args:
        cfg: with a `SEED` that is not negative; Detectron2's keys keep their meaning.
        mapper: by default our Mapper for training.

    Returns:
        A DataLoader of lists of mapped samples.

    Raises:
        ValueError: if SOLVER.IMS_PER_BATCH is no multiple of the number of processes times that of
            parts (SOLVER.ACCUMULATE), no image is left to train on, or a key of DATALOADER does not
            fit.
        KeyError: if DATALOADER.ON_ERROR is unknown.
    """
    batch_size = _batch_per_process(cfg)
    skip = check_on_error(cfg.DATALOADER.ON_ERROR) == "skip"
    dataset = one_copy_per_host(lambda: load_training_dicts(cfg), cfg.DATASETS.TRAIN)
    mapper = mapper or Mapper(cfg, is_train=True)
    paste = _copy_paste(cfg)
    if isinstance(dataset, torchdata.IterableDataset):
        if paste is not None:
            raise ValueError(
                f"INPUT.COPY_PASTE.ENABLED: True takes objects of any training image, but"
                f" DATASETS.TRAIN {cfg.DATASETS.TRAIN} is a stream: set it to False"
            )
        if skip:
            raise ValueError(f"{KEY} 'skip': DATASETS.TRAIN {cfg.DATASETS.TRAIN} is a stream")
        logger.warning(
            "DATASETS.TRAIN %s is a stream: a resumed run starts it over", cfg.DATASETS.TRAIN
        )
        return build_detection_train_loader(
            cfg, mapper=mapper, dataset=dataset, **loader_options(cfg)
        )
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    groups = [_aspect_group(record) for record in dataset] if grouped else None
    sampler = ResumableSampler(_detectron2_sampler(cfg, dataset), batch_size, groups)
    return build_detection_train_loader(
        SeededDataset(dataset, mapper, cfg.SEED, skip, paste),
        mapper=None,
        sampler=sampler,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=cfg.SEED,  # otherwise the loader draws from the training step's generator
        **loader_options(cfg),
    )


def _copy_paste(cfg: CfgNode) -> CopyPaste | None:
    keys = cfg.INPUT.COPY_PASTE
    return CopyPaste(keys.PROB, keys.MAX_OBJECTS, keys.MIN_VISIBLE) if keys.ENABLED else None


def loader_options(cfg: CfgNode) -> dict[str, Any]:
    """The keyword arguments of torch's DataLoader that our keys of `DATALOADER` set.

    Raises:
        ValueError: if a key is negative, or is for workers and there are none.
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
    """Make a loader of :func:`build_train_loader` start with the batch of this iteration."""
    sampler = getattr(getattr(loader, "dataset", None), "sampler", None)
    if isinstance(sampler, ResumableSampler):
        sampler.start_batch = iteration


def load_training_dicts(cfg: CfgNode) -> Any:
    """The dataset dicts of `DATASETS.TRAIN`, filtered as `DATALOADER` and `MODEL` ask.

    Raises:
        ValueError: if none is left to train on.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    try:
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=filter_empty,
            min_keypoints=keypoints,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except AssertionError as error:  # Detectron2's error for a dataset without images
        names = tuple(cfg.DATASETS.TRAIN)
        raise ValueError(f"DATASETS.TRAIN {names}: {error}{_lost_objects(cfg)}") from error
    if cfg.MODEL.MASK_ON and isinstance(records, list):
        records = with_masks(records, filter_empty, cfg.DATASETS.CHECK == "off")
        if not records:
            raise ValueError(
                f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}: no object has a mask, which"
                " MODEL.MASK_ON needs"
            )
    return records


def _lost_objects(cfg: CfgNode) -> str:
    """Why no image is left to train on, as far as the dataset dicts tell."""
    records = [record for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name)]
    objects = [annotation for record in records for annotation in record.get("annotations", [])]
    crowds = sum(annotation.get("iscrowd", 0) != 0 for annotation in objects)
    text = f" {len(records)} images were loaded with {len(objects)} objects"
    if crowds:
        text += f", of which {crowds} are crowds (iscrowd is not 0), which training leaves out"
    if cfg.MODEL.KEYPOINT_ON:
        least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        text += (
            f"; images with under {least} visible keypoints are left out (MIN_KEYPOINTS_PER_IMAGE)"
        )
    if not objects:
        text += " (Detectron2's loader drops those whose polygons have under three points)"
    return text


def _detectron2_sampler(cfg: CfgNode, dataset: Any) -> torchdata.Sampler:
    """Detectron2's sampler of `DATALOADER.SAMPLER_TRAIN`, seeded by the run's seed.

    Not all of its samplers accept a seed; the others draw one from numpy, so numpy is seeded.
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
    check_batch("SOLVER.IMS_PER_BATCH", total, processes, cfg.SOLVER.ACCUMULATE)
    return total // processes


def _aspect_group(record: dict[str, Any]) -> int:
    """Detectron2's aspect ratio group: 1 for an image that is wider than high, else 0."""
    if "width" in record and "height" in record:
        return int(record["width"] > record["height"])
    with Image.open(record["file_name"]) as image:
        width, height = upright_size(image)
    return int(width > height)
