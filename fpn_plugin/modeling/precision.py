"""Mixed precision on any device: the type, and a model that computes in it."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from fpn_plugin.registry import unknown_name

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def device_type(cfg: CfgNode) -> str:
    """`MODEL.DEVICE` without its index: cuda, cpu, …"""
    return torch.device(cfg.MODEL.DEVICE).type


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The type that `SOLVER.AMP` selects on this device, or None if it is off.

    Raises:
        KeyError: if `SOLVER.AMP.PRECISION` is unknown.
        ValueError: for fp16 on the CPU, where gradients underflow: there is no scaler for it.
    """
    key, precision = "SOLVER.AMP.PRECISION", cfg.SOLVER.AMP.PRECISION
    if precision not in ("auto", *_DTYPES):
        raise unknown_name(key, precision, ("auto", *_DTYPES))
    return choose_dtype(precision, device_type(cfg), key) if cfg.SOLVER.AMP.ENABLED else None


def choose_dtype(precision: str, device: str, key: str) -> torch.dtype:
    """The type that "auto", "fp16" or "bf16" selects on a type of device.

    Args:
        device: such as "cpu" or "cuda", without an index.
        key: the config key of `precision`, for error messages.

    Raises:
        KeyError: if `precision` is unknown.
        ValueError: for fp16 on the CPU.
    """
    if precision == "auto":
        precision = "fp16" if device == "cuda" else "bf16"
    if precision not in _DTYPES:
        raise unknown_name(key, precision, ("auto", *_DTYPES))
    if precision == "fp16" and device != "cuda":
        raise ValueError(
            f"{key} 'fp16' needs CUDA, and the device is {device!r}; choose 'bf16' or 'auto'"
        )
    return _DTYPES[precision]


class Autocast(nn.Module):
    """Runs a model's forward pass, and nothing else, under autocast, as PyTorch recommends.

    Wrap the model only where it is called; checkpoints and optimizers keep using the model itself.
    """

    def __init__(self, model: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.device = device
        self.dtype = dtype
        # Detectron2 restores the mode of the module that it evaluated. Not self.train(), which
        # would also change submodules of the model that are frozen in evaluation mode.
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own inputs and outputs."""
        with torch.autocast(self.device, self.dtype):
            return self.model(*args, **kwargs)
