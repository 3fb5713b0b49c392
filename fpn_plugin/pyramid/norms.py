"""Normalisation layers by Detectron2's names, also for maps of one pixel."""

from __future__ import annotations

import math
from typing import Any, Callable, Mapping, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d, get_norm
from detectron2.layers.batch_norm import LayerNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fpn_plugin.registry import HOW_TO_ADD, Registry, bad_argument, close_name

Module = TypeVar("Module", bound=nn.Module)

# norms of one's own, each a function from the channels to the layer
NORMS: Registry[Callable[[int], nn.Module]] = Registry("norm")
_NAMES = ("BN", "SyncBN", "FrozenBN", "GN", "LN")
_NORMS = (_NormBase, FrozenBatchNorm2d, nn.GroupNorm, nn.LayerNorm, LayerNorm)


class GroupNorm(nn.GroupNorm):
    """torch's, also for a group of one value, which torch refuses from a single image alone.

    Its output is then the bias, as it is in a batch of several images.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, also for a batch with one value per channel: it is normalised by the running
    statistics, which it leaves as they are, since one value has no deviation."""

    def forward(self, x: Tensor) -> Tensor:
        uses_batch = False
        if self.training and x.numel() > x.shape[1]:
            uses_batch = True  # a number of Python's, as a compiler of any size takes no other
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            uses_batch,
            self.momentum,  # type: ignore[arg-type]
            self.eps,
        )


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's, also for one value per channel in a single process: see :class:`BatchNorm2d`."""

    def forward(self, x: Tensor) -> Tensor:
        is_alone = not dist.is_initialized() or dist.get_world_size(self.process_group) == 1
        batch_norm: Any = BatchNorm2d.forward
        return batch_norm(self, x) if is_alone else super().forward(x)


_SINGLE_VALUES: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: GroupNorm,
    nn.BatchNorm2d: BatchNorm2d,
    nn.SyncBatchNorm: SyncBatchNorm,
}


def accept_single_values(
    module: Module, more: Mapping[type[nn.Module], type[nn.Module]] | None = None
) -> Module:
    """Let every norm of a module, in place, take what torch refuses: one value per channel, as the
    coarsest maps of a small image have. Nothing else about them changes.

    Args:
        more: what norms of other libraries become, by their classes.
    """
    classes = {**_SINGLE_VALUES, **(more or {})}
    for layer in module.modules():
        if type(layer) in classes and _is_plain(layer):
            layer.__class__ = classes[type(layer)]  # as torch's lazy modules become others
    return module


def _is_plain(norm: Any) -> bool:
    """Whether it is no batch norm, or one with running statistics that are averaged as usual."""
    if not isinstance(norm, _NormBase):
        return True
    return norm.track_running_stats and norm.momentum is not None


def norm_layer(norm: str, channels: int) -> nn.Module | None:
    """Detectron2's normalisation layer of that name over `channels`, or one of `NORMS`; None for
    "".

    Unlike torch's, it also takes a map of 1x1 pixels of a single image, see
    :func:`accept_single_values`.

    Raises:
        ValueError: naming `norm`, if the name is unknown or does not divide the channels.
    """
    try:
        layer = NORMS.get(norm)(channels) if norm in NORMS else get_norm(norm, channels)
        return layer if layer is None else accept_single_values(layer)
    except KeyError:
        names = [*_NAMES, *NORMS.names()]
        close = close_name(norm, names)
        hint = f" (did you mean {close!r}?)" if close else ""
        text = f"unknown norm {norm!r}{hint}; choose from {', '.join(names)}; {HOW_TO_ADD}"
        raise bad_argument("norm", text) from None
    except ValueError as error:  # torch's GroupNorm: channels must be divisible by groups
        raise bad_argument(
            "norm",
            f"{norm!r} cannot normalise {channels} channels (`out_channels`): {error};"
            " GN has 32 groups, so take a multiple of 32",
        ) from None


def narrow_norm(norm: str, channels: int) -> nn.Module | None:
    """:func:`norm_layer` for a map inside an operator, of a few channels: GN gets groups of 8
    channels instead of 32 groups, which is as large as 32 groups of 256 channels."""
    if norm == "GN":
        return GroupNorm(channels // math.gcd(channels, 8), channels)
    return norm_layer(norm, channels)


def set_norm(module: nn.Module, eps: float, momentum: float) -> nn.Module:
    """Set eps and momentum of every normalisation layer inside a module; 0 keeps the layer's own.

    Momentum applies only to layers with running statistics.
    """
    for layer in module.modules():
        if isinstance(layer, _NORMS):
            if eps:
                layer.eps = eps
            if momentum and isinstance(layer, _NormBase):
                layer.momentum = momentum
    return module
