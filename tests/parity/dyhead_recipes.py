"""DyHead behind FPN against feneck, which upsamples first as we do, and against MMDetection, whose
order is the published one.

MMDetection's convolution needs a compiled operator; torchvision's takes its place. It checks sizes,
as MMDetection's does not: there, offsets of a finer map's size are read as if they had the coarser
map's, from the beginning of each image's memory.
"""

from __future__ import annotations

import re
from typing import Any, Mapping, Sequence

import openmmlab
import torch
from references import Maps, Reference, State, recipe
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from fpn_plugin.pyramid import Pyramid, Style, op
from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.resolve import Defaults

DEPTH = 6
# of feneck and MMDetection, and ours
NAMES = {
    r"dyhead_tower|dyhead_blocks": "blocks",
    r"conv_list\.2|spatial_conv_low": "finer",
    r"conv_list\.1|spatial_conv_mid": "same",
    r"conv_list\.0|spatial_conv_high": "coarser",
    r"offset_conv|spatial_conv_offset": "offset",
    r"attention_conv\.1|scale_attn_module\.1": "scale",
    r"dyrelu\.fc\.0|task_attn_module\.conv1": "squeeze",
    r"dyrelu\.fc\.2|task_attn_module\.conv2": "excite",
    r"\.conv\.": ".",
}


def pyramid(channels: Mapping[int, int], width: int, step: Any) -> Pyramid:
    inputs = {f"res{level}": level for level in channels}
    graph = build_graph("fpn+dyhead", inputs, Style())
    sizes = {f"res{level}": count for level, count in channels.items()}
    return Pyramid(graph, sizes, Defaults(width))


class MisreadConv(nn.Module):
    """MMDetection's convolution: parameters as there."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.stride = like.weight, like.bias, like.stride

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        n, (h, w) = len(x), (-(-side // self.stride[0]) for side in x.shape[2:])
        offset = offset.flatten(1)[:, : 18 * h * w].reshape(n, 18, h, w)
        mask = mask.flatten(1)[:, : 9 * h * w].reshape(n, 9, h, w)
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, (1, 1), mask=mask)


def run(theirs: nn.Module, maps: Maps) -> Sequence[Tensor]:
    levels = theirs["fpn"](list(maps.values()))
    return theirs["dyhead"](list(levels))
