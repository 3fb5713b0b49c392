"""Stops training before a step that would ruin the weights, and names where the bad numbers begin.

A step is not taken if the loss or a gradient is not finite, or if the loss explodes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Iterable, Mapping

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fpn_plugin.checkpoint.checkpointer import find_checkpoint
from fpn_plugin.checkpoint.finite import DivergedError, listed, non_finite
from fpn_plugin.compat import total_norm
from fpn_plugin.engine.faults.diagnose import (
    LARGE,
    find_origin,
    random_state,
    rerun_needs_other_processes,
)

WINDOW = 20  # iterations whose median loss the next loss is compared with
# A gradient scaler starts at 65536 and halves its scale at each skipped step. After 20 of them the
# scale is below 1, so it cannot be the reason.
MAX_SKIPS = 20


@dataclass(frozen=True)
class DivergenceRules:
    """When training stops, and what the error can say about it.

    Attributes:
        max_ratio: the largest factor by which the loss may exceed its usual value; 0: no limit.
        key: the config key of `max_ratio`.
        advice: what may help, with the present values of the keys.
        folder: the folder of the checkpoints.

    Raises:
        ValueError: naming the key, if `max_ratio` is neither 0 nor more than 1.
    """

    max_ratio: float = 10000
    key: str = "SOLVER.MAX_LOSS_RATIO"
    advice: str = ""
    folder: str = ""

    def __post_init__(self) -> None:
        ratio: Any = self.max_ratio
        is_number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
        if not is_number or (ratio != 0 and not 1 < ratio < math.inf):
            raise ValueError(
                f"{self.key}: {self.max_ratio!r} is neither 0, for no limit, nor a number above 1"
            )


def divergence_rules(cfg: CfgNode) -> DivergenceRules:
    """The rules of a config.

    Raises:
        ValueError: if `SOLVER.MAX_LOSS_RATIO` is neither 0 nor more than 1.
    """
    solver = cfg.SOLVER
    hints = [f"a lower SOLVER.BASE_LR ({solver.BASE_LR:g})"]
    hints.append(f"a longer SOLVER.WARMUP_ITERS ({solver.WARMUP_ITERS})")
    if not solver.CLIP_GRADIENTS.ENABLED:
        hints.append("SOLVER.CLIP_GRADIENTS.ENABLED True")
    if solver.AMP.ENABLED:
        hints.append(f"SOLVER.AMP.ENABLED False (PRECISION is {solver.AMP.PRECISION})")
    hints.append("DATASETS.CHECK full, if the data is new")
    return DivergenceRules(
        solver.MAX_LOSS_RATIO, "SOLVER.MAX_LOSS_RATIO", ", ".join(hints), cfg.OUTPUT_DIR
    )


class StepRecorder(nn.Module):
    """The model as a step trainer calls it; records what it takes to run the last step again.

    Where one of Detectron2's own checks of boxes and scores fails, the error also names the module
    that the bad numbers come from.

    Args:
        model: the model, or DDP around it.
        device: the type of the device, such as "cpu".
        dtype: what autocast computes the step in; None for full precision.
        parts: how many times it is called in a step: `SOLVER.ACCUMULATE`.

    Attributes:
        runs: the calls of the last step: a batch, and the generators' states before it.
    """

    def __init__(
        self,
        model: nn.Module,
        device: str,
        dtype: torch.dtype | None,
        rules: DivergenceRules,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.device = device
        self.dtype = dtype
        self.rules = rules
        self.runs: deque[tuple[Any, dict[str, Tensor]]] = deque(maxlen=parts)
        self.losses: dict[str, Tensor] = {}
        self.sizes: list[tuple[int, ...]] = []

    @property
    def training(self) -> bool:
        """The model's mode, which Detectron2 checks before each step."""
        return self.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Nothing to store: `train()` reaches the model as a submodule."""

    @property
    def unwrapped(self) -> nn.Module:
        """The model without DDP."""
        model = self.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    def forward(self, batch: Any) -> Any:
        """The model's losses.

        Raises:
            DivergedError: if a check of Detectron2 fails because a number is not finite.
        """
        self.runs.append((batch, random_state(self.device)))
        samples = [x for x in batch if isinstance(x, dict) and "image" in x]
        self.sizes = [tuple(x["image"].shape[-2:]) for x in samples]
        try:
            losses = self.model(batch)
        except (FloatingPointError, AssertionError) as error:
            # other processes did not fail, so they cannot take part in the search
            alone = comm.get_world_size() > 1
            origin = self._find_own_origin()
            if not origin and isinstance(error, AssertionError):
                raise  # the assertion is about something else
            message = str(error).rstrip(".") or type(error).__name__
            raise self.error(f"a check of Detectron2 failed: {message}", origin, alone) from error
        self.losses = {"total_loss": losses} if isinstance(losses, Tensor) else dict(losses)
        return losses

    def find_origin(self, backward: bool = False, large: bool = False) -> str:
        """Where the bad numbers of the last step begin; see
        :func:`fpn_plugin.engine.faults.diagnose.find_origin`.

        A collective call: each process looks at its own images.
        """
        origins = list(enumerate(comm.all_gather(self._find_own_origin(backward, large))))
        if len(origins) == 1:
            return origins[0][1]
        return "; ".join(f"{origin} (process {rank})" for rank, origin in origins if origin)

    def _find_own_origin(self, backward: bool = False, large: bool = False) -> str:
        # a process that finds it early, or fails, would leave the others waiting
        rerun = comm.get_world_size() == 1 or not rerun_needs_other_processes(self.unwrapped)
        origins = (
            find_origin(
                self.unwrapped,
                batch,
                device=self.device,
                dtype=self.dtype,
                random=random,
                backward=backward,
                large=large,
                rerun=rerun,
            )
            for batch, random in self.runs
        )
        return next(filter(None, origins), "")

    def error(self, event: str, origin: str, alone: bool = False) -> DivergedError:
        """The error that ends training.

        Args:
            event: what happened.
            origin: where it began; "" if that was not found.
            alone: whether other processes go on, one of which may still write a checkpoint.
        """
        lines = [
            f"Iteration {get_event_storage().iter}: {event}.",
            f"It begins in {origin}." if origin else "Where it begins was not found.",
            _describe_checkpoint("" if alone else self.rules.folder),
            f"What may help: {self.rules.advice}.",
        ]
        return DivergedError("\n".join(lines))

    def forget(self) -> None:
        """Free the last step's batch and losses."""
        self.runs.clear()
        self.losses = {}


