"""Convolutions that pad as TensorFlow does for "same", in a form that torch.export can follow."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class IntegerSame(nn.Module):
    """timm's `Conv2dSame` with its padding by whole numbers: the same values. timm divides and
    rounds up, which torch.export works out for minutes, and cannot save."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        padding: list[Any] = []
        for side, kernel, stride, dilation in zip(
            x.shape[-2:], conv.kernel_size, conv.stride, conv.dilation
        ):
            # up to a whole number of strides, and what the last window sticks out
            total = (kernel - 1) * dilation + 1 - stride + -side % stride
            padding = [total // 2, total - total // 2, *padding]  # F.pad takes the last axis first
        x = F.pad(x, padding)
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, (0, 0), conv.dilation, conv.groups)


def with_integer_padding(network: nn.Module) -> nn.Module:
    """A copy of the network with `IntegerSame` in it; the network itself if it needs none."""
    names = [name for name, part in network.named_modules() if _is_same(part)]
    if not names:
        return network
    network = copy.deepcopy(network)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, IntegerSame(network.get_submodule(name)))
    return network


def _is_same(part: nn.Module) -> bool:
    """Whether it is timm's, with a kernel as large as its stride at least."""
    if type(part).__name__ != "Conv2dSame":
        return False
    kernels, strides = part.kernel_size, part.stride
    return all(kernel >= stride for kernel, stride in zip(kernels, strides))  # type: ignore
