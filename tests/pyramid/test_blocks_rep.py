"""Blocks of parallel convolutions against plain torch calls, and their form of one convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize
from torch import nn

from fpn_plugin.modeling.fold import fold_norms
from fpn_plugin.pyramid.blocks import BLOCKS, ORDERS

X = torch.randn(2, 4, 7, 10, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("norm", ["", "BN", "GN"])
def test_rep_is_a_sum_and_one_convolution_at_inference(order: str, stride: int, norm: str) -> None:
    arguments = {"norm": norm, "activation": "silu", "order": order, "stride": stride}
    block = randomize(BLOCKS.get("rep")(4, 32, **arguments)).eval()
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    y = F.silu(X) if order == ORDERS[1] else X
    sides = (block.conv3, 1), (block.conv1, 0)
    parts = [F.conv2d(y, each.weight, each.bias, stride, padding) for each, padding in sides]
    parts = [x if not norm else each.norm(x) for x, (each, _) in zip(parts, sides)]
    expected = parts[0] + parts[1] if order == ORDERS[1] else F.silu(parts[0] + parts[1])
    assert torch.allclose(block(X), expected, atol=1e-5)
    assert fold_norms(block) == (2 if norm == "BN" else 0)
    is_one = len([m for m in block.modules() if isinstance(m, nn.Conv2d)]) == 1
    assert is_one is (norm != "GN")
    assert torch.allclose(block(X), expected, atol=1e-5)
    assert torch.equal(torch.jit.script(block)(X), block(X))
