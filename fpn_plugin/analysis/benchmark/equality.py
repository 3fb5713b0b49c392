"""Whether two contestants give the same: checked before either is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

EQUAL, UNEQUAL, DIFFERENT = "equal", "not equal", "different model"

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}
"""Of a pyramid's maps. In full precision as `allclose` has it: every difference may be so much of
the value and so much of the root mean square of the reference's map. In half precision, where
single values are at the mercy of rounding, the root mean square of the difference may be so much of
it."""

GRADIENT = "gradient of "
"""What the names of gradients begin with. They are compared by root mean square in any precision,
with GRADIENT_ROOM times the tolerance, but no more than GRADIENT_MOST: where the two largest values
of a max pool differ by rounding alone, the two sides send the gradient to different places."""
GRADIENT_ROOM, GRADIENT_MOST = 1000.0, 0.5


@dataclass(frozen=True)
class Equality:
    """How far a contestant's outputs are from its reference's.

    Attributes:
        verdict: EQUAL, UNEQUAL, or DIFFERENT where the models differ by design.
        max_abs: the largest absolute difference.
        relative: the difference that was judged, as TOLERANCE has it.
        tolerance: of it.
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
    worst_abs = worst = worst_gradient = 0.0
    notes = []
    for name, expected in reference.items():
        one, two = expected.double(), outputs[name].double()
        if one.shape != two.shape:
            return Equality(UNEQUAL, note=f"{name} is {tuple(two.shape)}, not {tuple(one.shape)}")
        if not two.isfinite().all() or not one.isfinite().all():
            return Equality(UNEQUAL, note=f"{name} is not finite")
        gradient = name.startswith(GRADIENT)
        off, relative = _difference(one, two, gradient or precision != "float32")
        most = max(tolerance, min(tolerance * GRADIENT_ROOM, GRADIENT_MOST))
        if relative > (most if gradient else tolerance):
            notes.append(f"{name} is off by {relative:.1e}")
        if gradient:
            worst_gradient = max(worst_gradient, relative)
        else:
            worst_abs, worst = max(worst_abs, off), max(worst, relative)
    verdict = UNEQUAL if notes else EQUAL
    if not notes and any(name.startswith(GRADIENT) for name in reference):
        notes = [f"gradients {worst_gradient:.1e}"]
    return Equality(verdict, worst_abs, worst, tolerance, "; ".join(notes[:3]))


def _difference(reference: Tensor, other: Tensor, mean: bool) -> tuple[float, float]:
    """The largest absolute difference; and the relative one, as TOLERANCE has it."""
    if reference.numel() == 0:
        return 0.0, 0.0
    off = (reference - other).abs()
    scale = reference.square().mean().sqrt().clamp(min=1e-12)
    if mean:
        return off.max().item(), (off.square().mean().sqrt() / scale).item()
    return off.max().item(), (off / (scale + reference.abs())).max().item()


def matched_share(
    reference: Mapping[str, Tensor], found: Mapping[str, Tensor], score_off: float = 0.02
) -> float:
    """The share of the reference's detections that the other has too.

    Args:
        reference: "boxes" `(N, 4)`, "scores" `(N,)` and "classes" `(N,)`.
        found: likewise.
        score_off: what the two scores may differ by.
    """
    count = len(reference["boxes"])
    if count == 0 or len(found["boxes"]) == 0:
        return float(count == len(found["boxes"]))
    overlap = pairwise_iou(Boxes(reference["boxes"]), Boxes(found["boxes"])) >= 0.9
    same = reference["classes"][:, None] == found["classes"][None]
    near = (reference["scores"][:, None] - found["scores"][None]).abs() <= score_off
    return torch.any(overlap & same & near, 1).float().mean().item()
