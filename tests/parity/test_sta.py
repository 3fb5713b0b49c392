"""The spatial tuning adapter against transformers' DEIMv2, with its laterals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from references import randomize_weights
from test_references import TOLERANCE, assert_near
from torch import Tensor, nn

from fpn_plugin import PyramidBackbone
from fpn_plugin.bottom_up.sta import SpatialTuningBackbone

EMBED, CHANNELS, WIDTH = 12, 4, 8
NAMES = ("res4_1", "res4_2", "res4_3")


class Blocks(Backbone):
    """Patches of 16 pixels, and three blocks that only mix channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, EMBED, 16, stride=16)
        self.blocks = nn.ModuleList(nn.Conv2d(EMBED, EMBED, 1) for _ in NAMES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patches(x)
        maps = {}
        for name, block in zip(NAMES, self.blocks):
            x = torch.relu(block(x))
            maps[name] = x
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(channels=EMBED, stride=16) for name in NAMES}


class Theirs(nn.Module):
    """`Deimv2DINOv3ConvEncoder` around the same blocks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        from transformers.models.deimv2 import modeling_deimv2 as deimv2

        config: Any = SimpleNamespace(
            spatial_tuning_adapter_inplanes=CHANNELS, batch_norm_eps=1e-5, hidden_size=EMBED
        )
        self.network = network
        self.spatial_tuning_adapter = deimv2.Deimv2SpatialTuningAdapter(config)
        self.fusion_proj = nn.ModuleList(
            deimv2.Deimv2ConvNormLayer(config, EMBED + times * CHANNELS, WIDTH, 1, 1)
            for times in (2, 4, 4)
        )
        self.encode = deimv2.Deimv2DINOv3ConvEncoder.forward

    def backbone(self, x: Tensor) -> Any:
        return SimpleNamespace(feature_maps=list(self.network(x).values()))

    backbone.config = SimpleNamespace(patch_size=16)  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.encode(self, x)


def from_deimv2(name: str) -> str:
    adapter = "spatial_tuning_adapter."
    name = name.replace(f"{adapter}stem_conv", "bottom_up.stem")
    for number in (2, 3, 4):
        name = name.replace(f"{adapter}conv{number}", f"bottom_up.convs.{number - 2}")
        name = name.replace(f"fusion_proj.{number - 2}", f"mapper{number + 1}")
    return name.replace(".conv.weight", ".weight").replace("network.", "bottom_up.network.")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_maps_and_gradients_equal_deimv2s(dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    network = Blocks()
    theirs = Theirs(network)
    tuned = SpatialTuningBackbone(Blocks(), CHANNELS)
    assert sum(p.numel() for p in SpatialTuningBackbone(Blocks()).parameters()) == 60_688 + sum(
        p.numel() for p in network.parameters()
    )
    ours = PyramidBackbone(
        *(tuned, ["res3", "res4", "res5"], WIDTH),
        topology="channel_mapper",
        block="conv1x1",
        norm="BN",
    )
    randomize_weights(theirs)
    state = {from_deimv2(name): x for name, x in theirs.state_dict().items()}
    ours.load_state_dict(state)
    for module in (ours, theirs):
        module.to(dtype).train(training)
    for size in ((64, 96), (128, 64)):  # patches of an even number: theirs rounds others down
        x = torch.randn(2, 3, *size, dtype=dtype)
        found, expected = ours(x), theirs(x)
        for (name, y), z in zip(found.items(), expected, strict=True):
            assert_near(name, y, z, TOLERANCE[dtype])
        ours.zero_grad()
        theirs.zero_grad()
        sum(y.square().mean() for y in found.values()).backward()  # type: ignore[union-attr]
        sum(z.square().mean() for z in expected).backward()  # type: ignore[union-attr]
        gradients = {from_deimv2(name): p.grad for name, p in theirs.named_parameters()}
        for name, p in ours.named_parameters():
            assert_near(name, p.grad, gradients[name], 10 * TOLERANCE[dtype])
