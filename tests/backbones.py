"""Backbones that are cheap to build and run: one convolution per level under a real pyramid."""

from __future__ import annotations

from typing import Any, Mapping

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from fpn_plugin import PyramidBackbone

LEVELS = (2, 3, 4, 5)
NARROW = {2: 8, 3: 16, 4: 24, 5: 48}


class Toy(Backbone):
    """A 3x3 convolution per level; the first has the stride of its level."""

    def __init__(self, channels: Mapping[int, int]) -> None:
        super().__init__()
        self.channels = dict(channels)
        width, level = 3, 0
        for to, out in channels.items():
            conv = nn.Conv2d(width, out, 3, stride=2 ** (to - level), padding=1)
            self.add_module(f"res{to}", conv)
            width, level = out, to

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name, conv in self.named_children():
            maps[name] = x = conv(x)
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        shapes = {}
        for level, width in self.channels.items():
            shapes[f"res{level}"] = ShapeSpec(channels=width, stride=2**level)
        return shapes


def toy_backbone(
    channels: Mapping[int, int] = NARROW, out_channels: int = 8, **arguments: Any
) -> PyramidBackbone:
    """A pyramid over `Toy`, with the inputs that the graph reads."""
    levels = list(channels)
    if arguments.get("graph"):
        read = str(arguments["graph"])
        levels = [level for level in levels if f"'res{level}'" in read]
    names = [f"res{level}" for level in levels]
    return PyramidBackbone(Toy(channels), in_features=names, out_channels=out_channels, **arguments)


def bifpn(cells: int) -> list[dict[str, Any]]:
    """BiFPN (arXiv:1911.09070) over res3, res4 and res5, as `MODEL.FPN.GRAPH` has it."""
    six = {"source": "res5", "project": "conv1x1"}
    nodes: list[dict[str, Any]] = [
        {"name": "in6", "level": 6, "inputs": [six]},
        {"name": "in7", "level": 7, "inputs": ["in6"]},
    ]
    now = {3: "res3", 4: "res4", 5: "res5", 6: "in6", 7: "in7"}

    def add(name: str, level: int, inputs: list[str]) -> str:
        block = {"fuse": "fast_normalized", "block": "separable"}
        nodes.append({"name": name, "level": level, "inputs": inputs, **block})
        return name

    for cell in range(1, cells + 1):
        down, up = {7: now[7]}, {}
        for level in (6, 5, 4):
            down[level] = add(f"c{cell}_td{level}", level, [now[level], down[level + 1]])
        up[3] = add(f"c{cell}_p3", 3, [now[3], down[4]])
        for level in (4, 5, 6):
            inputs = [now[level], down[level], up[level - 1]]
            up[level] = add(f"c{cell}_p{level}", level, inputs)
        up[7] = add(f"c{cell}_p7", 7, [now[7], up[6]])
        now = up
    return [{**item, "output": item["name"] in now.values()} for item in nodes]
