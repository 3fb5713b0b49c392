"""A model made ready as its config asks: the one place that knows how this plugin runs a model."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any, ContextManager

import torch
from detectron2.config import CfgNode
from torch import nn

from fpn_plugin.analysis.benchmark.neck import neck_of
from fpn_plugin.engine.precision import Autocast, amp_dtype, device_type
from fpn_plugin.engine.speed import compile_part, prepare_for_inference, prepare_for_training


@dataclass(frozen=True)
class Ready:
    """A model that is about to be timed.

    Attributes:
        model: without any autocast around it.
        device: its kind: "cuda", "cpu".
        dtype: what autocast computes in; None for full precision.
        compiled: the part that `torch.compile` has: `MODEL.COMPILE`.
    """

    model: Any
    device: str
    dtype: torch.dtype | None
    compiled: str = ""

    def precision(self) -> str:
        """The name of the type that it computes in."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def autocast(self) -> ContextManager[None]:
        """What its forward runs in. Weights are cast anew each time, as in use."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype)

    def neck(self) -> nn.Module:
        """The model's pyramid, compiled if it is compiled there."""
        made = neck_of(self.model.backbone)
        holder = nn.Module()
        holder.add_module("backbone", made)
        compile_part(holder, self.compiled)  # a copy has lost what was compiled
        return made


def prepare(model: nn.Module, cfg: CfgNode, training: bool) -> Ready:
    """A copy of `model` on the config's device, in the mode and with the levers it asks for."""
    made = copy.deepcopy(model).to(cfg.MODEL.DEVICE).train(training)
    made = prepare_for_training(made, cfg) if training else prepare_for_inference(made, cfg)
    dtype = amp_dtype(cfg)
    if isinstance(made, Autocast):
        dtype, made = made.dtype, made.model
    return Ready(made, device_type(cfg), dtype, cfg.MODEL.COMPILE)


def without_levers(cfg: CfgNode, *, keep_types: bool = False) -> CfgNode:
    """The config uncompiled, and in full precision and plain layout too.

    Args:
        keep_types: leave precision and layout as they are.
    """
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.COMPILE = ""
    if not keep_types:
        plain.MODEL.CHANNELS_LAST = plain.SOLVER.AMP.ENABLED = plain.TEST.FOLD_NORMS = False
    return plain
