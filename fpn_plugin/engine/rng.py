"""Seeds that follow from the run's seed and a position: a resumed run draws the same numbers."""

from __future__ import annotations

import contextlib
import random
from typing import Iterator

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

# A training step and a sample at the same position draw different numbers.
STEP_STREAM = 0
SAMPLE_STREAM = 1


def derive_seed(*parts: int) -> int:
    """A 32-bit seed: equal for equal parts, unrelated for parts that differ by one.

    Args:
        parts: the run's seed, then what identifies the position; not negative.
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed torch on every device, numpy and `random`."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generators within a block and restore their states afterwards."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # Not torch.manual_seed, which would also seed the GPUs' generators: the training step's.
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

    What a step draws (RPN and ROI sampling, dropout) then depends neither on an evaluation before
    it nor on whether the run was interrupted.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        """Called by the trainer before each iteration."""
        seed_all(derive_seed(self.seed, STEP_STREAM, comm.get_rank(), self.trainer.iter))

    def state_dict(self) -> dict[str, int]:
        """The run's seed, for the checkpoint."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the seed that the run was started with."""
        self.seed = state["seed"]
