"""Whether two models give the same outputs: checked before either is timed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Callable, Mapping

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

BIT_EQUAL, FLOAT32 = "bit-equal", "equal within float32 rounding"
DIFFERS, NOT_COMPARED = "differs", "not compared"

FLOAT32_TOLERANCE = 84 * torch.finfo(torch.float32).eps
"""1e-5, times the depth in pyramids: a bound on every single difference as `allclose` has it,
relative to the value plus the root mean square of the reference's map. The roundings of one output
convolution's 9·256 products add up to 48 epsilon as a random walk does, and two follow each other.
"""

HALF_STEPS, HALF_ROOM, HALF_MOST = 4, 2.0, 0.25
"""In half precision, where rounding decides single values, the root mean square of the difference
counts, relative to that of the reference's map. It may be HALF_ROOM times what the reference itself
is off by when autocast computes it in that type, or HALF_STEPS epsilon times the root of the depth
(3% of a pyramid in bfloat16, 10% of a detector) where that is more or was not measured; never more
than HALF_MOST. Whether it matters is not in these numbers: that is what AP on data says."""

GRADIENT = "gradient of "
"""The prefix of gradients' names. They are compared by root mean square in any precision, in full
precision with GRADIENT_ROOM times the tolerance, but never more than GRADIENT_MOST: where the two
largest values of a max pool differ by rounding alone, the two models send the gradient to different
places."""
GRADIENT_ROOM, GRADIENT_MOST = 1000.0, 0.5


def within_half(precision: str) -> str:
    """The verdict on outputs that differ by no more than a type of half precision rounds."""
    return f"within what {precision} rounds"


@dataclass(frozen=True)
class Equality:
    """How far a model's outputs are from its reference's.

    Attributes:
        verdict: BIT_EQUAL, FLOAT32, that of :func:`within_half`, DIFFERS; or NOT_COMPARED where the
            models differ by design.
        max_abs: the largest absolute difference.
        relative: the relative difference: the largest one in full precision, the root mean square
            in half.
        tolerance: what `relative` may be at most.
        note: what is wrong, why nothing was compared, or what else is known.
        rounding: of half precision: how far the reference is off when autocast computes it so;
            None if that was not measured.
        detections: the share of the reference's detections that are the same; None if none were
            compared.
        of: how many detections the reference has.
    """

    verdict: str
    max_abs: float = 0.0
    relative: float = 0.0
    tolerance: float = 0.0
    note: str = ""
    rounding: float | None = None
    detections: float | None = None
    of: int = 0


def compare_outputs(
    reference: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    precision: str = "float32",
    depth: float = 1.0,
    rounding: Mapping[str, float] | None = None,
) -> Equality:
    """Compare tensors by name.

    Args:
        precision: the type that the less precise of the two computes in.
        depth: how many pyramids deep rounding adds up.
        rounding: of `precision`, by name: see :func:`rounding_of`.
    """
    if list(reference) != list(outputs):
        return Equality(DIFFERS, note=f"gives {list(outputs)}, not {list(reference)}")
    for name, expected in reference.items():
        if expected.shape != outputs[name].shape:
            note = f"{name} is {tuple(outputs[name].shape)}, not {tuple(expected.shape)}"
            return Equality(DIFFERS, note=note)
        if not outputs[name].isfinite().all() or not expected.isfinite().all():
            return Equality(DIFFERS, note=f"{name} is not finite")
    if all(_bit_equal(expected, outputs[name]) for name, expected in reference.items()):
        return Equality(BIT_EQUAL)
    exact = _within(reference, outputs, lambda name: _float32_tolerance(name, depth), mean=False)
    if precision == "float32" or exact.verdict != DIFFERS:
        return exact
    steps = HALF_STEPS * torch.finfo(getattr(torch, precision)).eps * math.sqrt(depth)
    measured = dict(rounding or {})

    def tolerance(name: str) -> float:
        most = GRADIENT_MOST if name.startswith(GRADIENT) else HALF_MOST
        return min(max(steps, HALF_ROOM * measured.get(name, 0.0)), most)

    maps = [value for name, value in measured.items() if not name.startswith(GRADIENT)]
    half = _within(reference, outputs, tolerance, mean=True)
    verdict = DIFFERS if half.verdict == DIFFERS else within_half(precision)
    return replace(half, verdict=verdict, rounding=max(maps, default=None))


def rounding_of(plain: Mapping[str, Tensor], rounded: Mapping[str, Tensor]) -> dict[str, float]:
    """How far a model's outputs are off when autocast computes them, by name, relative to the root
    mean square of each.

    Args:
        plain: in full precision.
        rounded: by autocast.
    """
    return {
        name: _difference(value, rounded[name], mean=True)[1]
        for name, value in plain.items()
        if rounded[name].shape == value.shape and rounded[name].isfinite().all()
    }


def _bit_equal(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


def _float32_tolerance(name: str, depth: float) -> float:
    tolerance = FLOAT32_TOLERANCE * depth
    if not name.startswith(GRADIENT):
        return tolerance
    return max(tolerance, min(tolerance * GRADIENT_ROOM, GRADIENT_MOST))


def _within(
    reference: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    tolerance: Callable[[str], float],
    mean: bool,
) -> Equality:
    """FLOAT32 or DIFFERS, by a tolerance for each name and the difference of its tensors."""
    worst_abs = worst = worst_gradient = allowed = 0.0
    notes = []
    for name, expected in reference.items():
        gradient = name.startswith(GRADIENT)
        max_abs, relative = _difference(expected, outputs[name], mean=gradient or mean)
        if relative > tolerance(name):
            notes.append(f"{name} is off by {relative:.1e}, and {tolerance(name):.1e} is allowed")
        if gradient:
            worst_gradient = max(worst_gradient, relative)
        else:
            worst_abs, worst = max(worst_abs, max_abs), max(worst, relative)
            allowed = max(allowed, tolerance(name))
    verdict = DIFFERS if notes else FLOAT32
    if not notes and any(name.startswith(GRADIENT) for name in reference):
        notes = [f"gradients {worst_gradient:.1e}"]
    return Equality(verdict, worst_abs, worst, allowed, "; ".join(notes[:3]))


def _difference(reference: Tensor, other: Tensor, mean: bool) -> tuple[float, float]:
    """The largest absolute difference, and the relative one: the `mean` (root mean square) as
    HALF_STEPS defines it, or the largest as FLOAT32_TOLERANCE does."""
    if reference.numel() == 0:
        return 0.0, 0.0
    reference, other = reference.double(), other.double()
    difference = (reference - other).abs()
    max_abs = difference.max().item()
    scale = reference.square().mean().sqrt().clamp(min=1e-12)
    if mean:
        return max_abs, (difference.square().mean().sqrt() / scale).item()
    return max_abs, (difference / (scale + reference.abs())).max().item()


def matched_share(
    reference: Mapping[str, Tensor], detections: Mapping[str, Tensor], score_tolerance: float = 0.02
) -> float:
    """The share of the reference's detections that `detections` has too: of the same class, with an
    IoU of 0.9 or more and about the same score.

    Args:
        reference: "boxes" `(N, 4)`, "scores" `(N,)` and "classes" `(N,)`.
        detections: likewise.
        score_tolerance: how far the two scores may differ.
    """
    count = len(reference["boxes"])
    if count == 0 or len(detections["boxes"]) == 0:
        return float(count == len(detections["boxes"]))
    overlap = pairwise_iou(Boxes(reference["boxes"]), Boxes(detections["boxes"])) >= 0.9
    same = reference["classes"][:, None] == detections["classes"][None]
    near = (reference["scores"][:, None] - detections["scores"][None]).abs() <= score_tolerance
    return torch.any(overlap & same & near, 1).float().mean().item()
