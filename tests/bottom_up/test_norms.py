"""MODEL.BOTTOM_UP.NORM: what the norms of every library become."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm.layers
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from fpn_plugin import PyramidBackbone
from fpn_plugin.bottom_up.base import freeze
from fpn_plugin.bottom_up.norms import NORMS, convert_norms, freeze_norm_statistics
from fpn_plugin.bottom_up.timm import TimmBackbone

CHANNELS = 12
KINDS = {
    "FrozenBN": (FrozenBatchNorm2d, timm.layers.FrozenBatchNormAct2d),
    "BN": (nn.BatchNorm2d, timm.layers.BatchNormAct2d),
    "SyncBN": (nn.SyncBatchNorm, timm.layers.SyncBatchNormAct),
    "GN": (nn.GroupNorm, timm.layers.GroupNormAct),
}
SOURCES = {
    "BatchNorm2d": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
    "torchvision": TorchvisionFrozenBatchNorm2d,
    "BatchNormAct2d": lambda c: timm.layers.BatchNormAct2d(c, act_layer=nn.SiLU),
    "SyncBatchNormAct": lambda c: timm.layers.convert_sync_batchnorm(
        timm.layers.BatchNormAct2d(c, act_layer=nn.SiLU)
    ),
    "FrozenBatchNormAct2d": lambda c: timm.layers.FrozenBatchNormAct2d(c, act_layer=nn.SiLU),
}


def network(source: str, channels: int = CHANNELS) -> nn.Sequential:
    """A convolution, and a norm whose numbers are its own."""
    norm = SOURCES[source](channels)
    for name, value in norm.state_dict().items():
        if value.ndim:
            value.copy_(torch.rand_like(value) + (0.5 if name == "running_var" else 0))
    return nn.Sequential(nn.Conv2d(3, channels, 1), norm)


def numbers(norm: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in norm.state_dict().items() if value.ndim}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_norm_becomes_every_other_with_its_numbers(source: str, norm: str) -> None:
    model, x = network(source).eval(), torch.randn(2, 3, 4, 4)
    y, before = model(x), numbers(model[1])
    convert_norms(model, norm, "it")
    has_activation = "Act" in source
    assert type(model[1]) is KINDS[norm][has_activation]
    assert not model[1].training
    after = numbers(model[1])
    kept = ("weight", "bias") if norm == "GN" else before
    assert list(after) == list(kept)
    assert all(torch.equal(after[name], before[name]) for name in kept)
    if norm == "GN":
        groups = nn.functional.group_norm(model[0](x), 12, before["weight"], before["bias"])
        y = nn.functional.silu(groups) if has_activation else groups
    assert torch.allclose(model(x), y, atol=1e-5)
    learns = any(p.requires_grad for p in model[1].parameters())
    assert learns is (norm != "FrozenBN")


@pytest.mark.parametrize(
    "channels, groups", [(64, 32), (48, 24), (40, 20), (12, 12), (37, 1), (80, 20)]
)
def test_the_groups_divide_the_channels(channels: int, groups: int) -> None:
    model = network("BatchNorm2d", channels)
    convert_norms(model, "GN", "it")
    assert model[1].num_groups == groups


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_frozen_stays_frozen(norm: str) -> None:
    """Whether the caller freezes before or after; as Detectron2's builders, before."""
    first, second = network("FrozenBatchNorm2d"), network("FrozenBatchNorm2d")
    model = nn.ModuleDict({"frozen": first, "trained": second})
    freeze(first.parameters())
    convert_norms(model, norm, "it")
    freeze_norm_statistics(model)
    frozen = "GN" if norm == "GN" else "FrozenBN"  # Detectron2 leaves group norms what they are
    assert type(first[1]) is KINDS[frozen][0] and type(second[1]) is KINDS[norm][0]
    assert not any(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("source", ["BatchNorm2d", "SyncBatchNorm", "BatchNormAct2d"])
def test_statistics_stand_still_where_the_affine_does(source: str) -> None:
    first, second = network(source), network(source)
    model = nn.Sequential(first, second)
    freeze(first.parameters())
    before = numbers(first[1])
    freeze_norm_statistics(model)
    first.train()(torch.randn(2, 3, 4, 4))
    after = numbers(first[1])
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert type(second[1]) is type(network(source)[1])


def test_an_empty_name_leaves_all_as_it_is() -> None:
    model = network("BatchNormAct2d")
    norm = model[1]
    convert_norms(model, "", "it")
    assert model[1] is norm


@pytest.mark.parametrize(
    "model, norm, message",
    [
        (network("BatchNorm2d"), "XN", "MODEL.BOTTOM_UP.NORM: unknown name 'XN'.*FrozenBN, GN"),
        (nn.Sequential(nn.LayerNorm(3)), "GN", "'GN': it has no batch norms.*LayerNorm.*empty"),
        (nn.Sequential(nn.Conv2d(3, 3, 1)), "BN", "it has no batch norms.*none"),
    ],
)
def test_mistakes_are_named(model: Any, norm: str, message: str) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        convert_norms(model, norm, "it")


@pytest.mark.parametrize("model, norm", [("test_efficientnet", ""), ("test_efficientnet", "GN")])
def test_a_network_in_a_pyramid_trains_on_one_tiny_image(model: str, norm: str) -> None:
    """Its last map is one pixel; timm's norms include the activation."""
    network = TimmBackbone(model, ["res4", "res5"], norm=norm)
    own = copy.deepcopy(network).train()
    pyramid = PyramidBackbone(network, in_features=["res4", "res5"], out_channels=32, norm="GN")
    maps = pyramid.train()(torch.randn(1, 3, 32, 32))
    sum(y.square().sum() for y in maps.values()).backward()
    assert all(p.grad.isfinite().all() for p in pyramid.parameters())
    own.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(own(x).values(), network(x).values()))
    torch.jit.script(pyramid.eval())
