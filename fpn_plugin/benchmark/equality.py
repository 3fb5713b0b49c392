"""Whether two models give the same outputs: checked before either is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

EQUAL, UNEQUAL, DIFFERENT = "equal", "not equal", "different model"

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}
"""Of a pyramid's maps, by precision. In full precision it bounds every single difference as
`allclose` does, relative to the value plus the root mean square of the reference's map. In half
precision, where rounding decides single values, it bounds the root mean square of the difference,
relative to that of the reference's map."""

GRADIENT = "gradient of "
"""The prefix of gradients' names. They are compared by root mean square in any precision, with
GRADIENT_ROOM times the tolerance, but no more than GRADIENT_MOST: where the two largest values of a
max pool differ by rounding alone, the two models send the gradient to different places."""
GRADIENT_ROOM, GRADIENT_MOST = 1000.0, 0.5


@dataclass(frozen=True)
class Equality:
    """How far a model's outputs are from its reference's.

    Attributes:
        verdict: EQUAL, UNEQUAL, or DIFFERENT where the models differ by design.
        max_abs: the largest absolute difference.
        relative: the relative difference, as TOLERANCE defines it.
        tolerance: what `relative` may be at most.
        note: what is wrong, or what else is known.
    """

    verdict: str
    max_abs: float = 0.0
    relative: float = 0.0
    tolerance: float = 0.0
    note: str = ""


def compare_outputs(
    reference: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    precision: str = "float32",
    depth: float = 1.0,
) -> Equality:
    """Compare tensors by name.

    Args:
        precision: a key of TOLERANCE.
        depth: a factor on the tolerance.
    """
    if list(reference) != list(outputs):
        return Equality(UNEQUAL, note=f"gives {list(outputs)}, not {list(reference)}")
    tolerance = TOLERANCE[precision] * depth
    gradient_tolerance = max(tolerance, min(tolerance * GRADIENT_ROOM, GRADIENT_MOST))
    worst_abs = worst = worst_gradient = 0.0
    notes = []
    for name, expected in reference.items():
        expected, actual = expected.double(), outputs[name].double()
        if expected.shape != actual.shape:
            note = f"{name} is {tuple(actual.shape)}, not {tuple(expected.shape)}"
            return Equality(UNEQUAL, note=note)
        if not actual.isfinite().all() or not expected.isfinite().all():
            return Equality(UNEQUAL, note=f"{name} is not finite")
        gradient = name.startswith(GRADIENT)
        max_abs, relative = _difference(expected, actual, mean=gradient or precision != "float32")
        if relative > (gradient_tolerance if gradient else tolerance):
            notes.append(f"{name} is off by {relative:.1e}")
        if gradient:
            worst_gradient = max(worst_gradient, relative)
        else:
            worst_abs, worst = max(worst_abs, max_abs), max(worst, relative)
    verdict = UNEQUAL if notes else EQUAL
    if not notes and any(name.startswith(GRADIENT) for name in reference):
        notes = [f"gradients {worst_gradient:.1e}"]
    return Equality(verdict, worst_abs, worst, tolerance, "; ".join(notes[:3]))


def _difference(reference: Tensor, other: Tensor, mean: bool) -> tuple[float, float]:
    """The largest absolute difference, and the relative one as TOLERANCE defines it: the `mean`
    (root mean square) or the largest."""
    if reference.numel() == 0:
        return 0.0, 0.0
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
