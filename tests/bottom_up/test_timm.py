"""timm networks as bottom-up networks: names, channels, strides, freezing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fpn_plugin.bottom_up.timm import TimmBackbone

LITE0 = {"res1": 16, "res2": 24, "res3": 40, "res4": 112, "res5": 320}


@pytest.fixture(scope="module")
def lite0() -> TimmBackbone:
    return TimmBackbone("tf_efficientnet_lite0").eval()


def test_channels_and_strides_are_read_from_the_model(lite0: TimmBackbone) -> None:
    shapes = lite0.output_shape()
    assert {name: shape.channels for name, shape in shapes.items()} == LITE0
    assert {name: shape.stride for name, shape in shapes.items()} == {
        f"res{i}": 2**i for i in range(1, 6)
    }


@pytest.mark.parametrize("size", [(64, 96), (97, 131)])
def test_maps_have_the_shapes_that_were_promised(
    lite0: TimmBackbone, size: tuple[int, int]
) -> None:
    maps = lite0(torch.randn(2, 3, *size))
    assert list(maps) == list(LITE0)
    for name, x in maps.items():
        stride = 2 ** int(name[3:])
        assert tuple(x.shape) == (2, LITE0[name], -(-size[0] // stride), -(-size[1] // stride))
        assert x.isfinite().all()


def test_only_the_wanted_maps_are_given() -> None:
    backbone = TimmBackbone("tf_efficientnet_lite0", out_features=["res3", "res5"])
    assert (
        list(backbone.output_shape())
        == list(backbone(torch.randn(1, 3, 64, 64)))
        == ["res3", "res5"]
    )


def first_trainable(backbone: nn.Module) -> str:
    return next(name for name, p in backbone.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "freeze_at, first",
    # feature maps end with the stages 0 (stride 2), 1 (4), 2 (8), 4 (16) and 6 (32)
    [(0, "conv_stem"), (1, "blocks.1."), (2, "blocks.2."), (3, "blocks.3."), (4, "blocks.5.")],
)
def test_freezing_stops_at_the_level(freeze_at: int, first: str) -> None:
    backbone = TimmBackbone("tf_efficientnet_lite0", freeze_at=freeze_at)
    assert first_trainable(backbone.model).startswith(first)


def test_frozen_layers_stay_bit_equal_after_a_step_and_the_rest_moves() -> None:
    backbone = TimmBackbone("tf_efficientnet_lite0", freeze_at=2, norm="FrozenBN").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    trained = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    sum(x.square().mean() for x in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in trained)
    optimizer.step()
    moved = {
        name
        for name, value in backbone.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved == {f"{name}" for name, p in backbone.named_parameters() if p.requires_grad}
    assert not any("bn" in name for name in moved)  # FrozenBN: neither statistics nor affine


def test_frozen_batch_norm_keeps_the_activation() -> None:
    """timm's batch norms carry the activation: converting them to plain ones would lose it."""
    plain = TimmBackbone("tf_efficientnet_lite0").eval()
    frozen = TimmBackbone("tf_efficientnet_lite0", norm="FrozenBN").train()
    frozen.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    for one, two in zip(plain(x).values(), frozen(x).values()):
        assert torch.allclose(one, two, atol=1e-5)


def test_the_batch_norms_of_frozen_layers_stand_still() -> None:
    backbone = TimmBackbone("tf_efficientnet_lite0", freeze_at=2).train()
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))
    moved = [n for n, value in backbone.named_buffers() if not torch.equal(value, before[n])]
    assert moved and all(int(name.split("blocks.")[1][0]) >= 2 for name in moved)


def test_channels_last_networks_are_turned() -> None:
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", out_features=["res2", "res5"])
    maps = backbone(torch.randn(1, 3, 224, 224))
    assert {name: tuple(x.shape) for name, x in maps.items()} == {
        "res2": (1, 96, 56, 56),
        "res5": (1, 768, 7, 7),
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"model": "vit_tiny_patch16_224"},
            "vit_tiny_patch16_224 gives several maps of one stride",
        ),
        (
            {"model": "tf_efficientnet_lite9"},
            "MODEL.BOTTOM_UP.NAME: unknown name.*tf_efficientnet_lite",
        ),
        (
            {"model": "tf_efficientnet_lite0", "out_features": ["res6"]},
            "'res6'.*res1, res2, res3, res4, res5",
        ),
        (
            {"model": "tf_efficientnet_lite0", "norm": "XN"},
            "MODEL.BOTTOM_UP.NORM: unknown name 'XN'",
        ),
    ],
)
def test_mistakes_are_named(arguments: dict, message: str) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        TimmBackbone(**arguments)
