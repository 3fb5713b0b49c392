"""DyHead behind FPN against feneck, which upsamples first as we do, and against MMDetection, whose
order is the published one. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import re
from typing import Any, Mapping, Sequence

import openmmlab
from references import Maps, Reference, State, recipe
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from fpn_plugin.pyramid import Pyramid
from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.resolve import Defaults

STEP = "s2_dyhead"
SIZES = ((12, 20), (7, 11))
# the names of feneck and MMDetection, and ours
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


class MisreadingConv(nn.Module):
    """MMDetection's convolution without its compiled operator, which checks no sizes: offsets of a
    finer map's size it reads as if they were of the coarser one's, from the start of each image."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.stride = like.weight, like.bias, like.stride

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        height, width = (-(-side // self.stride[0]) for side in x.shape[2:])
        count, size = height * width, (len(x), -1, height, width)
        offset = offset.flatten(1)[:, : 18 * count].reshape(size)
        mask = mask.flatten(1)[:, : 9 * count].reshape(size)
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, (1, 1), mask=mask)


def reference(
    channels: Mapping[int, int], width: int, theirs: nn.Module, topology: str
) -> Reference:
    """FPN with a dynamic head.

    Args:
        theirs: the head.
        topology: ours.
    """
    counts = {f"res{level}": count for level, count in channels.items()}
    graph = build_graph(topology, {f"res{level}": level for level in channels})
    FPN = openmmlab.neck("mmdet.models.necks", "FPN")
    both = nn.ModuleDict({"fpn": FPN(list(channels.values()), width, len(channels))})
    both["dyhead"] = theirs

    def convert(state: State) -> Maps:
        return dict(_ours(name, x, list(channels)) for name, x in state.items())

    return Reference(Pyramid(graph, counts, Defaults(width)), both, run, convert)


def run(theirs: Any, maps: Maps) -> Sequence[Tensor]:
    return theirs["dyhead"](theirs["fpn"](list(maps.values())))


def _ours(name: str, x: Tensor, levels: Sequence[int]) -> tuple[str, Tensor]:
    for kind, ours in {"lateral": "fpn_lateral", "fpn": "fpn_output"}.items():
        if match := re.fullmatch(rf"fpn\.{kind}_convs\.(\d)\.conv\.(\w+)", name):
            return f"{ours}{levels[int(match[1])]}.{match[2]}", x
    name = name.replace("dyhead", STEP, 1)
    for theirs, ours in NAMES.items():
        name = re.sub(theirs, ours, name)
    # feneck's attention is linear in pooled values, ours is a 1×1 convolution of pooled maps
    is_linear = re.search(r"(squeeze|excite)\.weight", name) and x.dim() == 2
    return name, x[:, :, None, None] if is_linear else x


def depth_of(width: int) -> int:
    """The paper's; fewer for the comparison of maps: where a tap crosses a pixel its gradient
    jumps, and six blocks make enough of rounding for that."""
    return 6 if width == 256 else 2


@recipe("dyhead", width=16, sizes=SIZES, parameters=14_187_560)
def natural(channels: Mapping[int, int], width: int) -> Reference:
    from feneck.dyhead import DyHead

    strides, depth = [2**level for level in channels], depth_of(width)
    theirs = DyHead([width] * len(channels), strides, width, num_blocks=depth)
    return reference(channels, width, theirs, f"fpn+dyhead(depth={depth})")


@recipe("dyhead_published", width=16, sizes=SIZES)
def published(channels: Mapping[int, int], width: int) -> Reference:
    depth = depth_of(width)
    theirs = openmmlab.neck("mmdet.models.necks", "DyHead")(width, width, num_blocks=depth)
    for block in theirs.dyhead_blocks:
        for part in (block.spatial_conv_low, block.spatial_conv_mid, block.spatial_conv_high):
            part.conv = MisreadingConv(part.conv)
    return reference(channels, width, theirs, f"fpn+dyhead(depth={depth}, published_order=True)")
