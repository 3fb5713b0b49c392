"""What a training step is remembered by, and the error that names where it went wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fpn_plugin.engine.checkpoint import find_checkpoint
from fpn_plugin.engine.faults.diagnose import find_origin, random_state, rerunning_needs_all
from fpn_plugin.engine.faults.finite import DivergedError


@dataclass(frozen=True)
class DivergenceRules:
    """When training stops, and what its message can name.

    Attributes:
        max_ratio: by how much the loss may exceed its usual value; 0: by any.
        key: of the config, that says so.
        advice: what may help, with the keys' present values.
        folder: of the checkpoints.

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
    """Those of a config.

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


class Watched(nn.Module):
    """A model as a training step calls it, that remembers what its last step was.

    Detectron2's own checks of boxes and scores fail here with the place where they went wrong.

    Args:
        model: itself, or in DDP.
        device: the kind of device.
        dtype: what autocast computes the step in; None for full precision.
    """

    def __init__(
        self, model: nn.Module, device: str, dtype: torch.dtype | None, rules: DivergenceRules
    ) -> None:
        super().__init__()
        self.model = model
        self.device = device
        self.dtype = dtype
        self.rules = rules
        self.batch: Any = ()
        self.random: dict[str, Tensor] = {}
        self.losses: dict[str, Tensor] = {}
        self.sizes: list[tuple[int, ...]] = []

    @property
    def training(self) -> bool:
        """The model's own: Detectron2 checks it before each step."""
        return self.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Nothing to keep: `train` reaches the model by itself."""

    @property
    def bare(self) -> nn.Module:
        """The model without DDP."""
        model = self.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    def forward(self, batch: Any) -> Any:
        """The model's losses.

        Raises:
            DivergedError: if Detectron2 finds numbers in the model that are not finite.
        """
        self.batch, self.random = batch, random_state(self.device)
        samples = [x for x in batch if isinstance(x, dict) and "image" in x]
        self.sizes = [tuple(x["image"].shape[-2:]) for x in samples]
        try:
            losses = self.model(batch)
        except (FloatingPointError, AssertionError) as error:
            # the other processes go on, and can't be asked
            alone = comm.get_world_size() > 1
            origin = self._look()
            if not origin and isinstance(error, AssertionError):
                raise  # about something else
            said = str(error).rstrip(".") or type(error).__name__
            raise self.error(f"a check of Detectron2 failed: {said}", origin, alone) from error
        self.losses = {"total_loss": losses} if isinstance(losses, Tensor) else dict(losses)
        return losses

    def find_origin(self, backward: bool = False, large: bool = False) -> str:
        """Where it began in the last step: :func:`fpn_plugin.engine.faults.diagnose.find_origin`.

        All processes must ask; each looks at its own images.
        """
        found = list(enumerate(comm.all_gather(self._look(backward, large))))
        if len(found) == 1:
            return found[0][1]
        return "; ".join(f"{text} (process {rank})" for rank, text in found if text)

    def _look(self, backward: bool = False, large: bool = False) -> str:
        return find_origin(
            self.bare,
            self.batch,
            device=self.device,
            dtype=self.dtype,
            random=self.random,
            backward=backward,
            large=large,
            # one that finds it early, or fails, would leave the others waiting
            rerun=comm.get_world_size() == 1 or not rerunning_needs_all(self.bare),
        )

    def error(self, what: str, origin: str, alone: bool = False) -> DivergedError:
        """What training ends with.

        Args:
            what: has happened.
            origin: where it began; "" if nobody knows.
            alone: whether other processes go on, of which one may still write a checkpoint.
        """
        lines = [
            f"Iteration {get_event_storage().iter}: {what}.",
            f"It begins in {origin}." if origin else "Where it begins was not found.",
            _what_is_kept("" if alone else self.rules.folder),
            f"What may help: {self.rules.advice}.",
        ]
        return DivergedError("\n".join(lines))

    def forget(self) -> None:
        """Let go of the last step's batch and losses."""
        self.batch, self.losses = (), {}


def last_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Height and width in pixels of each image of the last step.

    Args:
        model: as a trainer of single steps calls it.
    """
    return next((m.sizes for m in model.modules() if isinstance(m, Watched)), [])


def _what_is_kept(folder: str) -> str:
    """What of the run is left to go on from.

    Args:
        folder: of the checkpoints; "" if it is not known which will be the last.
    """
    taken = "The step was not taken, and no checkpoint was written of it"
    try:
        found = find_checkpoint(folder) if folder else "the last one"
    except ValueError:  # none is whole
        found = ""
    return f"{taken}: --resume goes on from {found}." if found else f"{taken}; there is none yet."
