"""Checks that an exported file computes what the eager model computes, at several sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fpn_plugin.data.deep_images import read_image
from fpn_plugin.data.image_checks import READ_ERRORS, read_fault
from fpn_plugin.export.formats import Runner
from fpn_plugin.export.model import ExportModel

# relative to an output's largest value: some hundred float32 operations run in another order, and a
# detector's choice of boxes amplifies the difference
TOLERANCE = {"backbone": 1e-4, "detector": 1e-3}
_CLASS_OFFSET = 1e5  # pixels between boxes of different classes, when detections are matched


@dataclass(frozen=True)
class Difference:
    """The difference between file and model for one input.

    Attributes:
        shape: of the input.
        relative: the largest difference, relative to the largest value of that output.
        absolute: that difference.
        output: the name of that output.
        found: the number of detections; None for a backbone.
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
    model: ExportModel, sizes: Sequence[tuple[int, int]], batch: int, photos: Sequence[Path]
) -> List[Tensor]:
    """An input of each size: of the photos in turn, or random if there are none.

    Args:
        batch: 0 for 1, 2, 3, 1, … in turn.
    """
    inputs = []
    for number, size in enumerate(sizes):
        image = model.example(size, batch or 1 + number % 3)
        if photos:
            pixels = _read(photos[number % len(photos)], size, model.info)
            if model.what == "detector":
                image = pixels
            else:
                image = model.normalise(pixels).expand_as(image).contiguous()
        inputs.append(image)
    return inputs


def _read(path: Path, size: tuple[int, int], info: Mapping[str, Any]) -> Tensor:
    """A photo as the model takes it, resized to `(C, H, W)`.

    Raises:
        ValueError: naming the photo, if it cannot be read.
    """
    try:
        pixels = read_image(str(path), info["format"], info["deep_images"])
    except READ_ERRORS as error:
        raise ValueError(f"--input {str(path)!r} cannot be read: {read_fault(error)}") from error
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
    # channel by channel, as Pillow has no images of several float channels
    channels = [
        np.asarray(Image.fromarray(channel).resize(size[::-1]), np.float32)
        for channel in np.ascontiguousarray(pixels.transpose(2, 0, 1))
    ]
    return torch.from_numpy(np.stack(channels))


def verify(model: ExportModel, run: Runner, images: Sequence[Tensor]) -> List[Difference]:
    """Run the file and the model on the same images.

    Raises:
        ValueError: if the shapes of their outputs differ, the values differ by more than
            `TOLERANCE`, or nothing is detected in any image, so that nothing is compared.
    """
    differences = [_difference(model, model.run(image), run(image), image) for image in images]
    limit = TOLERANCE[model.what]
    bad = [difference for difference in differences if not difference.relative <= limit]  # or NaN
    if bad:
        hint = ""
        if model.what == "detector":
            hint = " (a model hardly trained finds many boxes of one score, and chance chooses)"
        raise ValueError(
            f"the exported model differs from the eager one: {'; '.join(map(str, bad))}; up to"
            f" {limit:.0e} is rounding{hint}. Nothing was written"
        )
    if all(difference.found == 0 for difference in differences):
        raise ValueError(
            "nothing is detected in the images of the comparison, so it compares nothing: give"
            " photos with objects by --input, or a lower score threshold in the config"
        )
    return differences


def _match(
    model: ExportModel, expected: Sequence[Tensor], actual: Sequence[Tensor]
) -> List[Tensor]:
    """The actual detections in the order of the expected ones; as they are if they do not match.

    Detections whose scores are equal up to rounding may change places.
    """
    rows = []
    for outputs in (expected, actual):
        fields = dict(zip(model.outputs, outputs))
        classes = fields["pred_classes"][:, None] * _CLASS_OFFSET
        rows.append(torch.cat([fields["pred_boxes"], classes], 1))
    order = torch.cdist(rows[0].double(), rows[1].double()).argmin(1)
    is_permutation = len(set(order.tolist())) == len(order)
    return [y[order] for y in actual] if is_permutation else list(actual)


def _difference(
    model: ExportModel, expected: Sequence[Tensor], actual: Sequence[Tensor], image: Tensor
) -> Difference:
    shape = tuple(image.shape)
    sizes = [[tuple(y.shape) for y in outputs] for outputs in (expected, actual)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the exported model gives {sizes[1]} for an input {list(shape)}, the eager one"
            f" {sizes[0]} ({', '.join(model.outputs)}). Nothing was written"
        )
    if model.what == "detector" and len(expected[0]):
        actual = _match(model, expected, actual)
    worst = (0.0, 0.0, model.outputs[0])
    for name, x, y in zip(model.outputs, expected, actual):
        if x.numel():
            absolute = float((x.double() - y.double()).abs().max())
            largest = max(float(x.double().abs().max()), 1e-12)
            # class ids are not numbers: the next one is just as wrong as any other
            relative = absolute / largest if x.is_floating_point() else absolute
            relative = relative if relative == relative else float("inf")  # NaN
            worst = max(worst, (relative, absolute, name))
    count = len(expected[0]) if model.what == "detector" else None
    return Difference(shape, *worst, count)
