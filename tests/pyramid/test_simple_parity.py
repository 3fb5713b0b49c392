"""ViTDet's simple pyramid against Detectron2's `SimpleFeaturePyramid`, with copied weights."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from helpers import randomize
from peers import simple_names
from torch import Tensor

from fpn_plugin import PyramidBackbone

CHANNELS, WIDTH, STRIDE = 64, 32, 16


class OneMap(Backbone):
    """In place of a vision transformer: one map of stride 16 from an image of one channel."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        pooled = torch.nn.functional.avg_pool2d(x, STRIDE)
        return {"last_feat": torch.cat([(i + 1) * pooled.sin() for i in range(CHANNELS)], 1)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"last_feat": ShapeSpec(channels=CHANNELS, stride=STRIDE)}


@pytest.mark.parametrize("size", [(128, 192), (64, 96)], ids=str)
@pytest.mark.parametrize("top", [False, True], ids=["four levels", "max pool"])
@torch.no_grad()
def test_equals_detectron2(top: bool, size: tuple[int, int]) -> None:
    their = SimpleFeaturePyramid(
        OneMap(),
        "last_feat",
        WIDTH,
        (4.0, 2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool() if top else None,
        norm="LN",
        square_pad=512,
    )
    mine = PyramidBackbone(
        OneMap(),
        in_features=["last_feat"],
        out_channels=WIDTH,
        topology="simple",
        norm="LN",
        extra_levels="maxpool" if top else "none",
        square_pad=512,
    )
    state = randomize(their).state_dict()
    names = simple_names()
    keys = {key: f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}" for key in state}
    assert len(set(keys.values())) == len(keys)
    mine.load_state_dict({keys[key]: x for key, x in state.items()}, strict=True)
    assert mine.output_shape() == their.output_shape()
    assert mine.padding_constraints["square_size"] == their.padding_constraints["square_size"]
    image = torch.randn(2, 1, *size)
    expected, outputs = their(image), mine(image)
    assert list(outputs) == list(expected) == ["p2", "p3", "p4", "p5", "p6"][: 5 if top else 4]
    worst = 0.0
    for name, x in expected.items():
        assert x.std() > 0.1
        assert torch.allclose(outputs[name], x, rtol=1e-6, atol=1e-6), name
        worst = max(worst, (outputs[name] - x).abs().max().item())
    print(f"largest absolute difference {worst:.1e}")
