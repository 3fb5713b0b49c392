"""Blocks of parallel convolutions against plain torch calls, and their form of one convolution."""

from __future__ import annotations

from typing import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize
from torch import Tensor, nn

from fpn_plugin.modeling.fold import fold_norms
from fpn_plugin.pyramid.blocks import BLOCKS, ORDERS

PRE = ORDERS[1]
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


class Ordered:
    """A block's layers on torch's functions, activated as its order says.

    Args:
        activations: of what stands first, last, and everywhere else.
    """

    def __init__(self, order: str, *activations: Callable[[Tensor], Tensor]) -> None:
        self.is_pre = order == PRE
        self.first, self.last, self.inner = activations

    def conv(self, x: Tensor, layer: nn.Module, activation: Callable[[Tensor], Tensor]) -> Tensor:
        padding = layer.weight.shape[2] // 2
        if self.is_pre:
            return F.conv2d(activation(x), layer.weight, layer.bias, padding=padding)
        return activation(F.conv2d(x, layer.weight, layer.bias, padding=padding))

    def units(self, x: Tensor, units: nn.Module) -> Tensor:
        for unit in units:
            x = self.inner(x) if self.is_pre else x
            x = F.conv2d(x, unit.conv3.weight, unit.conv3.bias, padding=1) + F.conv2d(
                x, unit.conv1.weight, unit.conv1.bias
            )
            x = x if self.is_pre else self.inner(x)
        return x

    def csp_rep(self, x: Tensor, block: nn.Module, first: Callable[[Tensor], Tensor]) -> Tensor:
        main = self.units(self.conv(x, block.main, first), block.units)
        return main + self.conv(x, block.short, first)


def layers_in(order: str) -> Ordered:
    """The block's activation, relu, stands at its start in the order "act-conv-norm"."""
    return Ordered(order, *((F.relu, F.silu) if order == PRE else (F.silu, F.relu)), F.silu)


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("expansion", [1.0, 0.3])
def test_csp_rep(order: str, expansion: float) -> None:
    arguments = {"activation": "relu", "inner_activation": "silu", "order": order, "depth": 2}
    block = randomize(BLOCKS.get("csp_rep")(4, 10, expansion=expansion, **arguments))
    layers = layers_in(order)
    expected = layers.csp_rep(X, block, layers.first)
    if expansion < 1:
        assert expected.shape[1] == 3
        expected = layers.conv(expected, block.final, layers.last)
    assert torch.allclose(block(X), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["csp_elan", "csp_elan5"])
def test_csp_elan(order: str, name: str) -> None:
    arguments = {"activation": "relu", "inner_activation": "silu", "order": order, "depth": 1}
    block = randomize(BLOCKS.get(name)(4, 10, expansion=0.7, **arguments))
    layers = layers_in(order)
    parts = list(layers.conv(X, block.split, layers.first).chunk(2, 1))
    for step in (block.first, block.second):
        if name == "csp_elan":
            x = layers.csp_rep(parts[-1], step[0], layers.inner)
            x = layers.conv(x, step[1], layers.inner)
        else:
            short, main = layers.conv(parts[-1], step.split, layers.inner).chunk(2, 1)
            x = layers.conv(short + layers.units(main, step.units), step.final, layers.inner)
        assert x.shape[1] == 3  # round(0.7 * 10 // 2)
        parts.append(x)
    expected = layers.conv(torch.cat(parts, 1), block.final, layers.last)
    assert torch.allclose(block(X), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["csp_rep", "csp_elan", "csp_elan5"])
def test_bad_arguments_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="depth: -1 rep units; give 0 or more"):
        BLOCKS.get(name)(4, 8, depth=-1)
    with pytest.raises(ValueError, match="expansion: 0.1 leaves none of 8 channels; give more"):
        BLOCKS.get(name)(4, 8, expansion=0.1)
