"""One image, and all that a model makes of it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from detectron2.data import detection_utils as utils
from detectron2.structures import Boxes, Instances
from torch import nn

from fpn_plugin.analysis.visualize.levels import FIELD, recorded_levels
from fpn_plugin.analysis.visualize.maps import Recorded, recorded_maps

Record = Mapping[str, Any]  # one of Detectron2's dataset dicts; `file_name` is all that it needs
Mapper = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Seen:
    """One image, and what a model made of it.

    Attributes:
        name: of the image, for titles.
        pixels: `(H, W, 3)`, RGB, 0 to 255.
        found: the detections, in pixels of the image, on the CPU; with `pred_levels` if the levels
            are known.
        truth: Detectron2's annotations; None if nobody knows.
        maps: the pyramid's.
        size: height and width that the model saw the image at.
    """

    name: str
    pixels: np.ndarray
    found: Instances
    truth: Sequence[Mapping[str, Any]] | None
    maps: Recorded
    size: tuple[int, int]

    def levels(self) -> list[int] | None:
        """The level of each detection, or None if they are unknown."""
        return self.found.get(FIELD).tolist() if self.found.has(FIELD) else None


@torch.no_grad()
def look(model: Any, mapper: Mapper, record: Record) -> Seen:
    """Run a model on an image and watch it.

    The model and the generators of random numbers are left as they were.

    Args:
        model: a detector, without any wrapper.
        mapper: makes a model's input of a record: Detectron2's `DatasetMapper` for tests.
    """
    path = record["file_name"]
    item = mapper(dict(record))
    with evaluating(model), recorded_levels(model), recorded_maps(model.backbone) as maps:
        output = model([item])[0]
    height, width = item["image"].shape[-2:]
    pixels = utils.read_image(path, "RGB")
    found = _instances(output, pixels.shape[:2])
    truth = record.get("annotations")
    return Seen(Path(path).name, pixels, found, truth, maps, (height, width))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all of the model is in evaluation mode; after it, each part in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _instances(output: Mapping[str, Any], size: tuple[int, int]) -> Instances:
    """What was found: objects; for RPN alone its proposals as objects of one class; else none."""
    if "instances" in output:
        return output["instances"].to("cpu")
    found = Instances(size)
    proposals = output.get("proposals")
    boxes = torch.zeros(0, 4) if proposals is None else proposals.proposal_boxes.tensor.cpu()
    logits = torch.zeros(0) if proposals is None else proposals.objectness_logits.cpu()
    found.pred_boxes = Boxes(boxes)
    found.scores = logits.float().sigmoid()
    found.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    return found
