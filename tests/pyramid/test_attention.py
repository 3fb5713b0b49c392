"""Attention blocks: what timm lacks against the paper's formula (the others: tests/parity), the convolution before them, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize

from fpn_plugin.pyramid.blocks import BLOCKS
from fpn_plugin.pyramid.norms import GroupNorm

NAMES = ["se", "eca", "cbam", "coord", "ema"]
X = torch.randn(2, 32, 5, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("groups", [1, 4, 32])
def test_ema_is_the_papers_formula(groups: int) -> None:
    block = randomize(BLOCKS.get("ema")(32, 32, groups=groups))
    result = block(X)
    width = 32 // groups
    for image in range(2):
        for group in range(groups):
            channels = slice(group * width, (group + 1) * width)
            x = X[image, channels]
            linear = block.conv1.weight[:, :, 0, 0]
            rows = linear @ x.mean(2) + block.conv1.bias[:, None]  # (c, H)
            columns = linear @ x.mean(1) + block.conv1.bias[:, None]  # (c, W)
            strips = x * rows.sigmoid()[:, :, None] * columns.sigmoid()[:, None]
            mean, variance = strips.mean((1, 2)), strips.var((1, 2), unbiased=False)
            strips = (strips - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
            strips = strips * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]
            square = F.conv2d(x[None], block.conv3.weight, block.conv3.bias, padding=1)[0]
            logits = torch.einsum("c,chw->hw", strips.mean((1, 2)).softmax(0), square)
            logits = logits + torch.einsum("c,chw->hw", square.mean((1, 2)).softmax(0), strips)
            assert torch.allclose(result[image, channels], x * logits.sigmoid(), atol=1e-5)


@pytest.mark.parametrize("name, count", zip(NAMES, [8464, 5, 8564, 6680, 672]))
def test_parameters(name: str, count: int) -> None:
    block = BLOCKS.get(name)(256, 256, norm="BN")
    assert sum(x.numel() for x in block.parameters()) == count
    if name == "ema":
        assert sum(x.numel() for x in BLOCKS.get(name)(256, 256, groups=8).parameters()) == 10368


@pytest.mark.parametrize("channels, neighbours", [(1, 3), (8, 3), (64, 3), (128, 5), (512, 5)])
def test_neighbours_of_eca(channels: int, neighbours: int) -> None:
    assert BLOCKS.get("eca")(channels, channels).weigh.kernel_size == (neighbours,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ["conv-norm-act", "act-conv-norm"])
def test_the_convolution_before_it(name: str, order: str) -> None:
    arguments: dict[str, Any] = {"norm": "GN", "order": order, "activation": "silu"}
    block = randomize(BLOCKS.get(name)(32, 64, kernel=3, **arguments))
    alone = BLOCKS.get(name)(64, 64, norm="GN")
    state = block.state_dict()
    alone.load_state_dict({key: x for key, x in state.items() if not key.startswith("conv.")})
    x = F.silu(X) if order == "act-conv-norm" else X
    x = F.conv2d(x, block.conv.weight, padding=1)
    x = alone(F.group_norm(x, 32, block.conv.norm.weight, block.conv.norm.bias))
    assert torch.allclose(block(X), x if order == "act-conv-norm" else F.silu(x), atol=1e-5)
    assert BLOCKS.get(name)(32, 64).conv.kernel_size == (1, 1)
    assert "conv.weight" not in BLOCKS.get(name)(64, 64).state_dict()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["", "BN", "SyncBN", "FrozenBN", "GN", "LN"])
def test_a_single_pixel_in_training_with_every_norm(name: str, norm: str) -> None:
    if (name, norm) == ("cbam", "LN"):
        with pytest.raises(ValueError, match="norm: LN normalises over .* cbam a norm of its own"):
            BLOCKS.get(name)(32, 32, norm=norm)
        return
    assert BLOCKS.get(name)(32, 32, norm=norm)(X[:1, :, :1, :1]).isfinite().all()


def test_group_norm_inside_is_one_group() -> None:
    inside = [BLOCKS.get("cbam")(512, 512, norm="GN").spatial.norm]
    inside.append(BLOCKS.get("coord")(512, 512, norm="GN").reduce.norm)
    assert [(type(norm), norm.num_groups) for norm in inside] == [(GroupNorm, 1)] * 2


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("se", {"kernel": 2}, "kernel 2 is not 0 or an odd number"),
        ("eca", {"kernel": -1}, "kernel -1 is not 0 or an odd number"),
        ("cbam", {"reduction": 0}, "reduction 0 is not a positive whole number"),
        ("coord", {"reduction": 1.5}, "reduction 1.5 is not a positive whole number"),
        ("ema", {"groups": 3}, "groups: 3 groups do not divide 32 channels"),
        ("ema", {"groups": 0}, "groups: 0 groups do not divide 32 channels"),
    ],
)
def test_bad_arguments_are_named(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BLOCKS.get(name)(32, 32, **arguments)
