"""Sums that repeat coarse maps themselves, and fused maps made again: equal to the plain operations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import CHANNELS, rounding, small_maps, small_pyramid
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fpn_plugin.pyramid import fused
from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.graph import op
from fpn_plugin.pyramid.pyramid import Pyramid

# freq takes a coarse map and nothing else: test_frequency.py
TAKERS = [
    name
    for name in FUSIONS.names()
    if getattr(FUSIONS.get(name), "takes_coarse", False) and name != "freq"
]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
COARSE = [
    [False, True],
    [True, False],
    [True, True, False],
    [False, False, True],
    [False, True, False],
    [False, False],
]


def plain(module: nn.Module, maps: list[Tensor], size: list[int]) -> Tensor:
    """The same fusion of maps that are repeated before, without any path of its own."""
    module = copy.copy(module)  # the parameters are the same ones
    repeated = [
        F.interpolate(x, size=size, mode="nearest") if small else x
        for x, small in zip(maps, module.coarse)
    ]
    return module(repeated)


def maps_for(coarse: list[bool], layout: torch.memory_format, dtype: torch.dtype, *, factor=2):
    shapes = [(2, 8, 12 // factor, 20 // factor) if small else (2, 8, 12, 20) for small in coarse]
    return [
        torch.randn(shape)
        .to(dtype)
        .contiguous(memory_format=layout)
        .requires_grad_(dtype == torch.float32)
        for shape in shapes
    ]


def test_who_takes_coarse_maps() -> None:
    weighted = ["weighted", "softmax", "fast_normalized", "channel_softmax", "channel_fast"]
    assert TAKERS == sorted(["sum", "avg", *weighted])


@pytest.mark.parametrize("coarse", COARSE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("factor", [2, 4])
def test_equals_the_plain_operations(
    name: str, layout: str, coarse: list[bool], factor: int
) -> None:
    """Bit for bit, or to 1e-6 where a product and a sum round once; gradients, whose terms are
    added in another order, to 1e-5."""
    module = FUSIONS.get(name)(8, len(coarse))
    module.coarse = coarse
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.2, 2.0)
    maps = maps_for(coarse, LAYOUTS[layout], torch.float32, factor=factor)
    other = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in maps]
    result, expected = module(maps, [12, 20]), plain(module, other, [12, 20])
    assert result.is_contiguous(memory_format=LAYOUTS[layout])
    tolerance = rounding([name], [expected])
    assert torch.allclose(result, expected, rtol=0, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(module(maps, [12, 20]), result)
    grad = torch.randn_like(result)
    result.backward(grad)
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    expected.backward(grad)
    wanted = [parameter.grad for parameter in module.parameters()]
    for one, two in zip([*gradients, *(x.grad for x in maps)], [*wanted, *(x.grad for x in other)]):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TAKERS)
def test_half_precision(name: str, layout: str) -> None:
    """Nearer to the float32 result than bfloat16 resolves (2^-8 of the largest terms)."""
    coarse = [False, True, False]
    module = FUSIONS.get(name)(8, 3)
    module.coarse = coarse
    maps = maps_for(coarse, LAYOUTS[layout], torch.bfloat16)
    exact = plain(module, [x.float() for x in maps], [12, 20])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = module(maps, [12, 20])
    assert result.dtype == torch.bfloat16
    assert (result.float() - exact).abs().max() < 2**-7 * exact.abs().max()
    # training: maps in half precision, weights in float32
    leaves = [x.detach().requires_grad_() for x in maps]
    floats = [x.detach().float().requires_grad_() for x in maps]
    module(leaves, [12, 20]).float().square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    plain(module, floats, [12, 20]).square().sum().backward()
    for one, two in zip(leaves, floats):
        assert torch.allclose(one.grad.float(), two.grad, rtol=0.05, atol=0.1)
    for one, parameter in zip(gradients, module.parameters()):
        assert one.dtype == torch.float32
        assert torch.allclose(one, parameter.grad, rtol=0.05, atol=2.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_exactly_doubled_is_left_to_the_plain_operations(layout: str) -> None:
    coarse = torch.randn(2, 8, 6, 10).contiguous(memory_format=LAYOUTS[layout])
    module = FUSIONS.get("fast_normalized")(8, 2)
    module.coarse = [False, True]
    for height, width in [(11, 20), (12, 19), (11, 19), (12, 40), (6, 10)]:
        fine = torch.randn(2, 8, height, width).contiguous(memory_format=LAYOUTS[layout])
        maps = [fine, coarse]
        assert not fused.usable(maps, module.coarse, [height, width])
        expected = plain(module, maps, [height, width])
        assert torch.equal(module(maps, [height, width]), expected)
    gaps = torch.randn(2, 16, 12, 20)[:, ::2]
    assert not fused.usable([gaps, coarse], [False, True], [12, 20])
    halves = [torch.randn(2, 8, 12, 20), coarse.bfloat16()]
    assert not fused.usable(halves, [False, True], [12, 20])


def operators(run) -> dict[str, int]:
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return {event.key: event.count for event in profiler.key_averages()}


@torch.no_grad()
@pytest.mark.parametrize("topology, fuse", [("fpn", "sum"), ("bifpn", "fast_normalized")])
def test_no_map_is_repeated_and_none_is_scaled_alone(topology: str, fuse: str) -> None:
    """Operation counts that must not grow: in channels-last memory a top-down node of two maps is
    one pass, `add`, and the small map's scaling."""
    pyramid = small_pyramid(topology, fuse=op(fuse)).eval()
    maps = {
        name: x.contiguous(memory_format=torch.channels_last)
        for name, x in small_maps(128, 128).items()
    }
    counts = operators(lambda: pyramid(maps))
    assert "aten::upsample_nearest2d" not in counts
    passes = {name: counts.get(f"aten::{name}", 0) for name in ("add", "add_", "mul")}
    # four top-down nodes: the small map scaled, one sum. Of the bottom-up nodes three have three maps
    # and one has two: the first map scaled, the others added to it in place. And eight times the
    # epsilon of the weights
    bifpn = {"add": 4 + 7 + 8, "add_": 0, "mul": 8}
    assert passes == {"fpn": {"add": 3, "add_": 0, "mul": 0}, "bifpn": bifpn}[topology]


