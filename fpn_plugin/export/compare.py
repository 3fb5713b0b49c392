"""Whether an exported file gives what the model gives eagerly, at several sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import List, Sequence

import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from PIL import Image
from torch import Tensor

from fpn_plugin.export.formats import Runner
from fpn_plugin.export.subject import Subject

# of an output's largest value: some hundred float32 operations in another order; in a detector
# what is found hangs on them
TOLERANCE = {"backbone": 1e-4, "detector": 1e-3}
_CLASS = 1e5  # pixels: boxes of other classes are far apart


@dataclass(frozen=True)
class Difference:
    """How far file and model are apart for one input.

    Attributes:
        shape: of the input.
        relative: the largest difference, as a part of the largest value of that output.
        absolute: the largest difference.
        output: the output with the largest relative difference.
        found: how many detections there are; None for a backbone.
    """

    shape: tuple[int, ...]
    relative: float
    absolute: float
    output: str
    found: int | None

    def __str__(self) -> str:
        found = "" if self.found is None else f", {self.found} detections"
        return (
            f"{'x'.join(map(str, self.shape))}{found}: largest difference {self.relative:.1e} of"
            f" the largest value, {self.absolute:.1e} absolute ({self.output})"
        )


def make_inputs(
    subject: Subject, sizes: Sequence[tuple[int, int]], batch: int, photos: Sequence[Path]
) -> List[Tensor]:
    """An input of each size: photos in turn if there are any, else random images.

    Args:
        batch: 0 for 1, 2, 3, … in turn.
    """
    made = []
    for number, size in enumerate(sizes):
        image = subject.example(size, batch or 1 + number % 3)
        if photos:
            pixels = _read(photos[number % len(photos)], size, subject.info["format"])
            if subject.what == "detector":
                image = pixels
            else:
                image = subject.normalise(pixels).expand_as(image).contiguous()
        made.append(image)
    return made


def _read(path: Path, size: tuple[int, int], order: str) -> Tensor:
    """A photo, brought to a size: `(3, H, W)`, from 0 to 255."""
    picture = Image.fromarray(read_image(str(path), "RGB")).resize(size[::-1])
    pixels = np.asarray(picture, np.float32)
    pixels = pixels[:, :, ::-1] if order == "BGR" else pixels
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def compare(subject: Subject, run: Runner, images: Sequence[Tensor]) -> List[Difference]:
    """Run the file and the model on the same images.

    Raises:
        ValueError: if they give other outputs or differ by more than `TOLERANCE`, or if nothing is
            detected in any image, so that there is nothing to compare.
    """
    found = [_difference(subject, subject.run(image), run(image), image) for image in images]
    limit = TOLERANCE[subject.what]
    bad = [item for item in found if not item.relative <= limit]  # a NaN is bad too
    if bad:
        hint = ""
        if subject.what == "detector":
            hint = " (a model hardly trained finds many boxes of one score, and chance chooses)"
        raise ValueError(
            f"the exported model differs from the eager one: {'; '.join(map(str, bad))}; up to"
            f" {limit:.0e} is rounding{hint}. Nothing was written"
        )
    if all(item.found == 0 for item in found):
        raise ValueError(
            "nothing is detected in the images of the comparison, so it compares nothing: give"
            " photos with objects by --input, or a lower score threshold in the config"
        )
    return found


def _pair(subject: Subject, wanted: Sequence[Tensor], given: Sequence[Tensor]) -> List[Tensor]:
    """A detector's detections in the order of the wanted ones, as scores that are equal up to
    rounding may change places; as they are if they are not the same ones."""
    rows = []
    for outputs in (wanted, given):
        named = dict(zip(subject.outputs, outputs))
        rows.append(torch.cat([named["pred_boxes"], named["pred_classes"][:, None] * _CLASS], 1))
    order = torch.cdist(rows[0].double(), rows[1].double()).argmin(1)
    same = len(set(order.tolist())) == len(order)
    return [y[order] for y in given] if same else list(given)


def _difference(
    subject: Subject, wanted: Sequence[Tensor], given: Sequence[Tensor], image: Tensor
) -> Difference:
    shape = tuple(image.shape)
    sizes = [[tuple(y.shape) for y in maps] for maps in (wanted, given)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the exported model gives {sizes[1]} for an input {list(shape)}, the eager one"
            f" {sizes[0]} ({', '.join(subject.outputs)}). Nothing was written"
        )
    if subject.what == "detector" and len(wanted[0]):
        given = _pair(subject, wanted, given)
    worst = (0.0, 0.0, subject.outputs[0])
    for name, one, two in zip(subject.outputs, wanted, given):
        if one.numel():
            apart = float((one.double() - two.double()).abs().max())
            largest = max(float(one.double().abs().max()), 1e-12)
            # classes are names: one beside the right one is no small difference
            relative = apart / largest if one.is_floating_point() else apart
            worst = max(worst, (relative if relative == relative else float("inf"), apart, name))
    count = len(wanted[0]) if subject.what == "detector" else None
    return Difference(shape, *worst, count)