def last_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Height and width in pixels of each image of the last step.

    Args:
        model: the model of a step trainer.
    """
    return next((m.sizes for m in model.modules() if isinstance(m, StepRecorder)), [])


def _describe_checkpoint(folder: str) -> str:
    """Which checkpoint the run can go on from.

    Args:
        folder: of the checkpoints; "" if it is not known yet which will be the last.
    """
    not_taken = "The step was not taken, and no checkpoint was written of it"
    try:
        checkpoint = find_checkpoint(folder) if folder else "the last one"
    except ValueError:  # none is whole
        checkpoint = ""
    if not checkpoint:
        return f"{not_taken}; there is none yet."
    return f"{not_taken}: --resume goes on from {checkpoint}."


class LossGuard(HookBase):
    """Checks losses and gradients before each step of the optimizer.

    It is a hook of the step trainer, the only one that calls `after_backward`. The losses that it
    compares with are part of the checkpoint, so that a resumed run stops where an unbroken one
    would. All processes check the same numbers, the means, and so stop together.

    Args:
        recorder: the model that the step trainer calls.
    """

    def __init__(self, recorder: StepRecorder) -> None:
        self.recorder = recorder
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
        self.recorder.forget()

    def state_dict(self) -> dict[str, Any]:
        """What the next losses are compared with."""
        return {
            "recent": [dict(losses) for losses in self.recent],
            "lowest": self.lowest,
            "skips": self.skips,
            "scale": self.scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.recent = deque(state["recent"], maxlen=WINDOW)
        self.lowest, self.skips, self.scale = (state[key] for key in ("lowest", "skips", "scale"))

    def _read(self) -> tuple[dict[str, float], float]:
        """Each loss and the norm of the gradients, as means over the processes.

        They come from the device in one transfer. The norm is 0 with a gradient scaler, which
        checks the gradients itself.
        """
        losses = self.recorder.losses
        values = [loss.detach().float().reshape(()) for loss in losses.values()]
        grads = [] if self._scaler else self._gradients().values()
        if grads:
            values.append(total_norm(grads).float())
        stacked = torch.stack(values)
        if comm.get_world_size() > 1:
            dist.all_reduce(stacked)
            stacked /= comm.get_world_size()
        numbers = stacked.tolist()
        return dict(zip(losses, numbers)), numbers[-1] if grads else 0.0

    @property
    def _scaler(self) -> Any:
        """The gradient scaler, if it is enabled."""
        scaler = getattr(self.trainer, "grad_scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _gradients(self) -> dict[str, Tensor]:
        parameters = self.recorder.unwrapped.named_parameters()
        return {name: x.grad for name, x in parameters if x.grad is not None}

    def _check_gradients(self, norm: float, total: float) -> None:
        if self._scaler:  # it skips steps whose gradients are not finite, and lowers its scale
            scale = self._scaler.get_scale()
            self.skips = self.skips + 1 if scale < self.scale else 0
            self.scale = scale
            if self.skips >= MAX_SKIPS:
                self._stop(
                    f"the loss is finite ({total:.4g}), but in {MAX_SKIPS} iterations in a row the"
                    " gradients were not, at any scale"
                )
        elif not math.isfinite(norm):
            # the norm can also overflow although every element is finite
            if bad := non_finite(self._gradients().items()):
                self._stop(
                    f"the loss is finite ({total:.4g}), but gradients are not, of {listed(bad)}"
                )

    def _check_ratio(self, losses: dict[str, float], total: float) -> None:
        rules, usual = self.recorder.rules, max(1.0, self.lowest)
        if rules.max_ratio and self.recent and abs(total) > rules.max_ratio * usual:
            self._stop(
                f"the loss explodes: {total:.4g} is more than {rules.key} ({rules.max_ratio:g})"
                f" times {usual:.4g}, its usual value ({_terms(losses, self.recent)})",
                large=True,
            )
        self.recent.append(losses)
        totals = [abs(sum(terms.values())) for terms in self.recent]
        self.lowest = min(self.lowest, statistics.median(totals))

    def _stop(self, event: str, large: bool = False) -> None:
        origin = self.recorder.find_origin(backward=not large, large=large)
        if large and origin:
            origin += f", the first part to give numbers beyond {LARGE:g}"
        raise self.recorder.error(event, origin)


def _terms(losses: Mapping[str, float], before: Iterable[Mapping[str, float]] = ()) -> str:
    """Each loss, the largest first, with its median of the iterations before."""
    texts = []
    for name, value in sorted(losses.items(), key=lambda loss: -_magnitude(loss[1])):
        past = [terms[name] for terms in before if name in terms]
        median = f" after {statistics.median(past):.3g}" if past else ""
        texts.append(f"{name} {value:.3g}{median}")
    return ", ".join(texts)


def _magnitude(value: float) -> float:
    return math.inf if math.isnan(value) else abs(value)
