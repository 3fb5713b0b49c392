"""Mixed precision on any device: the type, the model that computes in it, the training step."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import nn

from fpn_plugin.engine.faults.divergence import LossGuard
from fpn_plugin.engine.faults.watched import DivergenceRules, Watched, divergence_rules
from fpn_plugin.registry import unknown_name

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def device_type(cfg: CfgNode) -> str:
    """`MODEL.DEVICE` without its index: cuda, cpu, …"""
    return torch.device(cfg.MODEL.DEVICE).type


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The type that `SOLVER.AMP` asks for on this device, or None when it is off.

    Raises:
        KeyError: if `SOLVER.AMP.PRECISION` is unknown.
        ValueError: for fp16 on the CPU, where gradients underflow: there is no scaler for it.
    """
    key, precision = "SOLVER.AMP.PRECISION", cfg.SOLVER.AMP.PRECISION
    if precision not in ("auto", *_DTYPES):
        raise unknown_name(key, precision, ("auto", *_DTYPES))
    return choose_dtype(precision, device_type(cfg), key) if cfg.SOLVER.AMP.ENABLED else None


def choose_dtype(precision: str, device: str, key: str) -> torch.dtype:
    """The type of "auto", "fp16" or "bf16" on a kind of device.

    Args:
        key: the config key that says so, for messages.

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
    """Runs a model's forward under autocast, and only its forward, as torch asks for.

    It wraps the model where it is called; checkpoints and optimizers keep using the model itself.
    """

    def __init__(self, model: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.device = device
        self.dtype = dtype
        # A module starts in training mode, and Detectron2 puts a model back into the mode of the
        # module that it evaluated. Not train(), which would change the model's own parts.
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own inputs and outputs."""
        with torch.autocast(self.device, self.dtype):
            return self.model(*args, **kwargs)


def build_step_trainer(
    cfg: CfgNode, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer
) -> SimpleTrainer:
    """The trainer of single steps: Detectron2's, with autocast and no scaler for AMP on the CPU.

    Raises:
        KeyError: if `SOLVER.AMP.PRECISION` is unknown.
        ValueError: for fp16 on the CPU, or a bad `SOLVER.MAX_LOSS_RATIO`.
    """
    rules, device = divergence_rules(cfg), device_type(cfg)
    return make_step_trainer(model, data_loader, optimizer, device, amp_dtype(cfg), rules)


def make_step_trainer(
    model: nn.Module,
    data_loader: Any,
    optimizer: torch.optim.Optimizer,
    device: str,
    dtype: torch.dtype | None,
    rules: DivergenceRules,
) -> SimpleTrainer:
    """:func:`build_step_trainer` for a kind of device and a type, None for full precision."""
    watched = Watched(model, device, dtype, rules)
    if dtype is None:
        steps = SimpleTrainer(watched, data_loader, optimizer)
    elif device != "cuda":
        steps = SimpleTrainer(Autocast(watched, device, dtype), data_loader, optimizer)
    else:
        # bfloat16 has float32's range: nothing to scale.
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        steps = AMPTrainer(watched, data_loader, optimizer, grad_scaler=scaler, precision=dtype)
    steps.register_hooks([LossGuard(watched)])
    return steps
