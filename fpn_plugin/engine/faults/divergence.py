"""Stops training before a step that would ruin the weights: the loss or a gradient is not finite,
or the loss explodes."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, Iterable, Mapping

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor

from fpn_plugin.engine.faults.diagnose import LARGE
from fpn_plugin.engine.faults.finite import listed, non_finite
from fpn_plugin.engine.faults.watched import Watched

WINDOW = 20  # iterations whose median loss is compared with
# A gradient scaler starts at 65536 and halves its scale at each skip: after 20 it is below 1, and
# so not the reason.
SKIPS = 20


class LossGuard(HookBase):
    """For the trainer of single steps, which alone tells when the gradients are there.

    What it compares with is in the checkpoint, so that a resumed run stops where an unbroken one
    would. Of several processes all see the same numbers, the means, and so stop together.

    Args:
        watched: the model that the trainer calls.
    """

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.recent: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self.lowest = math.inf
        self.skips = 0
        self.scale = 0.0

    def after_backward(self) -> None:
        """Called before the optimizer's step.

        Raises:
            DivergedError: if the step must not be taken.
        """
        losses, norm = self._read()
        total = sum(losses.values())
        if not math.isfinite(total):
            self._stop(f"the loss is not finite ({_terms(losses)})")
        self._check_gradients(norm, total)
        self._check_ratio(losses, total)
        self.watched.forget()

    def state_dict(self) -> dict[str, Any]:
        """What it compares the next losses with."""
        return {
            "recent": [dict(losses) for losses in self.recent],
            "lowest": self.lowest,
            "skips": self.skips,
            "scale": self.scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the checkpoint."""
        self.recent = deque(state["recent"], maxlen=WINDOW)
        self.lowest, self.skips, self.scale = (state[key] for key in ("lowest", "skips", "scale"))

    def _read(self) -> tuple[dict[str, float], float]:
        """Each loss, the mean over the processes, and the gradients' norm, all waited for at once;
        the norm is 0 where a scaler looks after the gradients."""
        losses = self.watched.losses
        values = [loss.detach().float().reshape(()) for loss in losses.values()]
        grads = [] if self._scaler else self._gradients().values()
        if grads:
            values.append(torch.nn.utils.get_total_norm(grads).float())
        together = torch.stack(values)
        if comm.get_world_size() > 1:
            dist.all_reduce(together)
            together /= comm.get_world_size()
        numbers = together.tolist()
        return dict(zip(losses, numbers)), numbers[-1] if grads else 0.0

    @property
    def _scaler(self) -> Any:
        """The gradient scaler, if it scales."""
        scaler = getattr(self.trainer, "grad_scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _gradients(self) -> dict[str, Tensor]:
        named = self.watched.bare.named_parameters()
        return {name: x.grad for name, x in named if x.grad is not None}

    def _check_gradients(self, norm: float, total: float) -> None:
        if self._scaler:  # it skips the steps whose gradients are not finite
            scale = self._scaler.get_scale()
            self.skips = self.skips + 1 if scale < self.scale else 0
            self.scale = scale
            if self.skips >= SKIPS:
                self._stop(
                    f"the loss is finite ({total:.4g}), but in {SKIPS} iterations in a row the"
                    " gradients were not, at any scale"
                )
        elif not math.isfinite(norm):
            # a norm also overflows where each number is finite
            if bad := non_finite(self._gradients().items()):
                self._stop(
                    f"the loss is finite ({total:.4g}), but gradients are not, of {listed(bad)}"
                )

    def _check_ratio(self, losses: dict[str, float], total: float) -> None:
        rules, usual = self.watched.rules, max(1.0, self.lowest)
        if rules.max_ratio and self.recent and abs(total) > rules.max_ratio * usual:
            self._stop(
                f"the loss explodes: {total:.4g} is more than {rules.key} ({rules.max_ratio:g})"
                f" times {usual:.4g}, its usual value ({_terms(losses, self.recent)})",
                large=True,
            )
        self.recent.append(losses)
        totals = [abs(sum(each.values())) for each in self.recent]
        self.lowest = min(self.lowest, statistics.median(totals))

    def _stop(self, what: str, large: bool = False) -> None:
        origin = self.watched.find_origin(backward=not large, large=large)
        if large and origin:
            origin += f", the first part to give numbers beyond {LARGE:g}"
        raise self.watched.error(what, origin)


def _terms(losses: Mapping[str, float], before: Iterable[Mapping[str, float]] = ()) -> str:
    """Each loss, the largest first; with its median before, if that is known."""
    shown = []
    for name, value in sorted(losses.items(), key=lambda item: -_size(item[1])):
        past = [each[name] for each in before if name in each]
        median = f" after {statistics.median(past):.3g}" if past else ""
        shown.append(f"{name} {value:.3g}{median}")
    return ", ".join(shown)


def _size(value: float) -> float:
    return math.inf if math.isnan(value) else abs(value)
