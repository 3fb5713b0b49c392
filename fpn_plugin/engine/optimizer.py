"""Optimizers by `SOLVER.OPTIMIZER`: Detectron2's SGD; AdamW with the same groups and clipping."""

from __future__ import annotations

from typing import Callable

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from fpn_plugin.registry import unknown_name


def _build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    solver = cfg.SOLVER
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    adamw = torch.optim.AdamW(params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    return maybe_add_gradient_clipping(cfg, adamw)


_BUILDERS: dict[str, Callable[[CfgNode, nn.Module], torch.optim.Optimizer]] = {
    "SGD": build_sgd,
    "AdamW": _build_adamw,
}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `SOLVER.OPTIMIZER` names, over Detectron2's parameter groups.

    Raises:
        KeyError: if the name is unknown.
    """
    name = cfg.SOLVER.OPTIMIZER
    if name not in _BUILDERS:
        raise unknown_name("SOLVER.OPTIMIZER", name, _BUILDERS)
    return _BUILDERS[name](cfg, model)
