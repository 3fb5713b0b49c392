"""Options that make a model faster: memory layout, compilation, and folding and casting weights
for inference.

No option changes the model's results, up to rounding, or the keys of its checkpoints.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fpn_plugin.bottom_up.base import AdaptedBackbone
from fpn_plugin.compat import COMPILE as COMPILE_TORCH
from fpn_plugin.compat import require_torch
from fpn_plugin.config.validate import plugin_config
from fpn_plugin.evaluation.augmentation import augment_at_test_time
from fpn_plugin.modeling.fold import cast_weights, fold_norms, fold_traced
from fpn_plugin.modeling.pooling import gather_poolers
from fpn_plugin.modeling.precision import Autocast, amp_dtype, device_type
from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.registry import unknown_name

COMPILE = ("", "pyramid", "backbone")


@dataclass(frozen=True)
class Speed:
    """The options that make a model faster.

    Attributes:
        device: the type of the device, such as "cpu".
        dtype: autocast's type; None for full precision.
        channels_last: `MODEL.CHANNELS_LAST`.
        fold_norms: `TEST.FOLD_NORMS`.
        compile: `MODEL.COMPILE`, one of `COMPILE`.
        fast_roi_align: `MODEL.FAST_ROI_ALIGN`.
        where: the config key of `compile`, for messages.

    Raises:
        KeyError: if `compile` is unknown.
    """

    device: str = "cpu"
    dtype: torch.dtype | None = None
    channels_last: bool = False
    fold_norms: bool = False
    compile: str = ""
    fast_roi_align: bool = False
    where: str = "MODEL.COMPILE"

    def __post_init__(self) -> None:
        if self.compile not in COMPILE:
            raise unknown_name(self.where, self.compile, COMPILE)
        if self.compile:
            require_torch(COMPILE_TORCH, f"{self.where}: {self.compile!r}", "choose ''")


def speed_of(cfg: CfgNode) -> Speed:
    """The options of a config.

    Raises:
        KeyError: for an unknown value of `MODEL.COMPILE` or `SOLVER.AMP.PRECISION`.
        ValueError: for fp16 on the CPU.
    """
    cfg = plugin_config(cfg)
    return Speed(
        device_type(cfg),
        amp_dtype(cfg),
        cfg.MODEL.CHANNELS_LAST,
        cfg.TEST.FOLD_NORMS,
        cfg.MODEL.COMPILE,
        cfg.MODEL.FAST_ROI_ALIGN,
    )


def prepare_for_training(model: nn.Module, cfg: CfgNode | Speed) -> nn.Module:
    """Set the model's memory layout, replace its poolers and compile it, in place.

    Parameters keep their names. `SOLVER.AMP` is applied by the step trainer, not here.

    Raises:
        ValueError: (KeyError for an unknown value) naming the key, if the model lacks what
            `MODEL.COMPILE` names.
    """
    speed = cfg if isinstance(cfg, Speed) else speed_of(cfg)
    if speed.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if speed.fast_roi_align:
        gather_poolers(model)
    if speed.channels_last or speed.fast_roi_align:
        _keep_keypoint_logits_contiguous(model)
    compile_part(model, speed.compile, speed.where)
    return model


def _keep_keypoint_logits_contiguous(model: nn.Module) -> None:
    """Let keypoint heads give contiguous logits, as Detectron2's loss calls `view` on them."""
    for head in [m for m in model.modules() if isinstance(m, BaseKeypointRCNNHead)]:
        last = getattr(head, "score_lowres", None)
        if isinstance(last, nn.Module):  # only bilinear upsampling follows, which keeps the layout
            if _contiguous_output not in last._forward_hooks.values():
                last.register_forward_hook(_contiguous_output)
        elif _contiguous_input not in head._forward_pre_hooks.values():  # a head of the user's
            head.to(memory_format=torch.contiguous_format)
            head.register_forward_pre_hook(_contiguous_input)


def _contiguous_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.contiguous()


def _contiguous_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part.contiguous() if isinstance(part, Tensor) else part for part in inputs)


def prepare_for_inference(model: nn.Module, cfg: CfgNode | Speed) -> nn.Module:
    """A model with the results of `model` in evaluation mode, as fast as the config allows.

    It is an independent copy in evaluation mode if weights change, and the model itself otherwise.
    Weights change if norms are folded, and under autocast, where they are cast once instead of in
    every forward pass.

    Raises:
        The errors of :func:`prepare_for_training`.
    """
    speed = cfg if isinstance(cfg, Speed) else speed_of(cfg)
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if speed.fold_norms or speed.dtype is not None:
        model = copy.deepcopy(model).eval().requires_grad_(False)
    if speed.fold_norms:
        fold_norms(model)
        for network in [m for m in model.modules() if isinstance(m, AdaptedBackbone)]:
            fold_traced(network)
    if speed.dtype is not None:
        cast_weights(model, speed.dtype)
    prepare_for_training(model, speed)
    return model if speed.dtype is None else Autocast(model, speed.device, speed.dtype)


def augmented(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """A model of :func:`prepare_for_inference` with test-time augmentation, in its precision."""
    if isinstance(model, Autocast):
        return Autocast(augment_at_test_time(cfg, model.model), model.device, model.dtype)
    return augment_at_test_time(cfg, model)


def compile_part(model: nn.Module, part: str, where: str = "MODEL.COMPILE") -> None:
    """Compile a part of the model with `torch.compile`, for any image size, in place.

    Args:
        part: one of `COMPILE`.
        where: the config key of `part`, for messages.

    Raises:
        ValueError: if the model has no such part.
        KeyError: if `part` is unknown.
    """
    if part not in COMPILE:
        raise unknown_name(where, part, COMPILE)
    if not part:
        return
    backbone: Any = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(
            f"{where}: {part!r} needs a model with a backbone, but {type(model).__name__} has none;"
            " choose ''"
        )
    if part == "backbone":
        backbone.compile(dynamic=True)
        return
    if not isinstance(backbone, GraphExecutor):
        raise ValueError(
            f"{where}: 'pyramid' needs this plugin's pyramid (MODEL.BACKBONE.NAME"
            f" build_pyramid_backbone), but the backbone is {type(backbone).__name__}; choose"
            " 'backbone' or ''"
        )
    backbone.compile_graph(dynamic=True)
