"""The necks of YOLOX and RTMDet as in mmdet, of YOLOv8, PP-YOLOE and YOLOv6 as in mmyolo, and
DAMO-YOLO's as in libreyolo."""

from __future__ import annotations

import re
from typing import Any, Callable, Mapping, Sequence
from unittest import mock

import torch.nn.functional as F
from openmmlab import file_of, neck
from references import Maps, Reference, State, recipe
from torch import Tensor, nn

from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.graph import as_operator, op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.topologies import Style

SIZES = ((24, 40), (20, 20), (13, 21))
EVEN = ((24, 40), (16, 16))  # for a reference whose upsampling cannot meet an odd size
YOLO = (1e-3, 0.03)  # eps and momentum of its batch norms
TORCH = (1e-5, 0.1)
# names in a block of the reference, and here
CSP = ((r"(main|short|final)_conv", r"\1"), ("blocks", "units"))
CSP += ((r"conv2\.depthwise_conv", "conv2"), (r"conv2\.pointwise_conv", "conv3"))
REP = (("rbr_dense", "conv3"), ("rbr_1x1", "conv1"), ("rbr_identity", "identity"))
PPYOLOE = ((r"^conv1", "short"), (r"^conv2", "main"), (r"^conv3", "final"), ("blocks", "units"))
DAMO = ((r"^conv1", "short"), (r"^conv2", "main"), (r"^conv3", "final"))
DAMO += ((r"convs\.(\d)\.conv1", r"units.\1.second"), (r"convs\.(\d)\.conv2", r"units.\1.conv1"))
DAMO += (("second", "conv2"),)
STAGE = (("^conv1", "0"), (r"^block\.(\d)", lambda match: str(int(match[1]) + 1)))


class Necked(nn.Module):
    """The reference with the laterals that ours has: a 1x1 and a batch norm each.

    Args:
        channels: of the maps that have one.
        norm: eps and momentum.
    """

    def __init__(
        self, channels: Sequence[int], width: int, neck: nn.Module, norm: tuple[float, float]
    ) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(count, width, 1, bias=False), nn.BatchNorm2d(width, *norm))
            for count in channels
        )
        self.neck = neck

    def forward(self, maps: list[Tensor]) -> Sequence[Tensor]:
        if self.laterals:
            maps = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        sizes, resize = [list(x.shape[2:]) for x in maps[:-1]], F.interpolate

        def meet(x: Tensor, **options: Any) -> Tensor:
            """The reference doubles; here it also meets odd sizes."""
            return resize(x, size=sizes.pop(), mode="nearest")

        with mock.patch.object(F, "interpolate", lambda x, *args, **options: meet(x)):
            return self.neck(maps)


def ours(
    topology: str,
    channels: Mapping[int, int],
    width: int,
    block: str,
    activation: str,
    norm: tuple[float, float],
    upsample: str,
) -> Pyramid:
    style = Style(block=as_operator(block, "block"))
    graph = build_graph(topology, {f"res{level}": level for level in channels}, style)
    down = op("conv", activation=activation)
    defaults = Defaults(
        width, op("stack"), op(upsample), down, "BN", norm_eps=norm[0], norm_momentum=norm[1]
    )
    return Pyramid(graph, {f"res{level}": count for level, count in channels.items()}, defaults)


