"""What takes a training step: the optimizer, and the trainer of single steps that guards it.

`SOLVER.OPTIMIZER` selects Detectron2's SGD, or AdamW with the same parameter groups and clipping;
`SOLVER.FUSED` selects their fused kernels. `SOLVER.AMP` selects the precision, and
`SOLVER.ACCUMULATE` runs the batch of a step in parts.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.solver import build_optimizer as build_detectron2_sgd
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from omegaconf import DictConfig
from torch import nn

from fpn_plugin.engine.accumulate import PARTS_KEY, Accumulator, check_parts
from fpn_plugin.engine.faults.divergence import (
    DivergenceRules,
    LossGuard,
    StepRecorder,
    divergence_rules,
)
from fpn_plugin.modeling.precision import Autocast, amp_dtype, device_type
from fpn_plugin.modeling.python_config import attached, build_part
from fpn_plugin.registry import unknown_name


def _parameters(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Detectron2's parameter groups."""
    solver = cfg.SOLVER
    return get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )


def _build_sgd(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    solver = cfg.SOLVER
    if not solver.FUSED:
        return build_detectron2_sgd(cfg, model)
    return torch.optim.SGD(
        _parameters(cfg, model),
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
        fused=True,
    )


def _build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    solver = cfg.SOLVER
    return torch.optim.AdamW(
        _parameters(cfg, model),
        lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        fused=solver.FUSED or None,
    )


_BUILDERS: dict[str, Callable[[CfgNode, nn.Module], torch.optim.Optimizer]] = {
    "SGD": _build_sgd,
    "AdamW": _build_adamw,
}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `SOLVER.OPTIMIZER` names, over Detectron2's parameter groups; that of the
    Python config where one is attached.

    Raises:
        KeyError: if the name is unknown.
        ValueError: if `SOLVER.FUSED` is set and torch has no fused kernel for the parameters.
    """
    python = attached(cfg)
    if python is not None:
        return build_python_optimizer(python, model)
    name = cfg.SOLVER.OPTIMIZER
    if name not in _BUILDERS:
        raise unknown_name("SOLVER.OPTIMIZER", name, _BUILDERS)
    try:
        optimizer = _BUILDERS[name](cfg, model)
    except RuntimeError as error:
        raise ValueError(f"SOLVER.FUSED: {error}; choose False") from None
    if cfg.SOLVER.FUSED:
        # With a gradient scaler a fused step unscales gradients itself, and so after they were
        # clipped. Switched off where they are clipped, the scaler unscales them before the step.
        optimizer._step_supports_amp_scaling = (  # type: ignore[attr-defined]
            not cfg.SOLVER.CLIP_GRADIENTS.ENABLED
        )
    if isinstance(optimizer, torch.optim.SGD) and not cfg.SOLVER.FUSED:
        return optimizer  # build_detectron2_sgd has added the clipping
    return maybe_add_gradient_clipping(cfg, optimizer)


def build_python_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a Python config, which stays one that can be written down."""
    whole = cfg.copy()
    whole.optimizer.params.model = model
    optimizer: torch.optim.Optimizer = build_part(whole, "optimizer")
    return optimizer


class ScaledTrainer(AMPTrainer):
    """Detectron2's AMPTrainer, which can go on from a run whose gradients were not scaled."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; the scale starts anew if that has none."""
        scale = state_dict.get("grad_scaler") or self.grad_scaler.state_dict()
        super().load_state_dict({**state_dict, "grad_scaler": scale})


def build_step_trainer(
    cfg: CfgNode, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer
) -> SimpleTrainer:
    """Detectron2's trainer of single steps, with autocast and without a scaler for AMP on the CPU.

    Raises:
        KeyError: if `SOLVER.AMP.PRECISION` is unknown.
        ValueError: for fp16 on the CPU, or a bad `SOLVER.MAX_LOSS_RATIO` or `SOLVER.ACCUMULATE`.
    """
    rules, device = divergence_rules(cfg), device_type(cfg)
    return make_step_trainer(
        model, data_loader, optimizer, device, amp_dtype(cfg), rules, cfg.SOLVER.ACCUMULATE
    )


def make_step_trainer(
    model: nn.Module,
    data_loader: Any,
    optimizer: torch.optim.Optimizer,
    device: str,
    dtype: torch.dtype | None,
    rules: DivergenceRules,
    parts: int = 1,
    parts_key: str = PARTS_KEY,
) -> SimpleTrainer:
    """:func:`build_step_trainer` without a config.

    Args:
        device: the type of the device, such as "cpu".
        dtype: what autocast computes in; None for full precision.
        parts: in how many parts a batch is run: `SOLVER.ACCUMULATE`.
        parts_key: the config key of `parts`, for messages.

    Raises:
        ValueError: if `parts` is no whole number from 1 on.
    """
    check_parts(parts_key, parts)
    recorder = StepRecorder(model, device, dtype, rules, parts)
    # bfloat16 has the range of float32: there is nothing to scale
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    called: nn.Module = recorder
    if parts > 1:
        scale = scaler.scale if scaler.is_enabled() else lambda loss: loss
        called = Accumulator(recorder, parts, parts_key, scale)
    options: dict[str, Any] = {"zero_grad_before_forward": parts > 1}
    if dtype is None:
        trainer = SimpleTrainer(called, data_loader, optimizer, **options)
    elif device != "cuda":
        called = Autocast(called, device, dtype)
        trainer = SimpleTrainer(called, data_loader, optimizer, **options)
    else:
        options |= {"grad_scaler": scaler, "precision": dtype}
        trainer = ScaledTrainer(called, data_loader, optimizer, **options)
    trainer.register_hooks([LossGuard(recorder)])
    return trainer
