"""Single operators in a graph of one node: attention blocks against timm's, `adown` against libreyolo's."""

from __future__ import annotations

from typing import Any, Callable, Mapping

from references import Reference, recipe
from torch import nn

from fpn_plugin.pyramid import Edge, Graph, Pyramid, node, op
from fpn_plugin.pyramid.resolve import Defaults

PROJECTION = 1024 * 256  # of R50's level 4, without a bias


def renamed(names: Mapping[str, str]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A conversion by the beginnings of names."""

    def convert(state: Mapping[str, Any]) -> dict[str, Any]:
        converted = {}
        for key, x in state.items():
            (old,) = (old for old in names if key.startswith(f"{old}."))
            converted[names[old] + key[len(old) :]] = x
        return converted

    return convert


def attention(name: str, theirs: nn.Module, names: Mapping[str, str], width: int) -> Callable:
    """Ours after its own 1×1 convolution with BN, and theirs after another."""

    def build(channels: Mapping[int, int]) -> Reference:
        graph = Graph({"res4": 4}, (node("out", 4, ["res4"], block=op(name)),), ("out",))
        ours = Pyramid(graph, {"res4": channels[4]}, Defaults(width, norm="BN"))
        before = nn.Sequential(nn.Conv2d(channels[4], width, 1, bias=False), nn.BatchNorm2d(width))
        names_of_all = {"0.0": "out.conv", "0.1": "out.conv.norm"}
        names_of_all.update({f"1.{old}": f"out.{new}" for old, new in names.items()})
        return Reference(
            ours,
            nn.Sequential(before, theirs),
            lambda module, maps: [module(maps["res4"])],
            renamed(names_of_all),
        )

    return build


@recipe("se", levels=(4,), width=64, parameters=PROJECTION + 512 + 8464)
def squeeze_excitation(channels: Mapping[int, int], width: int) -> Reference:
    from timm.layers import SEModule

    theirs = SEModule(width, rd_channels=width // 16)
    return attention("se", theirs, {"fc1": "reduce", "fc2": "expand"}, width)(channels)


@recipe("eca", levels=(4,), width=128, parameters=PROJECTION + 512 + 5)
def efficient_channel_attention(channels: Mapping[int, int], width: int) -> Reference:
    from timm.layers import EcaModule

    return attention("eca", EcaModule(channels=width), {"conv": "weigh"}, width)(channels)


@recipe("cbam", levels=(4,), width=64, parameters=PROJECTION + 512 + 8564)
def cbam(channels: Mapping[int, int], width: int) -> Reference:
    """timm takes the mean before the maximum, the authors' code after it."""
    from timm.layers.cbam import CbamModule

    names = {"channel.fc1": "reduce", "channel.fc2": "expand"}
    names.update({"spatial.conv.conv": "spatial", "spatial.conv.bn": "spatial.norm"})
    reference = attention("cbam", CbamModule(width, mlp_bias=True), names, width)(channels)

    def convert(state: Mapping[str, Any]) -> dict[str, Any]:
        converted = reference.convert(state)
        if "out.spatial.weight" in converted:
            converted["out.spatial.weight"] = converted["out.spatial.weight"].flip(1)
        return converted

    return Reference(reference.ours, reference.theirs, reference.run, convert)


@recipe("coord", levels=(4,), width=32, parameters=PROJECTION + 512 + 6680)
def coordinate_attention(channels: Mapping[int, int], width: int) -> Reference:
    from timm.layers.coord_attn import CoordAttn

    theirs = CoordAttn(width, rd_channels=8, bias=True)
    names = {"conv1": "reduce", "bn1": "reduce.norm", "conv_h": "rows", "conv_w": "columns"}
    return attention("coord", theirs, names, width)(channels)


@recipe("adown", levels=(4,), sizes=((24, 40), (14, 22)), parameters=PROJECTION + 512 + 164352)
def adown(channels: Mapping[int, int], width: int) -> Reference:
    """On even sizes, as the reference rounds odd ones down."""
    from libreyolo.models.yolo9.nn import ADown

    edge = Edge("res4", resample=op("adown"))
    graph = Graph({"res4": 4}, (node("out", 5, [edge]),), ("out",))
    settings = Defaults(width, norm="BN", norm_eps=1e-3, norm_momentum=0.03)
    norm = nn.BatchNorm2d(width, eps=1e-3, momentum=0.03)
    before = nn.Sequential(nn.Conv2d(channels[4], width, 1, bias=False), norm)
    step = "out_edge0.resample.layers.0"
    names = {"0.0": "out_edge0.project", "0.1": "out_edge0.project.norm"}
    names.update({"1.cv1.conv": f"{step}.conv", "1.cv1.bn": f"{step}.conv.norm"})
    names.update({"1.cv2.conv": f"{step}.pooled", "1.cv2.bn": f"{step}.pooled.norm"})
    return Reference(
        Pyramid(graph, {"res4": channels[4]}, settings),
        nn.Sequential(before, ADown(width, width)),
        lambda module, maps: [module(maps["res4"])],
        renamed(names),
    )
