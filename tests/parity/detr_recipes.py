"""The hybrid encoders of RT-DETR, D-FINE and DEIMv2 as in `transformers`."""

from __future__ import annotations

from typing import Any, Mapping, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from references import Maps, Reference, State, recipe
from torch import Tensor, nn

from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.graph import as_operator
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.topologies import Style

SIZES = ((24, 40), (20, 20), (13, 21))
# what each part is called, in the reference and here
ATTENTION = {
    "self_attn.o_proj": "out",
    "self_attn.v_proj": "value",
    "self_attn_layer_norm": "norm1",
    **{f"mlp.fc{i}": f"linear{i}" for i in (1, 2)},
    **{f"mlp.layers.{i - 1}": f"linear{i}" for i in (1, 2)},
    "final_layer_norm": "norm2",
}
CSP = {"conv1": "main", "conv2": "short", "bottlenecks": "units", "conv3": "final"}
SPLIT = {"conv1": "split", "bottlenecks": "units", "conv2": "final"}
ELAN = {"conv1": "split", "csp_rep1": "first.0", "conv2": "first.1"}
ELAN |= {"csp_rep2": "second.0", "conv3": "second.1", "conv4": "final"}
ELAN5 = {"conv1": "split", "csp_rep1": "first", "csp_rep2": "second", "conv2": "final"}


class Encoder(nn.Module):
    """The reference with the laterals that its detector has: a 1x1 and a batch norm each."""

    def __init__(self, channels: Sequence[int], width: int, encoder: nn.Module) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(count, width, 1, bias=False), nn.BatchNorm2d(width))
            for count in channels
        )
        self.encoder = encoder

    def forward(self, maps: list[Tensor]) -> Any:
        maps = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        sizes, resize = [list(x.shape[2:]) for x in maps[:-1]], F.interpolate

        def meet(x: Tensor, **options: Any) -> Tensor:
            """The reference doubles; here it also meets odd sizes."""
            return resize(x, size=sizes.pop(), mode="nearest")

        with mock.patch.object(F, "interpolate", meet):
            outputs = self.encoder(inputs_embeds=maps)
        return getattr(outputs, "last_hidden_state", None) or outputs.feature_maps


def converter(levels: Sequence[int], elan: Mapping[str, str]) -> Any:
    """What turns the reference's names into ours."""
    levels = sorted(levels)
    inner = CSP if elan is not ELAN5 else SPLIT

    def fused(rest: str) -> str:
        first, _, rest = rest.partition(".")
        if not elan:
            return unit(f"{CSP[first]}.{rest}")
        if not first.startswith("csp_rep"):
            return f"{elan[first]}.{leaf(rest)}"
        second, _, rest = rest.partition(".")
        return f"{elan[first]}.{unit(f'{inner[second]}.{rest}')}"

    def unit(name: str) -> str:
        parts = name.split(".")
        if parts[0] != "units":
            return f"{parts[0]}.{leaf('.'.join(parts[1:]))}"
        conv = {"conv1": "conv3", "conv2": "conv1"}[parts[2]]
        return f"units.{parts[1]}.{conv}.{leaf('.'.join(parts[3:]))}"

    def leaf(name: str) -> str:
        return name.removeprefix("conv.")

    def ours(name: str) -> str:
        part, _, rest = name.partition(".")
        if part == "laterals":
            index, layer, kind = rest.split(".")
            return f"hybrid_lateral{levels[int(index)]}.{'norm.' if layer == '1' else ''}{kind}"
        part, index, rest = rest.split(".", 2)
        if part == "aifi":
            layer, _, kind = rest.removeprefix("layers.0.").rpartition(".")
            return f"hybrid_aifi{levels[-1]}.{ATTENTION.get(layer, layer)}.{kind}"
        if part == "lateral_convs":
            return f"hybrid_reduce{levels[-1 - int(index)]}.{leaf(rest)}"
        if part == "fpn_blocks":
            return f"hybrid_td{levels[-2 - int(index)]}.{fused(rest)}"
        name = f"hybrid_bu{levels[1 + int(index)]}"
        if part == "pan_blocks":
            return f"{name}.{fused(rest)}"
        step = {"conv1": "0", "conv2": "1"}.get(rest.partition(".")[0], "")
        rest = leaf(rest.partition(".")[2]) if step else leaf(rest)
        return f"{name}_edge0.resample.convs.{step or 0}.{rest}"

    def convert(state: State) -> Maps:
        given = {ours(name): x for name, x in state.items()}
        prefix = f"hybrid_aifi{levels[-1]}."
        for kind in ("weight", "bias"):
            parts = [f"{prefix}self_attn.{part}_proj.{kind}" for part in "qk"]
            if parts[0] in given:
                given[f"{prefix}query_key.{kind}"] = torch.cat([given.pop(x) for x in parts])
        return given

    return convert


