"""DetectoRS' recursive feature pyramid, as MMDetection has it: with the networks, which it enters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import openmmlab
import torch
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from references import Maps, Reference, State, recipe
from torch import Tensor, nn

from fpn_plugin import PyramidBackbone

BLOCKS = (3, 4, 6, 3)
LEVELS = ("res2", "res3", "res4", "res5")
# by MMDetection's names; `layer1` is res2
NAMES = [
    (r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"downsample\.0\.", "shortcut."),
    (r"downsample\.1\.", "shortcut.norm."),
    (r"bn(\d)\.", r"conv\1.norm."),
    (r"^conv1\.", "stem.conv1."),
]
ASPP = ("point", "near", "far", "whole")


@dataclass(frozen=True)
class OfImages(Reference):
    """Both read the image, whose finest map has the given size."""

    def inputs(self, channels: Mapping[int, int], size: Sequence[int], batch: int = 2) -> Maps:
        return {"image": torch.randn(batch, 3, *(4 * side for side in size))}


class Ours(nn.Module):
    def __init__(self, backbone: PyramidBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, maps: Maps) -> Maps:
        return self.backbone(maps["image"])


def our_resnet(base: int) -> ResNet:
    stages, width = [], base
    for level, count in enumerate(BLOCKS):
        out = 4 * base * 2**level
        strides = [1 if level == 0 else 2] + [1] * (count - 1)
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                count,
                stride_per_block=strides,
                in_channels=width,
                out_channels=out,
                bottleneck_channels=out // 4,
                norm="BN",
            )
        )
        width = out
    return ResNet(BasicStem(3, base), stages, out_features=list(LEVELS))


def their_rfp(base: int, width: int, steps: int) -> nn.Module:
    rfp = openmmlab.neck("mmdet.models.necks", "RFP")
    resnet = openmmlab.neck("mmdet.models.backbones", "DetectoRS_ResNet")
    plain = {"depth": 50, "stem_channels": base, "base_channels": base, "norm_eval": False}
    fed = {"type": "DetectoRS_ResNet", "rfp_inplanes": width, **plain}
    channels = [4 * base * 2**i for i in range(4)]
    neck = rfp(steps, fed, width // 4, in_channels=channels, out_channels=width, num_outs=5)
    return nn.ModuleDict({"network": resnet(output_img=True, **plain), "neck": neck})


def run(theirs: Any, maps: Maps) -> Sequence[Tensor]:
    return theirs["neck"](theirs["network"](maps["image"]))


def network_name(name: str) -> str:
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name


def our_name(name: str) -> str:
    """A tensor of the reference by ours' name."""
    if name.startswith("network."):
        return f"backbone.bottom_up.{network_name(name.removeprefix('network.'))}"
    name = name.removeprefix("neck.")
    if match := re.fullmatch(r"(lateral|fpn)_convs\.(\d)\.conv\.(.*)", name):
        kind = "lateral" if match[1] == "lateral" else "output"
        return f"backbone.fpn_{kind}{int(match[2]) + 2}.{match[3]}"
    if match := re.fullmatch(r"rfp_aspp\.aspp\.(\d)\.(.*)", name):
        return f"backbone.rfp.aspp.{ASPP[int(match[1])]}.{match[2]}"
    if match := re.fullmatch(r"rfp_modules\.(\d)\.(.*)", name):
        place, inner = f"backbone.rfp.networks.{match[1]}", network_name(match[2])
        if fed := re.fullmatch(r"(res\d)\.0\.rfp_conv\.(.*)", inner):
            return f"{place}.feedback.{fed[1]}.{fed[2]}"
        stage, _, rest = inner.partition(".")
        return f"{place}.stages.{0 if stage == 'stem' else int(stage[3]) - 1}.{rest}"
    return name.replace("rfp_weight.", "backbone.rfp.gate.conv.")


def convert(state: State) -> Maps:
    return {our_name(name): x for name, x in state.items()}


def reference(channels: Mapping[int, int], width: int, steps: int) -> Reference:
    base = channels[2] // 4
    ours = PyramidBackbone(our_resnet(base), LEVELS, width, extra_levels="maxpool", rfp_steps=steps)
    return OfImages(Ours(ours), their_rfp(base, width, steps), run, convert)


# the FPN, net₁, and what the recursion adds
R50_PARAMETERS = 3_344_384 + 23_508_032 + 24_757_313


@recipe("rfp", levels=(2, 3, 4, 5), width=16, sizes=((16, 24),), parameters=R50_PARAMETERS)
def rfp(channels: Mapping[int, int], width: int) -> Reference:
    return reference(channels, width, steps=2)


@recipe("rfp_3_steps", levels=(2, 3, 4, 5), width=8, sizes=((9, 13),))
def rfp_3_steps(channels: Mapping[int, int], width: int) -> Reference:
    return reference(channels, width, steps=3)
