"""Randomness as a function of the run's seed and a position: a resumed run draws the same."""

from __future__ import annotations

import contextlib
import random
from typing import Iterator

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

# Streams keep the numbers of a training step apart from those of a sample at the same position.
STEP_STREAM = 0
SAMPLE_STREAM = 1


def derive_seed(*parts: int) -> int:
    """A 32-bit seed from all parts: equal for equal parts, unrelated for neighbours.

    Args:
        parts: the run's seed first, then what identifies the position; none is negative.
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed torch on every device, numpy and `random`."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block on the CPU under a seed, and leave the generators outside as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # Not torch.manual_seed: that would also reset the GPUs' generators, which belong to the
    # training step.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class SeedHook(HookBase):
    """Seeds every training step from the run's seed, the iteration and the rank.

    What a step draws (RPN and ROI sampling, dropout) then depends on nothing that happened before
    it: neither on an evaluation in between nor on whether the run was interrupted.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        """Called by the trainer before each iteration."""
        seed_all(derive_seed(self.seed, STEP_STREAM, comm.get_rank(), self.trainer.iter))

    def state_dict(self) -> dict[str, int]:
        """The run's seed goes into the checkpoint."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The run goes on with the seed it was started with."""
        self.seed = state["seed"]
