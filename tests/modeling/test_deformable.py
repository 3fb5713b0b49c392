"""Deformable ResNets: torchvision's operator in Detectron2's block, by the formula."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from helpers import zoo_config
from torch import Tensor

from fpn_plugin.modeling.bottom_up import build_bottom_up
from fpn_plugin.modeling.deformable import DeformConv


def at(x: Tensor, row: float, column: float) -> Tensor:
    """A map's channels at a place, linear between its pixels, 0 outside."""
    total = torch.zeros(x.shape[0], dtype=x.dtype)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < x.shape[1] and 0 <= j < x.shape[2]:
                total += x[:, i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return total


@pytest.mark.parametrize("has_mask", [False, True])
def test_the_operator_is_the_papers_formula(has_mask: bool) -> None:
    torch.manual_seed(0)
    conv = DeformConv(4, stride=2, dilation=2, groups=2).double()
    x = torch.randn(1, 4, 7, 9, dtype=torch.double)
    offset = torch.randn(1, 18, 4, 5, dtype=torch.double)
    mask = torch.rand(1, 9, 4, 5, dtype=torch.double) if has_mask else None
    y = conv(x, offset, mask)[0]
    for i in range(4):
        for j in range(5):
            expected = torch.zeros(4, dtype=torch.double)
            for tap in range(9):
                dy, dx = offset[0, 2 * tap : 2 * tap + 2, i, j].tolist()
                value = at(x[0], 2 * i - 2 + tap // 3 * 2 + dy, 2 * j - 2 + tap % 3 * 2 + dx)
                value = value * (1 if mask is None else mask[0, tap, i, j])
                weight = conv.weight[:, :, tap // 3, tap % 3]  # (4, 2), two groups
                expected += (weight * value.view(2, 1, 2).expand(2, 2, 2).reshape(4, 2)).sum(1)
            assert torch.allclose(y[:, i, j], expected)


@pytest.mark.parametrize("modulated", [False, True])
def test_a_zoo_config_builds_trains_and_starts_as_a_plain_resnet(modulated: bool) -> None:
    cfg = zoo_config("Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5.yaml")
    cfg.MODEL.RESNETS.DEFORM_MODULATED = modulated
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32
    cfg.MODEL.BACKBONE.FREEZE_AT = 3
    network = build_bottom_up(cfg, ShapeSpec(channels=3))
    plain_cfg = cfg.clone()
    plain_cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    plain = build_bottom_up(plain_cfg, ShapeSpec(channels=3))
    own, theirs = network.state_dict(), plain.state_dict()
    new = set(own) - set(theirs)
    assert set(theirs) <= set(own) and all(".conv2_offset." in key for key in new)
    assert {key.split(".")[0] for key in new} == {"res3", "res4", "res5"}
    assert own["res4.0.conv2_offset.weight"].shape[0] == (27 if modulated else 18)
    learning = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert learning == {"res4", "res5"}
    x = torch.randn(1, 3, 64, 64)
    sum(y.sum() for y in network(x).values()).backward()
    assert network.get_submodule("res5.2.conv2_offset").weight.grad.isfinite().all()
    plain.load_state_dict({key: value for key, value in own.items() if key in theirs})
    if not modulated:  # whose masks start at one half
        for key, value in plain(x).items():
            assert torch.allclose(value, network(x)[key], atol=1e-5)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("DEFORM_ON_PER_STAGE", [True], r"DEFORM_ON_PER_STAGE: \[True\] is not four booleans"),
        ("DEPTH", 18, "MODEL.RESNETS.DEPTH 18 has no bottlenecks"),
    ],
)
def test_mistakes_are_named(key: str, value: object, message: str) -> None:
    cfg = zoo_config("Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5.yaml")
    cfg.MODEL.RESNETS[key] = value
    with pytest.raises(ValueError, match=message):
        build_bottom_up(cfg, ShapeSpec(channels=3))
