"""Checks that an exported file computes what the eager model computes, at several sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Mapping, Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, pairwise_iou
from PIL import Image
from torch import Tensor

from fpn_plugin.data.deep_images import read_image
from fpn_plugin.data.image_checks import READ_ERRORS, read_fault
from fpn_plugin.export.model import ExportModel
from fpn_plugin.export.openvino_ir import Runner

# relative to an output's largest value: some hundred float32 operations run in another order, and a
# detector's choice of boxes amplifies the difference
TOLERANCE = {"backbone": 1e-4, "detector": 1e-3}
# In a coarser type the maps of a backbone may be off by a root mean square of so much of their own.
# A bfloat16 has 8 bits: an R50-FPN is off by 1%; with 8-bit integers by 4%.
COARSE = {"bf16": 0.1, "int8": 0.3}
# ... and of a detector so many detections at least must be the same. AP says what that costs.
SAME = {"bf16": 0.5, "int8": 0.25}
_SAME_IOU = 0.5
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
        rms: the root mean square of a map's difference by that of the map, the largest of all maps;
            None for a detector.
        same: of a detector in a coarser type the share of detections with the same class and an
            IoU of 0.5 or more; None where all numbers are compared.
    """

    shape: tuple[int, ...]
    relative: float
    absolute: float
    output: str
    found: int | None
    rms: float | None = None
    same: float | None = None

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        if self.same is not None:
            return f"{shape}, {self.found} detections: {self.same:.0%} are the same"
        found = "" if self.found is None else f", {self.found} detections"
        rms = "" if self.rms is None else f", root mean square {self.rms:.1e} of the map's"
        return (
            f"{shape}{found}: largest difference {self.relative:.1e} of"
            f" the largest value, {self.absolute:.1e} absolute ({self.output}){rms}"
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
            pixels = read_resized(photos[number % len(photos)], size, model.info)
            if model.what == "detector":
                image = pixels
            else:
                image = model.normalise(pixels).expand_as(image).contiguous()
        inputs.append(image)
    return inputs


def read_resized(
    path: Path, size: tuple[int, int], info: Mapping[str, Any], flag: str = "--input"
) -> Tensor:
    """A photo as the model takes it, resized to `(C, H, W)`.

    Args:
        flag: that named it, for messages.

    Raises:
        ValueError: naming the photo, if it cannot be read.
    """
    try:
        pixels = read_image(str(path), info["format"], info["deep_images"])
    except READ_ERRORS as error:
        raise ValueError(f"{flag} {str(path)!r} cannot be read: {read_fault(error)}") from error
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
    # channel by channel, as Pillow has no images of several float channels
    channels = [
        np.asarray(Image.fromarray(channel).resize(size[::-1]), np.float32)
        for channel in np.ascontiguousarray(pixels.transpose(2, 0, 1))
    ]
    return torch.from_numpy(np.stack(channels))


def verify(
    model: ExportModel, run: Runner, images: Sequence[Tensor], precision: str = "float32"
) -> List[Difference]:
    """Run the file and the model on the same images.

    Args:
        precision: what the file computes in.

    Raises:
        ValueError: if the shapes of their outputs differ, the values differ by more than
            `TOLERANCE`, `COARSE` or `SAME`, or nothing is detected in any image, so that nothing
            is compared.
    """
    compare = _overlap if model.what == "detector" and precision in SAME else _difference
    differences = [compare(model, model.run(image), run(image), image) for image in images]
    if all(difference.found == 0 for difference in differences):
        raise ValueError(
            "nothing is detected in the images of the comparison, so it compares nothing: give"
            " photos with objects by --input, or a lower score threshold in the config"
        )
    if precision in COARSE:
        _check_coarse(differences, precision)
        return differences
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
    return differences


def _check_coarse(differences: Sequence[Difference], precision: str) -> None:
    """Refuse what is wrong, not rounded."""
    texts = "; ".join(map(str, differences))
    shares = [(d.same, d.found) for d in differences if d.same is not None and d.found]
    if shares:
        same = sum(share * count for share, count in shares) / sum(count for _, count in shares)
        if not same >= SAME[precision]:
            raise ValueError(
                f"the exported model finds other objects than the eager one: {texts}; with"
                f" --precision {precision} {SAME[precision]:.0%} are expected. Nothing was written"
            )
    elif not all(d.rms is not None and d.rms <= COARSE[precision] for d in differences):  # or NaN
        raise ValueError(
            f"the exported model differs from the eager one: {texts}; a root mean square of"
            f" {COARSE[precision]:g} is expected of --precision {precision}. Nothing was written"
        )


def _overlap(
    model: ExportModel, expected: Sequence[Tensor], actual: Sequence[Tensor], image: Tensor
) -> Difference:
    """The share of the detections of each that the other has too, the lower one."""
    pairs = [dict(zip(model.outputs, outputs)) for outputs in (expected, actual)]
    boxes = [Boxes(fields["pred_boxes"].float()) for fields in pairs]
    classes = [fields["pred_classes"].long() for fields in pairs]
    same = pairwise_iou(*boxes) >= _SAME_IOU
    same &= classes[0][:, None] == classes[1][None]
    shares = [
        float(same.any(axis).float().mean()) if same.shape[1 - axis] else 0.0 for axis in (0, 1)
    ]
    counts = [len(found) for found in classes]
    share = min(shares) if all(counts) else float(not any(counts))
    return Difference(tuple(image.shape), 0.0, 0.0, "", max(counts), same=share)


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
    worst, rms = (0.0, 0.0, model.outputs[0]), 0.0
    for name, x, y in zip(model.outputs, expected, actual):
        if x.numel():
            absolute = float((x.double() - y.double()).abs().max())
            largest = max(float(x.double().abs().max()), 1e-12)
            # class ids are not numbers: the next one is just as wrong as any other
            relative = absolute / largest if x.is_floating_point() else absolute
            relative = relative if relative == relative else float("inf")  # NaN
            worst = max(worst, (relative, absolute, name))
            rms = max(rms, _root_mean_square(x, y))
    if model.what == "detector":
        return Difference(shape, *worst, len(expected[0]))
    return Difference(shape, *worst, None, rms)


def _root_mean_square(expected: Tensor, actual: Tensor) -> float:
    """Of the difference, relative to that of the expected values; infinite for NaN."""
    x, y = expected.double(), actual.double()
    value = float((x - y).square().mean().sqrt() / x.square().mean().sqrt().clamp(min=1e-12))
    return value if value == value else float("inf")
