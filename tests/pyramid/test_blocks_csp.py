"""YOLO's blocks against plain torch calls, in both orders; tests/parity has the papers' against
other packages."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize
from torch import Tensor, nn

from fpn_plugin.modeling.fold import fold_norms
from fpn_plugin.pyramid.blocks import BLOCKS, ORDERS

PRE = ORDERS[1]
X = torch.randn(2, 4, 7, 10, generator=torch.Generator().manual_seed(1))
REP = [
    ("rep", {"identity": True}),
    ("rep_stage", {"depth": 3}),
    ("csp", {"unit": "3x3 rep", "depth": 2}),
    ("csp_stage", {"ratio": 2.0}),
]


def conv(x: Tensor, layer: Any, activation: Callable[[Tensor], Tensor], order: str) -> Tensor:
    x = activation(x) if order == PRE else x
    x = F.conv2d(x, layer.weight, layer.bias, 1, layer.weight.shape[2] // 2, 1, layer.groups)
    x = F.batch_norm(x, None, None, layer.norm.weight, layer.norm.bias, training=True)
    return x if order == PRE else activation(x)


def rep(x: Tensor, block: Any, activation: Callable[[Tensor], Tensor], order: str) -> Tensor:
    x = activation(x) if order == PRE else x
    y = conv(x, block.conv3, lambda x: x, order) + conv(x, block.conv1, lambda x: x, order)
    if block.identity is not None:
        y = y + F.batch_norm(x, None, None, block.identity.weight, block.identity.bias, True)
    return y if order == PRE else activation(y)


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("name", ["csp", "c2f", "csp_stage"])
def test_units_follow_one_another(name: str, shortcut: bool, order: str) -> None:
    arguments = {"activation": "relu", "inner_activation": "silu", "order": order, "norm": "BN"}
    unit = {"depth": 2, "shortcut": shortcut, "unit": "3x3 dw5x5 rep"}
    block = randomize(BLOCKS.get(name)(4, 16, **arguments, **unit))
    first, last = (F.relu, F.silu) if order == PRE else (F.silu, F.relu)
    main = conv(X, block.main, first, order)
    parts = [*main.chunk(2, 1)] if name == "c2f" else [conv(X, block.short, first, order)]
    y = parts[-1] if name == "c2f" else main
    for each in block.units:
        z = conv(conv(y, each.conv1, F.silu, order), each.conv2, F.silu, order)
        z = rep(z, each.conv3, F.silu, order)
        y = y + z if shortcut else z
        parts.append(y)
    parts = [y, parts[0]] if name == "csp" else parts
    expected = conv(torch.cat(parts, 1), block.final, last, order)
    assert torch.allclose(block(X), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.jit.script(block.eval())(X), block(X))


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("depth", [1, 3])
def test_rep_stage(depth: int, order: str) -> None:
    arguments = {"activation": "silu", "inner_activation": "relu", "order": order, "norm": "BN"}
    block = randomize(BLOCKS.get("rep_stage")(4, 8, depth=depth, **arguments))
    activations = [F.relu] * depth
    activations[0 if order == PRE else -1] = F.silu
    assert [each.identity is not None for each in block] == [False, True, True][:depth]
    y = X
    for each, activation in zip(block, activations):
        y = rep(y, each, activation, order)
    assert torch.allclose(block(X), y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name, arguments", REP, ids=str)
@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN", "GN"])
def test_inference_runs_every_rep_as_one_convolution(
    name: str, arguments: dict[str, Any], norm: str
) -> None:
    block = randomize(BLOCKS.get(name)(64, 64, norm=norm, activation="silu", **arguments)).eval()
    for layer in block.modules():
        if getattr(layer, "running_var", None) is not None:
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.5, 2.0)
    block, x = block.double(), torch.randn(2, 64, 5, 6, dtype=torch.float64)
    expected = block(x)
    before = sum(isinstance(each, nn.Conv2d) for each in block.modules())
    fold_norms(block)
    units = [each for each in block.modules() if hasattr(each, "merge_branches")]
    after = sum(isinstance(each, nn.Conv2d) for each in block.modules())
    assert before - after == (0 if norm == "GN" else len(units)) and units
    if norm != "GN":
        assert [each for each in block.modules() if hasattr(each, "num_features")] == []
    assert torch.allclose(block(x), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(torch.jit.script(block)(x), block(x))


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("csp", {"unit": "2x2"}, "unit: '2x2' is not a convolution; write 1x1, 3x3, 5x5"),
        ("csp", {"unit": "3x3 dw3x5"}, "unit: 'dw3x5' is not a convolution"),
        ("csp", {"unit": " "}, "unit: ' ' names no convolution; write e.g. '1x1 3x3'"),
        ("csp", {"unit": 3}, "unit: 3 names no convolution"),
        ("c2f", {"depth": -1}, "depth: -1 units; give 0 or more"),
        ("c2f", {"depth": 1.5}, "depth: 1.5 units; give 0 or more"),
        ("c2f", {"out_channels": 7}, "c2f halves its channels: 7 is odd"),
        ("csp_stage", {"depth": 0}, "depth: 0 units; give 1 or more"),
        ("csp_stage", {"ratio": 0.1}, "ratio: 0.1 of 4 channels are none"),
        ("csp_stage", {"ratio": 0.5, "unit": "dw3x3 1x1"}, "unit: 'dw3x3' is depthwise and cannot"),
        ("rep_stage", {"depth": 0}, "depth: 0 units; give 1 or more"),
    ],
)
def test_bad_arguments_are_named(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BLOCKS.get(name)(4, **{"out_channels": 8, **arguments})
