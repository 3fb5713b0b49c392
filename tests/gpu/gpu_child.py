"""What processes of their own do on the device."""

from __future__ import annotations

import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bad import RETINA
from crash_child import Before, run
from detectron2.utils import comm
from tiny import register, tiny_config

from fpn_plugin.engine.trainer import Trainer

ROOM = 50 * 2**20  # bytes, on the CPU


def run_with_little_memory(pipe: Connection, json_file: str, output: str, overrides: Any) -> None:
    """:func:`run` that may take no more memory of the device after two steps."""

    def limit() -> None:
        if overrides["MODEL__DEVICE"] == "cuda":
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
            return
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))

    hook = Before(2, limit)
    run(pipe, json_file, output, overrides, lambda trainer: trainer.register_hooks([hook]))


def train_by_gloo(rank: int, json_file: str, folder: str, device: str) -> None:
    """One of two processes: trains what draws nothing at random; leaves the weights before and
    after."""
    torch.set_num_threads(1)
    for each in (torch.backends.cudnn, torch.backends.cuda.matmul):
        each.allow_tf32 = False
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    register(Path(json_file))
    torch.manual_seed(0)
    keys = {"MODEL__RESNETS__NORM": "FrozenBN", "TEST__EVAL_PERIOD": 0, "MODEL__DEVICE": device}
    trainer = Trainer(tiny_config(Path(folder, "run"), **RETINA, **keys))
    model = trainer.checkpointer.model
    before = {name: x.to("cpu", copy=True) for name, x in model.state_dict().items()}
    trainer.train()
    after = {name: x.cpu() for name, x in model.state_dict().items()}
    torch.save((before, after), Path(folder, f"rank{rank}.pth"))
    dist.destroy_process_group()
