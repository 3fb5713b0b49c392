"""The images that are shown, and what a model makes of each."""

from __future__ import annotations

import contextlib
import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import nn

from fpn_plugin.data.classes import check_test_classes, model_classes
from fpn_plugin.data.deep_images import read_image
from fpn_plugin.data.image_checks import READ_ERRORS, read_fault
from fpn_plugin.data.keypoints import dataset_keypoints, model_keypoints
from fpn_plugin.data.mapper import Mapper
from fpn_plugin.registry import HOW_TO_ADD, unknown_name
from fpn_plugin.visualize.levels import FIELD, record_levels
from fpn_plugin.visualize.maps import RecordedMaps, record_maps

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

Record = Mapping[str, Any]  # one of Detectron2's dataset dicts; `file_name` is all that it needs


def find_images(inputs: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The images that files, folders (not those below them) and patterns name, each once.

    Args:
        suffixes: of the files that count in folders and patterns.

    Raises:
        FileNotFoundError: naming the input that is or has no image.
    """
    images: dict[Path, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_file():
            files = [path]
        else:
            matches = (
                path.iterdir() if path.is_dir() else map(Path, glob.glob(name, recursive=True))
            )
            files = sorted(match for match in matches if match.suffix.lower() in suffixes)
        if not files:
            raise FileNotFoundError(
                f"--input {name!r}: no such image, or none in it ({', '.join(suffixes)})"
            )
        images.update(dict.fromkeys(files))
    return list(images)


def dataset_records(name: str, num: int) -> list[dict[str, Any]]:
    """At most `num` images of a registered dataset, evenly spread, with their annotations.

    Raises:
        KeyError: if there is no such dataset.
        ValueError: if `num` is not positive.
    """
    if num < 1:
        raise ValueError(f"--num: {num} is not a number of images of 1 or more")
    return spread(all_records(name), num)


def all_records(dataset: str, flag: str = "--dataset") -> list[dict[str, Any]]:
    """All records of a registered dataset.

    Args:
        flag: that named it, for messages.

    Raises:
        KeyError: if there is no such dataset.
    """
    if dataset not in DatasetCatalog.list():
        raise unknown_name(flag, dataset, DatasetCatalog.list(), advice=HOW_TO_ADD)
    return DatasetCatalog.get(dataset)


def spread(records: Sequence[dict[str, Any]], num: int) -> list[dict[str, Any]]:
    """At most `num` of the images, evenly spread; images without objects only if all are."""
    candidates = [record for record in records if record.get("annotations")] or list(records)
    count = min(num, len(candidates))
    return [candidates[(2 * i + 1) * len(candidates) // (2 * count)] for i in range(count)]


def records_of(
    paths: Sequence[Path], datasets: Sequence[str], cfg: CfgNode | None = None
) -> list[dict[str, Any]]:
    """A record for each file: that of a dataset which has the file, else one without annotations.

    Datasets whose files are not there are skipped: their images then have no ground truth.

    Args:
        cfg: of the model, whose classes those of the datasets that have the files must be.

    Raises:
        ValueError: with both lists of classes.
    """
    wanted = {os.path.realpath(path) for path in paths}
    known: dict[str, dict[str, Any]] = {}
    for name in datasets:
        try:
            records = DatasetCatalog.get(name)
        except (FileNotFoundError, KeyError):
            continue
        files = {os.path.realpath(record["file_name"]): record for record in records}
        present = {path: record for path, record in files.items() if path in wanted}
        if present and cfg is not None:
            check_test_classes(cfg, name)
        known.update(present)
    return [known.get(os.path.realpath(path), {"file_name": str(path)}) for path in paths]


def without_unreadable(
    records: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The records whose images can be read, and a line for each of the others.

    Args:
        read: raises one of `READ_ERRORS` for a bad image; what it returns does not count.
    """
    good, faults = [], []
    for record in records:
        try:
            read(record)
        except READ_ERRORS as error:
            faults.append(f"{record['file_name']} ({type(error).__name__}: {read_fault(error)})")
        else:
            good.append(record)
    return good, faults


def report_unreadable(faults: Sequence[str], drawn: int, output: Path) -> None:
    """Say at the end which images are not among the pictures.

    Raises:
        ValueError: naming them, if there are any.
    """
    if faults:
        others = f"; the other {drawn} are in {output}" if drawn else ""
        raise ValueError(f"{len(faults)} images cannot be read: {'; '.join(faults)}{others}")


def class_names(datasets: Sequence[str], cfg: CfgNode | None = None) -> list[str]:
    """The names of the model's classes, else those of the first dataset that has them."""
    if cfg is not None and (classes := model_classes(cfg)):
        return list(classes.names)
    for name in datasets:
        if names := MetadataCatalog.get(name).get("thing_classes"):
            return list(names)
    return []


def skeleton(datasets: Sequence[str], cfg: CfgNode | None = None) -> list[tuple[int, int]]:
    """The pairs of keypoints' indices that a line joins: the model's, else the first dataset's."""
    known = [model_keypoints(cfg)] if cfg is not None else []
    for keypoints in (*known, *map(dataset_keypoints, datasets)):
        if keypoints:
            index = keypoints.names.index
            return [(index(one), index(other)) for one, other in keypoints.skeleton]
    return []


@dataclass(frozen=True)
class InspectedImage:
    """One image, and what a model made of it.

    Attributes:
        name: of the image, for titles.
        pixels: `(H, W, 3)`, RGB, 0 to 255.
        detections: in pixels of the image, on the CPU; with `pred_levels` if the levels are known.
        annotations: Detectron2's; None if the ground truth is unknown.
        maps: the pyramid's.
        size: height and width that the model saw the image at.
    """

    name: str
    pixels: np.ndarray
    detections: Instances
    annotations: Sequence[Mapping[str, Any]] | None
    maps: RecordedMaps
    size: tuple[int, int]

    def levels(self) -> list[int] | None:
        """The level of each detection, or None if they are unknown."""
        return self.detections.get(FIELD).tolist() if self.detections.has(FIELD) else None


@torch.no_grad()
def inspect_image(model: Any, mapper: Mapper, record: Record) -> InspectedImage:
    """Run a model on an image, and record the levels and maps.

    The model and the states of the random number generators are left as they were.

    Args:
        model: a detector, without any wrapper.
        mapper: for tests, from a record to the model's input.
    """
    path = record["file_name"]
    model_input = mapper(dict(record))
    with _evaluation_mode(model), record_levels(model), record_maps(model.backbone) as maps:
        output = model([model_input])[0]
    height, width = model_input["image"].shape[-2:]
    pixels = read_image(path, "RGB", mapper.deep_images)
    detections = detections_of(output, pixels.shape[:2])
    annotations = record.get("annotations")
    return InspectedImage(Path(path).name, pixels, detections, annotations, maps, (height, width))


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, all of the model is in evaluation mode; after it, each module in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def detections_of(output: Mapping[str, Any], size: tuple[int, int]) -> Instances:
    """The detections; of RPN alone its proposals as objects of one class; else none."""
    if "instances" in output:
        return output["instances"].to("cpu")
    detections = Instances(size)
    proposals = output.get("proposals")
    boxes = torch.zeros(0, 4) if proposals is None else proposals.proposal_boxes.tensor.cpu()
    logits = torch.zeros(0) if proposals is None else proposals.objectness_logits.cpu()
    detections.pred_boxes = Boxes(boxes)
    detections.scores = logits.float().sigmoid()
    detections.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    return detections