def renamed(name: str, rules: Sequence[tuple[str, Any]]) -> str:
    """A name inside a block, after all rules that apply."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def converter(
    prefix: str,
    levels: Sequence[int],
    parts: Mapping[str, str],
    rules: Sequence[tuple[str, Any]],
) -> Callable[[State], Maps]:
    """What turns the reference's names into ours.

    Args:
        parts: the beginnings of names in the reference, as patterns, and what they are here after
            `prefix`.
    """

    def convert_name(name: str) -> str:
        if name.startswith("laterals."):
            _, index, layer, kind = name.split(".")
            return f"{prefix}_lateral{levels[int(index)]}.{'norm.' if layer == '1' else ''}{kind}"
        name = name.removeprefix("neck.")
        for pattern, part in parts.items():
            if match := re.match(pattern + r"\.", name):
                rest = renamed(name[match.end() :], rules)
                name = f"{prefix}_{part}.{rest}"
                break
        else:
            raise AssertionError(name)
        return name.replace(".conv.", ".").replace(".bn.", ".norm.")

    return lambda state: {convert_name(name): x for name, x in state.items()}


def reference(
    topology: str,
    channels: Mapping[int, int],
    width: int,
    block: str,
    theirs: nn.Module,
    parts: Mapping[str, str],
    rules: Sequence[tuple[str, Any]],
    activation: str = "silu",
    norm: tuple[float, float] = YOLO,
    upsample: str = "nearest",
) -> Reference:
    with_lateral = [] if topology == "bifusion" else list(channels.values())
    return Reference(
        ours(topology, channels, width, block, activation, norm, upsample),
        Necked(with_lateral, width, theirs, norm),
        lambda theirs, maps: theirs(list(maps.values())),
        converter(topology, list(channels), parts, rules),
    )


def mmdets(kind: str, topology: str, block: str, channels: Mapping[int, int], width: int) -> Any:
    theirs = neck("mmdet.models.necks", kind)([width] * 3, width, num_csp_blocks=3)
    parts = {
        "reduce_layers.0": "reduce5",
        "reduce_layers.1": "reduce4",
        "top_down_blocks.0": "td4",
        "top_down_blocks.1": "td3",
        "downsamples.0": "bu4_edge0.resample.convs.0",
        "downsamples.1": "bu5_edge0.resample.convs.0",
        "bottom_up_blocks.0": "bu4",
        "bottom_up_blocks.1": "bu5",
        **{f"out_convs.{i}": f"output{3 + i}" for i in range(3)},
    }
    return reference(topology, channels, width, block, theirs, parts, CSP)


@recipe("YOLOX", sizes=SIZES, parameters=5_192_704)
def yolox(channels: Mapping[int, int], width: int) -> Reference:
    return mmdets("YOLOXPAFPN", "csp_pan", "csp(depth=3)", channels, width)


@recipe("RTMDet", sizes=SIZES, parameters=5_888_000 + 919_040)
def rtmdet(channels: Mapping[int, int], width: int) -> Reference:
    block = "csp(depth=3, unit='3x3 dw5x5 1x1')"
    return mmdets("CSPNeXtPAFPN", "csp_pan_rtmdet", block, channels, width)


MMYOLO = {
    "downsample_layers.0": "bu4_edge0.resample.convs.0",
    "downsample_layers.1": "bu5_edge0.resample.convs.0",
    r"bottom_up_layers.0(?:\.0)?": "bu4",
    r"bottom_up_layers.1(?:\.0)?": "bu5",
}


@recipe("YOLOv8", sizes=SIZES, parameters=5_909_504 + 919_040)
def yolov8(channels: Mapping[int, int], width: int) -> Reference:
    theirs = neck("mmyolo.models.necks", "YOLOv8PAFPN")([width] * 3, [width] * 3)
    parts = {"top_down_layers.0": "td4", "top_down_layers.1": "td3", **MMYOLO}
    topology, block = "csp_pan_yolov8", "c2f(depth=3)"
    return reference(topology, channels, width, block, theirs, parts, CSP)


@recipe("PP-YOLOE", sizes=SIZES, parameters=7_835_392)
def ppyoloe(channels: Mapping[int, int], width: int) -> Reference:
    theirs = neck("mmyolo.models.necks", "PPYOLOECSPPAFPN")([width] * 3, [width] * 3)
    # the reference halves the channels as it goes up, since its finer maps have half as many; here
    # all have the same
    for upsample, stage in zip(theirs.upsample_layers, theirs.top_down_layers):
        conv, layer = type(upsample[0]), type(stage[0])
        settings = {"norm_cfg": theirs.norm_cfg, "act_cfg": theirs.act_cfg}
        upsample[0] = conv(width, width, 1, **settings)
        settings |= {"block_cfg": theirs.block_cfg, "attention_cfg": None}
        stage[0] = layer(2 * width, width, theirs.num_blocks_per_layer, **settings)
    parts = {
        r"reduce_layers.2.0": "td5",
        r"upsample_layers.0.0": "td4_edge0.project",
        r"upsample_layers.1.0": "td3_edge0.project",
        r"top_down_layers.0.0": "td4",
        r"top_down_layers.1.0": "td3",
        **MMYOLO,
    }
    made = reference(
        *("csp_pan_ppyoloe", channels, width, "csp(depth=3, unit='3x3 rep')", theirs, parts),
        *((*PPYOLOE, *REP), "silu", TORCH),
    )

    def swapped(state: State) -> Maps:
        """The reference concatenates the short path before the main one."""
        return {
            name: x.roll(width // 2, 1) if name.endswith(".final.weight") else x
            for name, x in made.convert(state).items()
        }

    return Reference(made.ours, made.theirs, made.run, swapped)


def damo_yolo(channels: Mapping[int, int], width: int, act: str, ratio: float) -> Reference:
    giraffe = file_of("libreyolo", "models/damoyolo/nn.py").GiraffeNeckV2
    theirs = giraffe(1.0, ratio, [width] * 3, [width] * 3, act)
    parts = {
        "merge_3": "merge5",
        "bu_conv13": "merge5_edge1.resample.convs.0",
        "merge_4": "merge4",
        "bu_conv24": "merge4_edge1.resample.convs.0",
        "merge_5": "output3",
        "merge_7": "output4",
        "bu_conv57": "output4_edge1.resample.convs.0",
        "merge_6": "output5",
        "bu_conv46": "output5_edge1.resample.convs.0",
        "bu_conv76": "output5_edge2.resample.convs.0",
    }
    block = f"csp_stage(depth=3, ratio={ratio}, activation={act!r})"
    return reference(*("repgfpn", channels, width, block, theirs, parts, (*DAMO, *REP), act, TORCH))


@recipe("DAMO-YOLO S", sizes=SIZES, parameters=8_829_312)
def damo_yolo_s(channels: Mapping[int, int], width: int) -> Reference:
    return damo_yolo(channels, width, "relu", 0.75)


@recipe("DAMO-YOLO, SiLU", sizes=SIZES[:1], parameters=9_998_592)
def damo_yolo_silu(channels: Mapping[int, int], width: int) -> Reference:
    return damo_yolo(channels, width, "silu", 1.0)


@recipe("YOLOv6", levels=(2, 3, 4, 5), sizes=EVEN, parameters=16_283_136)
def yolov6(channels: Mapping[int, int], width: int) -> Reference:
    theirs = neck("mmyolo.models.necks", "YOLOv6RepBiPAFPN")(
        list(channels.values()), [width] * 3, num_csp_blocks=4
    )
    parts = {"reduce_layers.2": "reduce5"}
    for index, level in enumerate((4, 3)):
        fusion = f"upsample_layers.{index}"
        parts |= {
            f"{fusion}.upsample": f"merge{level}_edge0.resample.layers.0",
            f"{fusion}.conv1": f"merge{level}_edge1.project",
            f"{fusion}.conv2": f"merge{level}_edge2.project",
            f"{fusion}.downsample": f"merge{level}_edge2.resample.convs.0",
            f"{fusion}.conv3": f"merge{level}",
        }
    parts |= {"top_down_layers.0.0": "td4", "top_down_layers.0.1": "reduce4"}
    parts |= {"top_down_layers.1": "td3", **MMYOLO}
    return reference(
        *("bifusion", channels, width, "rep_stage(depth=4)", theirs, parts, (*STAGE, *REP)),
        *("relu", YOLO, "deconv"),
    )
