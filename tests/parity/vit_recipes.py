"""Pyramids from several maps of one level: LW-DETR's projector as in transformers, and the levels of
BEiT's segmenter as in mmseg.

The inputs of a `Reference` are one map of each level, so that of level 4 holds the ViT's maps one
after another in its channels.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, Mapping, Sequence

from openmmlab import file_of
from references import Maps, Reference, State, recipe
from torch import Tensor, nn

from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.graph import op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.topologies import Style

COUNT = 4  # maps of the ViT
# as in configs/pyramids/projector.yaml
C2F = op("c2f", depth=3, shortcut=False)
PROJECTOR: dict[str, Any] = {
    "upsample": op("deconv", shrink=True, reduce_above=512),
    "downsample": op("conv", activation="relu"),
    "norm": "BN",
    "activation": "silu",
}
RULES = (
    (r"scale_layers\.(\d)", lambda match: f"pyramid.projector_#{int(match[1]) + 3}"),
    (r"#(\d)\.layer_norm", r"output\1.norm"),
    (r"#(\d)\.projector_layer", r"mix\1"),
    (r"#3\.sampling_layers\.(\d)", r"mix3_edge\1.resample"),
    (r"#5\.sampling_layers\.(\d)\.layers", r"mix5_edge\1.resample.convs"),
    (r"bottlenecks\.(\d)\.conv(\d)\.conv", r"units.\1.conv\2"),
    (r"bottlenecks\.(\d)", r"units.\1"),
    (r"(mix\d)\.conv1(\.conv)?", r"\1.main"),
    (r"(mix\d)\.conv2(\.conv)?", r"\1.final"),
    (r"\.0\.conv\.weight", ".0.weight"),
)


class OneLevel(nn.Module):
    """A pyramid on the ViT's maps, called with them in one."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid

    def forward(self, maps: Maps) -> Maps:
        return self.pyramid(dict(zip(self.pyramid.graph.inputs, maps["res4"].chunk(COUNT, 1))))


def ours(topology: str, embed: int, width: int, style: Style, **defaults: Any) -> OneLevel:
    inputs = {f"res4_{number}": 4 for number in range(1, COUNT + 1)}
    graph = build_graph(topology, inputs, style)
    return OneLevel(Pyramid(graph, dict.fromkeys(inputs, embed), Defaults(width, **defaults)))


def run(module: nn.Module, maps: Maps) -> Sequence[Tensor]:
    return module(list(maps["res4"].chunk(COUNT, 1)))


def lw_detr(embed: int, width: int, count: int = COUNT) -> nn.Module:
    from transformers.models.lw_detr.modeling_lw_detr import LwDetrMultiScaleProjector

    config = SimpleNamespace(
        backbone_config=SimpleNamespace(hidden_size=embed, out_indices=list(range(count))),
        projector_scale_factors=[2.0, 1.0, 0.5],
        d_model=width,
        hidden_expansion=0.5,
        c2f_num_blocks=3,
        activation_function="silu",
        batch_norm_eps=1e-5,
    )
    return LwDetrMultiScaleProjector(config)


def from_lw_detr(state: State) -> Maps:
    return {_renamed(name): x for name, x in state.items()}


def _renamed(name: str) -> str:
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


@recipe("projector", levels=(4,), sizes=((12, 20), (13, 9)), parameters=6_696_448)
def projector(channels: Mapping[int, int], width: int) -> Reference:
    embed = channels[4] // COUNT
    module = ours("projector", embed, width, Style(block=C2F), **PROJECTOR)
    return Reference(module, lw_detr(embed, width), run, from_lw_detr)


class Segmenter(nn.Module):
    """The levels of mmseg, and the laterals that ours has."""

    def __init__(self, embed: int, width: int) -> None:
        super().__init__()
        neck = file_of("mmseg", "models/necks/featurepyramid.py").Feature2Pyramid
        self.neck = neck(embed, norm_cfg={"type": "BN"})
        self.laterals = nn.ModuleList(nn.Conv2d(embed, width, 1) for _ in range(COUNT))

    def forward(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        return [lateral(x) for lateral, x in zip(self.laterals, self.neck(maps))]


def from_mmseg(state: State) -> Maps:
    renamed = {}
    for name, x in state.items():
        name = re.sub(r"neck\.upsample_4x", "output2_edge0.resample.layers", name)
        name = re.sub(r"neck\.upsample_2x", "output3_edge0.resample.layers", name)
        name = re.sub(r"laterals\.(\d)", lambda match: f"output{int(match[1]) + 2}", name)
        renamed[f"pyramid.feature2pyramid_{name}"] = x
    return renamed


# mmseg rounds odd sizes down
@recipe("feature2pyramid", levels=(4,), sizes=((12, 20), (8, 6)), parameters=1_050_880)
def feature2pyramid(channels: Mapping[int, int], width: int) -> Reference:
    embed = channels[4] // COUNT
    style = Style(lateral=op("conv1x1", norm=""))
    module = ours("feature2pyramid", embed, width, style, norm="BN")
    return Reference(module, Segmenter(embed, width), run, from_mmseg)
