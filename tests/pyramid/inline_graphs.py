"""Shapes that the catalogue does not have, as inline graphs: EfficientDet's cell with inputs that are
projected twice, Feature Pyramid Grids' convolutions on edges, and ASFF's all-to-all."""

from __future__ import annotations

from typing import Any

from helpers import CHANNELS, randomize

from fpn_plugin.pyramid.graph_yaml import parse_graph
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults

PRE = {"order": "act-conv-norm", "activation": "silu"}
INLINE = {
    "bifpn": [
        {
            "name": "in6",
            "level": 6,
            "inputs": [{"source": "res5", "project": {"name": "conv1x1", "activation": ""}}],
        },
        {
            "name": "td5",
            "level": 5,
            "inputs": ["res5", "in6"],
            "block": {"name": "separable", **PRE},
        },
        {
            "name": "td4",
            "level": 4,
            "inputs": ["res4", "td5"],
            "block": {"name": "separable", **PRE},
        },
        {"name": "out4", "level": 4, "inputs": ["res4", "td4"], "output": True},
        {"name": "out5", "level": 5, "inputs": ["res5", "td5", "out4"], "output": True},
        {"name": "out6", "level": 6, "inputs": ["in6", "out5"], "output": True},
    ],
    "fpg": [
        {"name": "l4", "level": 4, "inputs": ["res4"], "block": "conv1x1"},
        {
            "name": "a5",
            "level": 5,
            "inputs": ["res5", {"source": "l4", "resample": {"name": "conv", **PRE}}],
        },
        {
            "name": "b4",
            "level": 4,
            "inputs": [
                {"source": "l4", "block": {"name": "conv1x1", **PRE}},
                {"source": "a5", "block": {"name": "conv3x3", **PRE}},
            ],
            "output": True,
        },
        {"name": "b5", "level": 5, "inputs": ["a5"], "output": True, "block": "conv3x3"},
    ],
    "asff": [
        {"name": f"out{level}", "level": level, "inputs": ["res4", "res5"], "block": "conv3x3"}
        for level in (4, 5)
    ],
}


def inline_pyramid(name: str, **defaults: Any) -> Pyramid:
    graph = parse_graph({"res4": 4, "res5": 5}, INLINE[name])
    return randomize(Pyramid(graph, CHANNELS, Defaults(32, **defaults)))
