"""Blocks against plain torch calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from helpers import randomize
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import ACTIVATIONS, BLOCKS, ORDERS
from fpn_plugin.pyramid.graph import Graph, node, op
from fpn_plugin.pyramid.norms import norm_layer, set_norm
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults

SINGLE = ["conv1x1", "conv3x3", "separable", "deformable"]
COMPOUND = ["bottleneck", "csp", "fsm", "rep", "csp_rep", "csp_elan", "csp_elan5"]
COMPOUND += ["c2f", "csp_stage", "rep_stage"]
ATTENTION = ["se", "eca", "cbam", "coord", "ema"]  # tests/pyramid/test_attention.py
PRE = ORDERS[1]
X = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(1))


def conv(x: Tensor, layer: nn.Module, stride: int = 1) -> Tensor:
    """A convolution and its norm, as the layer's parameters say."""
    x = F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=layer.weight.shape[2] // 2)
    norm = getattr(layer, "norm", None)
    return x if norm is None else F.group_norm(x, 32, norm.weight, norm.bias)


def single(name: str, block: nn.Module, x: Tensor, stride: int) -> Tensor:
    """A block of one convolution, without norm and activation."""
    if name == "separable":
        x = F.conv2d(x, block.depthwise.weight, stride=stride, padding=1, groups=x.shape[1])
        return F.conv2d(x, block.pointwise.weight, block.pointwise.bias)
    if name == "deformable":  # at first no tap moves, and every mask is a half
        x = F.conv2d(x, block.conv.weight / 2, stride=stride, padding=1)
        return x if block.conv.bias is None else x + block.conv.bias[:, None, None]
    return F.conv2d(x, block.weight, block.bias, stride=stride, padding=int(name[4]) // 2)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("norm", ["", "GN"])
def test_every_single_block(name: str, order: str, stride: int, norm: str) -> None:
    block = BLOCKS.get(name)(4, 32, stride=stride, norm=norm, activation="relu", order=order)
    expected = single(name, block, F.relu(X) if order == PRE else X, stride)
    if norm:
        expected = F.group_norm(expected, 32)
    if order == ORDERS[0]:
        expected = F.relu(expected)
    assert torch.allclose(block(X), expected, atol=1e-5)


@pytest.mark.parametrize("name", [*SINGLE, "fsm"])
@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("bias", [None, True, False])
def test_bias(name: str, norm: str, bias: bool | None) -> None:
    keys = BLOCKS.get(name)(4, 32, norm=norm, bias=bias).state_dict()
    biases = [key for key in keys if key.endswith("bias") and "norm" not in key]
    biases = [key for key in biases if "offset" not in key]  # of the deformable one's offsets
    assert len(biases) == int(norm == "" if bias is None else bias)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("channels", [4, 128])
@pytest.mark.parametrize("norm", ["", "GN"])
def test_bottleneck(order: str, channels: int, norm: str) -> None:
    arguments = {"activation": "silu", "order": order, "inner_activation": "relu", "norm": norm}
    block = randomize(BLOCKS.get("bottleneck")(channels, 128, **arguments))
    x = torch.randn(2, channels, 5, 7)
    assert block.conv1.weight.shape[0] == 32
    if order == PRE:
        branch = conv(F.relu(conv(F.relu(conv(F.silu(x), block.conv1)), block.conv2)), block.conv3)
    else:
        branch = conv(F.relu(conv(F.relu(conv(x, block.conv1)), block.conv2)), block.conv3)
    expected = (x if channels == 128 else conv(x, block.shortcut)) + branch
    expected = expected if order == PRE else F.silu(expected)
    assert torch.allclose(block(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("norm", ["", "GN"])
def test_csp(order: str, depth: int, norm: str) -> None:
    arguments = {"activation": "relu", "order": order, "depth": depth, "inner_activation": "silu"}
    block = randomize(BLOCKS.get("csp")(4, 64, norm=norm, **arguments))

    def step(x: Tensor, layer: nn.Module, activation) -> Tensor:
        return conv(activation(x), layer) if order == PRE else activation(conv(x, layer))

    first, last = (F.relu, F.silu) if order == PRE else (F.silu, F.relu)
    main, short = step(X, block.main, first), step(X, block.short, first)
    for unit in block.units:
        main = main + step(step(main, unit.conv1, F.silu), unit.conv2, F.silu)
    expected = step(torch.cat([main, short], 1), block.final, last)
    assert len(block.units) == depth
    assert torch.allclose(block(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_fsm(order: str) -> None:
    block = randomize(BLOCKS.get("fsm")(4, 32, norm="GN", activation="relu", order=order))
    assert block.attention.weight.shape == (4, 4, 1, 1) and block.attention.bias is None
    weights = torch.sigmoid(F.conv2d(F.adaptive_avg_pool2d(X, 1), block.attention.weight))
    expected = X + X * weights
    expected = (
        conv(F.relu(expected), block.conv) if order == PRE else F.relu(conv(expected, block.conv))
    )
    assert torch.allclose(block(X), expected, atol=1e-5)


def test_the_inner_activation_is_the_blocks_own_or_the_papers() -> None:
    assert isinstance(BLOCKS.get("bottleneck")(4, 8).conv2.activation, nn.ReLU)
    assert isinstance(BLOCKS.get("csp")(4, 8).main.activation, nn.SiLU)
    for name, layer in (("bottleneck", "conv2"), ("csp", "main")):
        block = BLOCKS.get(name)(4, 8, activation="gelu")
        assert isinstance(block.get_submodule(layer).activation, nn.GELU)


def test_deformable_moves_by_its_offsets() -> None:
    block = BLOCKS.get("deformable")(4, 4, groups=2)
    nn.init.dirac_(block.conv.weight)
    taps = block.conv.offset.bias.data[:36].view(2, 9, 2)
    taps[0, :, 0], taps[1, :, 1] = 1.0, -0.5  # a row further down; half a column to the left
    block.conv.offset.bias.data[36:] = 100.0  # masks of 1
    result = block(X)
    assert torch.allclose(result[:, :2, :-1], X[:, :2, 1:], atol=1e-5)
    assert torch.allclose(result[:, 2:, :, 1:], (X[:, 2:, :, 1:] + X[:, 2:, :, :-1]) / 2, atol=1e-5)
    with pytest.raises(ValueError, match="groups: 3 groups do not divide 4 channels"):
        BLOCKS.get("deformable")(4, 4, groups=3)


def every_block() -> list[str]:
    """Those that the channels may change in; the others have tests of their own."""
    kept = ("aifi", "identity", "non_local", "norm")
    return [name for name in BLOCKS.names() if name not in kept]


def test_every_block_has_a_test_of_its_values() -> None:
    assert set(SINGLE + COMPOUND + ATTENTION) == set(every_block())


@pytest.mark.parametrize("name", every_block())
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(6, 10), (1, 3)])
def test_shape_gradients_and_inputs(name: str, order: str, shape: tuple[int, int]) -> None:
    block = randomize(BLOCKS.get(name)(4, 128, activation="silu", order=order))
    x = torch.randn(2, 4, *shape, requires_grad=True)
    before = x.detach().clone()
    result = block(x)
    (result * torch.randn_like(result)).sum().backward()
    assert result.shape == (2, 128, *shape)
    assert torch.equal(x.detach(), before)
    assert x.grad is not None and x.grad.any()
    assert [n for n, p in block.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", every_block())
def test_half_precision(name: str) -> None:
    torch.manual_seed(0)
    block = BLOCKS.get(name)(4, 32, activation="relu")
    exact = block(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(block(X).float(), exact, atol=0.1)
        assert block(X.bfloat16()).dtype == torch.bfloat16
    assert block.bfloat16()(X.bfloat16()).dtype == torch.bfloat16


def test_identity() -> None:
    assert BLOCKS.get("identity")(4, 4)(X) is X
    with pytest.raises(ValueError, match="identity cannot turn 4 channels into 8"):
        BLOCKS.get("identity")(4, 8)


def test_a_norm_alone() -> None:
    x = torch.randn(2, 32, 3, 5)
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (32,), eps=1e-6).permute(0, 3, 1, 2)
    block = BLOCKS.get("norm")(32, 32, norm="LN", activation="relu")
    assert torch.allclose(block(x), F.relu(expected), atol=1e-6)
    first = BLOCKS.get("norm")(32, 32, norm="GN", activation="relu", order=PRE)
    assert torch.allclose(first(x), F.group_norm(F.relu(x), 32))
    assert BLOCKS.get("norm")(4, 4)(X) is X
    with pytest.raises(ValueError, match="norm cannot turn 4 channels into 8"):
        BLOCKS.get("norm")(4, 8)
    with pytest.raises(ValueError, match="order 'norm-conv' is unknown"):
        BLOCKS.get("norm")(4, 4, order="norm-conv")


@pytest.mark.parametrize("name", ACTIVATIONS.names())
def test_every_activation_leaves_its_input_alone(name: str) -> None:
    before = X.clone()
    assert ACTIVATIONS.get(name)()(X).shape == X.shape
    assert torch.equal(X, before)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN", "GN", "LN", "naiveSyncBN"])
def test_eps_and_momentum_reach_every_norm(norm: str) -> None:
    layer = norm_layer(norm, 32)
    assert layer is not None
    own = layer.eps, getattr(layer, "momentum", None)
    assert set_norm(layer, 0.0, 0.0) is layer
    assert (layer.eps, getattr(layer, "momentum", None)) == own
    set_norm(nn.Sequential(layer), 1e-3, 0.01)
    assert layer.eps == 1e-3
    assert getattr(layer, "momentum", None) in (0.01, None)


def test_eps_and_momentum_of_a_pyramid() -> None:
    nodes = (
        node("low", 4, ["res4", "res5"], block="conv3x3"),
        node("out", 5, ["low"], block="csp"),
    )
    defaults = Defaults(32, norm="BN", fuse=op("concat"), norm_eps=1e-3, norm_momentum=0.01)
    pyramid = Pyramid(
        Graph({"res4": 4, "res5": 5}, nodes, ("out",)), {"res4": 8, "res5": 8}, defaults
    )
    norms = [m for m in pyramid.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 9  # two projections, the fusion, the convolution, and five of csp
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


def test_eps_is_not_taken_for_that_of_a_fusion() -> None:
    graph = Graph({"a4": 4, "b4": 4}, (node("out", 4, ["a4", "b4"]),), ("out",))
    defaults = Defaults(8, fuse=op("fast_normalized"), norm_eps=1e-3)
    assert Pyramid(graph, {"a4": 8, "b4": 8}, defaults).get_submodule("out_fuse").eps == 1e-4


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="norm: unknown norm 'XN'.*BN, SyncBN"):
        norm_layer("XN", 32)
    with pytest.raises(ValueError, match="'GN' cannot normalise 33 channels.*multiple of 32"):
        norm_layer("GN", 33)
    with pytest.raises(ValueError, match="csp halves its channels: 7 is odd"):
        BLOCKS.get("csp")(4, 7)
    with pytest.raises(ValueError, match="depth: -1 units; give 0 or more"):
        BLOCKS.get("csp")(4, 8, depth=-1)


@pytest.mark.parametrize("name", every_block())
def test_activation_and_order_are_checked(name: str) -> None:
    with pytest.raises(KeyError, match="activation: unknown name 'rlu'.*did you mean 'relu'"):
        BLOCKS.get(name)(4, 4, activation="rlu")
    with pytest.raises(ValueError, match="order 'norm-conv' is unknown.*conv-norm-act"):
        BLOCKS.get(name)(4, 4, order="norm-conv")


@pytest.mark.parametrize("norm", ["GN", "BN", "SyncBN", "LN", "FrozenBN"])
@pytest.mark.parametrize("training", [False, True])
def test_a_norm_takes_one_value_and_is_torchs_otherwise(norm: str, training: bool) -> None:
    """P6 of a small image: torch's own GN and BN refuse a single image's map of 1x1."""
    torch.manual_seed(0)
    layer: Any = norm_layer(norm, 32)
    x = torch.randn(1, 32, 1, 1, requires_grad=True)
    y = layer.train(training)(x)
    assert y.isfinite().all()
    if norm == "GN":  # as in a batch of several images: a group of one value has no deviation
        many = layer(x.detach().expand(2, -1, -1, -1))
        assert torch.allclose(y, many[:1], atol=1e-6) and y.abs().max() < 1e-3
    elif norm in ("BN", "SyncBN"):
        assert torch.allclose(y, x, atol=1e-4)  # by its running statistics, which stay
        assert layer.num_batches_tracked == 0 and layer.running_var.eq(1).all()
    theirs = get_norm(norm, 32).train(training)
    x = torch.randn(2, 32, 3, 3)
    assert torch.equal(layer(x), theirs(x))
    state = layer.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
