"""Optimizers by `SOLVER.OPTIMIZER`: Detectron2's SGD; AdamW with the same groups and clipping; both
fused if `SOLVER.FUSED`."""

from __future__ import annotations

from typing import Any, Callable

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_detectron2_sgd
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

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
    """The optimizer that `SOLVER.OPTIMIZER` names, over Detectron2's parameter groups.

    Raises:
        KeyError: if the name is unknown.
        ValueError: if `SOLVER.FUSED` and torch has no fused kernel for the parameters.
    """
    name = cfg.SOLVER.OPTIMIZER
    if name not in _BUILDERS:
        raise unknown_name("SOLVER.OPTIMIZER", name, _BUILDERS)
    try:
        optimizer = _BUILDERS[name](cfg, model)
    except RuntimeError as error:
        raise ValueError(f"SOLVER.FUSED: {error}; choose False") from None
    if cfg.SOLVER.FUSED:
        # With a gradient scaler a fused step would unscale by itself, after the gradients were
        # clipped; without this it unscales them before the step.
        optimizer._step_supports_amp_scaling = (  # type: ignore[attr-defined]
            not cfg.SOLVER.CLIP_GRADIENTS.ENABLED
        )
    if isinstance(optimizer, torch.optim.SGD) and not cfg.SOLVER.FUSED:
        return optimizer  # Detectron2 has seen to the clipping
    return maybe_add_gradient_clipping(cfg, optimizer)