@pytest.mark.parametrize("fuse", TAKERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(64, 96), (97, 131)])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_in_a_pyramid(fuse: str, layout: str, size: tuple[int, int], training: bool) -> None:
    """The whole pyramid against itself with every resampler run, and the sums plain."""
    pyramid = small_pyramid("bifpn", fuse=op(fuse), norm="BN").train(training)
    other = copy.deepcopy(pyramid)
    other._deferred = set()
    for module in other.modules():
        if hasattr(module, "coarse"):
            module.coarse = [False] * module.count
    maps = {
        name: x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        for name, x in small_maps(*size, batch=2).items()
    }
    results = []
    for one in (pyramid, other):
        outputs = one(maps)
        sum(x.square().mean() for x in outputs.values()).backward()
        gradients = [parameter.grad for parameter in one.parameters()]
        gradients += [x.grad for x in maps.values()]
        results.append((list(outputs.values()), gradients))
        for x in maps.values():
            x.grad = None
    (outputs, gradients), (expected, expected_gradients) = results
    tolerance = rounding([fuse], expected)
    for one, two in zip(outputs, expected):
        assert torch.allclose(one, two, rtol=0, atol=tolerance)
    for one, two in zip(gradients, expected_gradients):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["", "relu", "silu"])
@pytest.mark.parametrize("block", ["separable", "conv3x3", "csp"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_computing_nodes_again_keeps_every_bit(activation: str, block: str, half: bool) -> None:
    gradients = []
    for again in (False, True):
        torch.manual_seed(1)
        pyramid = small_pyramid(
            "bifpn", fuse=op("fast_normalized"), norm="BN", activation=activation
        )
        if block != "conv3x3":
            pyramid = pyramid_with(block, activation)
        pyramid.recompute = again
        maps = {
            name: x.requires_grad_()
            for name, x in small_maps(batch=2).items()
            if name in pyramid.graph.inputs
        }
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = pyramid(maps)
        sum(x.float().square().mean() for x in outputs.values()).backward()
        gradients.append([p.grad for p in (*pyramid.parameters(), *maps.values())])
        gradients[-1] += [x.detach() for x in outputs.values()]
        gradients[-1] += list(pyramid.buffers())  # statistics move once
    for one, two in zip(*gradients):
        assert torch.equal(one, two)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", [3, 5, 6])
def test_gradient_of_a_map_that_is_no_power_of_two_smaller(factor: int, layout: str) -> None:
    """As where a side of five pixels becomes three, two and one."""
    module = FUSIONS.get("sum")(4, 2)
    module.coarse = [False, True]
    fine = torch.randn(2, 4, factor, 2 * factor).contiguous(memory_format=LAYOUTS[layout])
    coarse = torch.randn(2, 4, 1, 2, requires_grad=True)
    grad = torch.randn_like(fine)
    module([fine, coarse], [factor, 2 * factor]).backward(grad)
    expected = F.avg_pool2d(grad, factor) * factor**2
    assert coarse.grad is not None and torch.allclose(coarse.grad, expected, atol=1e-5)


def pyramid_with(block: str, activation: str) -> Pyramid:
    from fpn_plugin.pyramid.compose import build_graph
    from fpn_plugin.pyramid.resolve import Defaults
    from fpn_plugin.pyramid.topologies import Style

    levels = {"res3": 3, "res4": 4, "res5": 5}
    graph = build_graph("bifpn", levels, Style(block=op(block), activation=activation), 2)
    return Pyramid(graph, CHANNELS, Defaults(32, fuse=op("fast_normalized"), norm="BN"))
