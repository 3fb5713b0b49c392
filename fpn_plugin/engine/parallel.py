"""`SOLVER.DDP`: how the processes of a run exchange their gradients, by torch's
DistributedDataParallel."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Mapping

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from fpn_plugin.registry import unknown_name

_HOOKS = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
COMPRESS = ("", *_HOOKS)
_NCCL = (2, 10)  # the oldest that adds up bfloat16
# The entries of `train.ddp` that are not DDP's own: Detectron2's and ours
_FP16, _COMPRESS = "fp16_compression", "compress"


@dataclass(frozen=True)
class Exchange:
    """How gradients are exchanged.

    Attributes:
        compress: what they are sent as: one of `COMPRESS`.
        arguments: of DDP.
        section: the config key above all, for messages.
    """

    compress: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    section: str = "SOLVER.DDP"

    def key(self, name: str) -> str:
        """The config key of an argument."""
        is_yaml = self.section.isupper()
        name = "bucket_mb" if is_yaml and name == "bucket_cap_mb" else name
        return f"{self.section}.{name.upper() if is_yaml else name}"

    def check(self, parts: int = 1) -> None:
        """Check what several processes would fail with.

        Args:
            parts: `SOLVER.ACCUMULATE`.

        Raises:
            KeyError: for an unknown value of `compress`.
            ValueError: naming the key, and what to take instead.
        """
        if self.compress not in COMPRESS:
            raise unknown_name(self.key(_COMPRESS), self.compress, COMPRESS)
        size = self.arguments.get("bucket_cap_mb")
        if size is not None and (isinstance(size, bool) or not size > 0):
            raise ValueError(f"{self.key('bucket_cap_mb')}: {size!r} is no size in MiB")
        if self.compress == "bf16" and not _adds_bf16():
            raise ValueError(
                f"{self.key(_COMPRESS)}: 'bf16' needs a torch built with CUDA and NCCL"
                f" {'.'.join(map(str, _NCCL))}, which {torch.__version__} is not; choose 'fp16'"
                " or ''"
            )
        if self.arguments.get("static_graph") and parts > 1:
            raise ValueError(
                f"{self.key('static_graph')}: True does not go with a batch in {parts} parts"
                " (SOLVER.ACCUMULATE, train.accumulate), as torch learns the graph from a step that"
                " sends its gradients: choose False, or one part"
            )


def read_exchange(cfg: CfgNode) -> Exchange:
    """What `SOLVER.DDP` says, with Detectron2's own settings for the rest.

    Raises:
        ValueError: naming the key, if a size is negative.
    """
    keys = cfg.SOLVER.DDP
    if keys.BUCKET_MB < 0:
        raise ValueError(f"SOLVER.DDP.BUCKET_MB: {keys.BUCKET_MB} is no size in MiB")
    arguments = {
        "broadcast_buffers": False,
        "gradient_as_bucket_view": keys.GRADIENT_AS_BUCKET_VIEW,
        "static_graph": keys.STATIC_GRAPH,
    }
    if keys.BUCKET_MB:  # else torch's, whose first bucket is a smaller one
        arguments["bucket_cap_mb"] = keys.BUCKET_MB
    return Exchange(keys.COMPRESS, arguments)


def read_python_exchange(entries: Mapping[str, Any]) -> Exchange:
    """What `train.ddp` of a Python config says: DDP's arguments, Detectron2's `fp16_compression`,
    and `compress`, which is `SOLVER.DDP.COMPRESS`.

    Raises:
        KeyError: for a name that is none of these.
        ValueError: if it asks for both ways of compression.
    """
    section, arguments = "train.ddp", dict(entries)
    known = [*inspect.signature(DistributedDataParallel).parameters][1:]
    for name in arguments:
        if name not in (*known, _FP16, _COMPRESS):
            raise unknown_name(section, name, [*known, _FP16, _COMPRESS])
    is_half, compress = arguments.pop(_FP16, False), arguments.pop(_COMPRESS, "")
    if is_half and compress not in ("", "fp16"):
        raise ValueError(
            f"{section}: {_FP16} True and {_COMPRESS} {compress!r} exclude each other: leave out"
            " the first"
        )
    return Exchange("fp16" if is_half else compress, arguments, section)


def make_parallel(model: nn.Module, device: str, exchange: Exchange) -> nn.Module:
    """The model in DDP if there are several processes, else the model.

    Args:
        device: the type of the device, such as "cpu".
    """
    arguments = dict(exchange.arguments)
    # DDP refuses device_ids on the CPU; with None it chooses the device itself
    arguments.setdefault("device_ids", [torch.cuda.current_device()] if device == "cuda" else None)
    parallel = create_ddp_model(model, **arguments)
    if isinstance(parallel, DistributedDataParallel) and exchange.compress:
        parallel.register_comm_hook(None, _HOOKS[exchange.compress])
    return parallel


def _adds_bf16() -> bool:
    """Whether torch lets its hook be used, on whatever device."""
    is_built = bool(torch.version.cuda or torch.version.hip) and dist.is_nccl_available()
    return is_built and torch.cuda.nccl.version() >= _NCCL