def reference(
    encoder: Any,
    config: Any,
    channels: Mapping[int, int],
    width: int,
    elan: Mapping[str, str],
    fuse: str,
    block: str,
    down: str,
    lateral: str = "conv1x1",
    **options: Any,
) -> Reference:
    """A hybrid of ours and the reference of these classes.

    Args:
        elan: the names of the parts of its blocks; none for RT-DETR's.
        options: of the reference's config.
    """
    style = Style(as_operator(lateral, "lateral"), as_operator(block, "block"))
    graph = build_graph("hybrid", {f"res{level}": level for level in channels}, style)
    defaults = Defaults(
        width, as_operator(fuse, "fuse"), downsample=as_operator(down, "down"), norm="BN"
    )
    settings = config(
        encoder_hidden_dim=width,
        encoder_in_channels=list(channels.values()),
        feat_strides=[2**level for level in channels],
        encode_proj_layers=[len(channels) - 1],
        encoder_ffn_dim=4 * width,
        **options,
    )
    return Reference(
        Pyramid(graph, {f"res{level}": count for level, count in channels.items()}, defaults),
        Encoder(list(channels.values()), width, encoder(settings)),
        lambda theirs, maps: theirs(list(maps.values())),
        converter(list(channels), elan),
    )


def rt_detr(channels: Mapping[int, int], width: int, expansion: float) -> Reference:
    from transformers.models.rt_detr.configuration_rt_detr import RTDetrConfig
    from transformers.models.rt_detr.modeling_rt_detr import RTDetrHybridEncoder

    return reference(
        *(RTDetrHybridEncoder, RTDetrConfig, channels, width, {}),
        *("stack", f"csp_rep(expansion={expansion})", 'conv(activation="silu")'),
        hidden_expansion=expansion,
    )


@recipe("RT-DETR", sizes=SIZES, parameters=11_950_848)
def rt_detr_r50(channels: Mapping[int, int], width: int) -> Reference:
    return rt_detr(channels, width, 1.0)


@recipe("RT-DETR, half as wide inside", sizes=SIZES[:1], parameters=5_653_248)
def rt_detr_r18(channels: Mapping[int, int], width: int) -> Reference:
    return rt_detr(channels, width, 0.5)


def d_fine(channels: Mapping[int, int], width: int, expansion: float, depth: float) -> Reference:
    from transformers.models.d_fine.configuration_d_fine import DFineConfig
    from transformers.models.d_fine.modeling_d_fine import DFineHybridEncoder

    block = f"csp_elan(depth={round(3 * depth)}, expansion={expansion})"
    return reference(
        *(DFineHybridEncoder, DFineConfig, channels, width, ELAN, "stack", block, "scdown"),
        lateral='conv1x1(activation="")',
        hidden_expansion=expansion,
        depth_mult=depth,
    )


@recipe("D-FINE", sizes=SIZES, parameters=9_343_232)
def d_fine_l(channels: Mapping[int, int], width: int) -> Reference:
    return d_fine(channels, width, 1.0, 1.0)


@recipe("D-FINE, half as wide inside", sizes=SIZES[:1], parameters=5_139_712)
def d_fine_half(channels: Mapping[int, int], width: int) -> Reference:
    return d_fine(channels, width, 0.5, 1.0)


@recipe("D-FINE M", sizes=SIZES[:1], parameters=6_713_600)
def d_fine_m(channels: Mapping[int, int], width: int) -> Reference:
    return d_fine(channels, width, 1.0, 0.33)


@recipe("D-FINE N", levels=(4, 5), sizes=SIZES[1:2])
def d_fine_n(channels: Mapping[int, int], width: int) -> Reference:
    return d_fine(channels, width, 0.34, 0.5)


def deimv2(channels: Mapping[int, int], width: int, trailing: bool) -> Reference:
    from transformers.models.deimv2.configuration_deimv2 import Deimv2Config
    from transformers.models.deimv2.modeling_deimv2 import Deimv2HybridEncoder

    block = f"csp_elan5(trailing={trailing})"
    return reference(
        *(Deimv2HybridEncoder, Deimv2Config, channels, width, ELAN5, "sum", block, "scdown"),
        lateral='conv1x1(activation="")',
        encoder_has_trailing_conv=trailing,
    )


@recipe("DEIMv2", sizes=SIZES, parameters=8_818_944)
def deimv2_trailing(channels: Mapping[int, int], width: int) -> Reference:
    return deimv2(channels, width, True)


@recipe("DEIMv2 on DINOv3", sizes=SIZES[:1])
def deimv2_dinov3(channels: Mapping[int, int], width: int) -> Reference:
    return deimv2(channels, width, False)
