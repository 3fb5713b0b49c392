"""Runs that need a process of their own: one that is killed, and two that train together."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from tiny import register, tiny_config

from fpn_plugin.engine.trainer import Trainer


class Kill(HookBase):
    """SIGKILL in the middle of training: no handler and no `finally` runs."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    output: Path, overrides: dict[str, Any], resume: bool = False, kill_at: int = -1
) -> Trainer:
    """One run of the tiny detector, from always the same first weights."""
    torch.manual_seed(0)
    trainer = Trainer(tiny_config(output, **overrides))
    trainer.register_hooks([Kill(kill_at)])
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def train_together(
    json_file: str, output: str, overrides: dict[str, Any], resume: bool = False
) -> None:
    """One of several processes: trains, and leaves the weights that it ends with."""
    register(Path(json_file))
    model = train(Path(output), overrides, resume).checkpointer.model
    torch.save(model.state_dict(), Path(output, f"rank{comm.get_rank()}.pth"))


if __name__ == "__main__":
    register(Path(sys.argv[1]))
    # The overrides were written by the test that started this process.
    train(Path(sys.argv[2]), eval(sys.argv[3]), kill_at=4)
