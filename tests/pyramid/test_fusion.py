"""Every fusion against values worked out by hand or by plain torch calls, and in a graph."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import CHANNELS, randomize
from torch import Tensor, nn

from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.graph import Edge, Graph, node, op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import WIDENING, Defaults

A = torch.tensor([[[[1.0, -2.0]]]])
B = torch.tensor([[[[3.0, 4.0]]]])
C = torch.tensor([[[[-5.0, 0.5]]]])
CASES = [
    (name, count)
    for name in FUSIONS.names()
    for count in (2, 3, 5)
    if FUSIONS.get(name).arity in (0, count)  # type: ignore[attr-defined]
]
LEARNED = [name for name in FUSIONS.names() if hasattr(FUSIONS.get(name), "normalized_weights")]


def fusion(name: str, *weights: float, count: int = 3) -> nn.Module:
    module = FUSIONS.get(name)(1, count)
    if weights:
        module.weights.data = torch.tensor(weights).reshape(module.weights.shape)
    return module


def random_maps(count: int, channels: int = 8, **kwargs: bool) -> list[Tensor]:
    return [torch.randn(2, channels, 5, 3, **kwargs) for _ in range(count)]


def maps_for(name: str, count: int, **kwargs: bool) -> list[Tensor]:
    """The second of half the size, if the fusion wants that."""
    maps = random_maps(count, **kwargs)
    return [maps[0], torch.randn(2, 8, 3, 2, **kwargs)] if name == "freq" else maps


@pytest.mark.parametrize(
    "module, expected",
    [
        (fusion("sum"), [-1.0, 2.5]),
        (fusion("avg"), [-1 / 3, 2.5 / 3]),
        (fusion("max"), [3.0, 4.0]),
        (fusion("product"), [-15.0, -4.0]),
        (fusion("weighted"), [-1.0, 2.5]),
        (fusion("weighted", 2.0, -1.0, 0.5), [-3.5, -7.75]),
        # relu(-1) = 0: the second map is left out
        (fusion("fast_normalized", 2.0, -1.0, 0.5), [-0.5 / 2.5001, -3.75 / 2.5001]),
        (fusion("fast_normalized"), [-1 / 3.0001, 2.5 / 3.0001]),
        # softmax of log(1), log(2), log(5) is 1/8, 2/8, 5/8
        (fusion("softmax", 0.0, 0.6931471806, 1.6094379124), [-18 / 8, 8.5 / 8]),
        (fusion("channel_softmax", 0.0, 0.6931471806, 1.6094379124), [-18 / 8, 8.5 / 8]),
        (fusion("channel_fast", 2.0, -1.0, 0.5), [-0.5 / 2.5001, -3.75 / 2.5001]),
    ],
)
def test_fusion_by_hand(module: nn.Module, expected: list[float]) -> None:
    assert torch.allclose(module([A, B, C]).flatten(), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize(
    "name, weights, expected",
    [
        # channel 0 weighs 1 : 3, channel 1 weighs 1 : 1
        ("channel_softmax", [[0.0, 2.0], [math.log(3), 2.0]], [[0.25, 0.5], [0.75, 0.5]]),
        ("channel_fast", [[1.0, -5.0], [3.0, 2.0]], [[1 / 4.0001, 0.0], [3 / 4.0001, 2 / 2.0001]]),
    ],
)
def test_channel_weights_by_hand(name: str, weights: list, expected: list) -> None:
    module = FUSIONS.get(name)(2, 2)
    module.weights.data = torch.tensor(weights)
    x = torch.tensor([[[[4.0]], [[10.0]]]])
    y = torch.tensor([[[[8.0]], [[-2.0]]]])
    first, second = expected
    wanted = [4 * first[0] + 8 * second[0], 10 * first[1] - 2 * second[1]]
    assert torch.allclose(module([x, y]).flatten(), torch.tensor(wanted), atol=1e-6)
    assert torch.allclose(module.normalized_weights(), torch.tensor(expected), atol=1e-6)


def test_concat_is_a_convolution_of_all_maps() -> None:
    maps = [torch.randn(2, 3, 4, 5) for _ in range(2)]
    module = FUSIONS.get("concat")(3, 2)
    weight = module.conv.weight[:, :, 0, 0]  # (3, 6)
    expected = (
        torch.einsum("oi,nihw->nohw", weight, torch.cat(maps, 1)) + module.conv.bias[:, None, None]
    )
    assert torch.allclose(module(maps), expected, atol=1e-6)


@pytest.mark.parametrize("levels", [(), (3, 4), (4, 4), (4, 3)])
def test_global_attention_by_hand(levels: tuple[int, ...]) -> None:
    one, two = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[-3.0, 0.0]]]])
    coarse, fine, gate = [1.0, 2.0], [-3.0, 0.0], 1 / (1 + math.exp(-2.0))
    if levels != (4, 3):  # the second is the coarse one; its largest value is 0, σ(0) = 1/2
        coarse, fine, gate = fine, coarse, 0.5
    module = FUSIONS.get("global_attention")(1, 2, levels=levels)
    expected = [c + f * gate for c, f in zip(coarse, fine)]
    assert torch.allclose(module([one, two]).flatten(), torch.tensor(expected), atol=1e-6)


def test_gate_by_hand() -> None:
    new, old = random_maps(2, channels=1)
    module = FUSIONS.get("gate")(1, 2)
    assert torch.allclose(module([new, old]), (new + old) / 2, atol=1e-6)
    module.conv.weight.data.fill_(2.0)
    module.conv.bias.data.fill_(-1.0)
    share = 1 / (1 + torch.exp(1 - 2 * new))
    assert torch.allclose(module([new, old]), share * new + (1 - share) * old, atol=1e-6)


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
@pytest.mark.parametrize("hidden", [16, 12])
def test_asff_by_plain_calls(norm: str, hidden: int) -> None:
    module = randomize(FUSIONS.get("asff")(6, 3, norm=norm, hidden=hidden))
    maps = random_maps(3, channels=6)
    compressed = []
    for x, conv in zip(maps, module.compress):
        assert (conv.bias is None) is bool(norm)
        y = F.conv2d(x, conv.weight, conv.bias)
        if norm == "GN":  # groups of 8 channels, or of the 4 that go into 12
            y = F.group_norm(y, {16: 2, 12: 3}[hidden], conv.norm.weight, conv.norm.bias)
        elif norm == "BN":
            y = F.batch_norm(y, None, None, conv.norm.weight, conv.norm.bias, training=True)
        compressed.append(y)
    logits = F.conv2d(torch.cat(compressed, 1), module.logits.weight, module.logits.bias)
    odds = logits.exp()  # (2, 3, 5, 3): a weight per image, map and pixel
    expected = sum(x * odds[:, i : i + 1] for i, x in enumerate(maps)) / odds.sum(1, keepdim=True)
    assert torch.allclose(module(maps), expected, atol=1e-5)


@pytest.mark.parametrize("channels, hidden", [(6, 32), (1024, 64)])
def test_attention_by_plain_calls(channels: int, hidden: int) -> None:
    module = randomize(FUSIONS.get("attention")(channels, 3))
    maps = random_maps(3, channels=channels)
    assert module.reduce.weight.shape == (hidden, channels)
    pooled = (maps[0] + maps[1] + maps[2]).flatten(2).mean(2)
    squeezed = (pooled @ module.reduce.weight.T + module.reduce.bias).clamp(min=0)
    odds = torch.stack([squeezed @ fc.weight.T + fc.bias for fc in module.logits])
    odds = (odds - odds.amax(0)).exp()  # (3, 2, C): a weight per map, image and channel
    weights = (odds / odds.sum(0))[..., None, None]
    expected = weights[0] * maps[0] + weights[1] * maps[1] + weights[2] * maps[2]
    assert torch.allclose(module(maps), expected, atol=1e-4)


@pytest.mark.parametrize("name, count", CASES)
def test_every_fusion_keeps_the_shape_and_its_inputs(name: str, count: int) -> None:
    module = FUSIONS.get(name)(8, count)
    if name == "blend":
        nn.init.constant_(module.weights, 0.05)  # closed, as it begins, it lets no gradient through
    maps = maps_for(name, count, requires_grad=True)
    before = [x.detach().clone() for x in maps]
    result = module(list(maps))
    (result * torch.randn_like(result)).sum().backward()
    assert result.shape == (2, 8 * count if name == WIDENING else 8, 5, 3)
    assert all(torch.equal(x.detach(), y) for x, y in zip(maps, before))
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in maps)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("name, count", CASES)
def test_every_fusion_stays_in_half_precision(name: str, count: int) -> None:
    module = randomize(FUSIONS.get(name)(8, count))
    maps = maps_for(name, count)
    exact = module(maps)
    with torch.autocast("cpu", torch.bfloat16):
        result = module([x.bfloat16() for x in maps])
    assert result.dtype == torch.bfloat16
    assert torch.allclose(result.float(), exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("name, count", [case for case in CASES if case[0] in LEARNED])
def test_learned_weights_are_what_the_maps_are_multiplied_by(name: str, count: int) -> None:
    module = randomize(FUSIONS.get(name)(8, count))
    module.weights.data.abs_().add_(0.1)  # so that the 1e-4 of fast_normalized is small beside them
    weights = module.normalized_weights()
    assert weights.shape in [(count,), (count, 8)]
    if name != "weighted":
        assert torch.allclose(weights.sum(0), torch.ones(()), atol=1e-2)
    maps = random_maps(count)
    shaped = weights.reshape(count, 1, -1, 1, 1)
    assert torch.allclose(module(maps), (torch.stack(maps) * shaped).sum(0), atol=1e-5)


def pyramid(nodes: list, channels: int = 24) -> Pyramid:
    graph = Graph({"res3": 3, "res4": 4, "res5": 5}, tuple(nodes), (nodes[-1].name,))
    return Pyramid(graph, CHANNELS, Defaults(channels))


def small_inputs() -> dict[str, Tensor]:
    sides = {"res3": 8, "res4": 4, "res5": 2}
    return {name: torch.randn(1, CHANNELS[name], side, side) for name, side in sides.items()}


@pytest.mark.parametrize("order", [["b", "c"], ["c", "b"]])
def test_global_attention_takes_the_higher_level_as_coarse(order: list[str]) -> None:
    nodes = [
        node("a", 3, ["res3"], block="conv1x1"),
        node("b", 4, ["res4", "a"]),
        node("c", 5, ["res5", "b"]),
        node("d", 4, order, fuse="global_attention"),
    ]
    module, maps, seen = pyramid(nodes), small_inputs(), {}
    for name in ("b_fuse", "c_fuse"):
        module.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen.update({name[0]: out})
        )
    result = module(maps)["p4"]
    coarse = F.interpolate(seen["c"], scale_factor=2.0)
    expected = coarse + seen["b"] * torch.sigmoid(F.adaptive_max_pool2d(seen["c"], 1))
    assert torch.allclose(result, expected, atol=1e-6)


@torch.no_grad()
def test_unprojected_maps_are_concatenated() -> None:
    """As in HRFPN: the maps of all levels, each with the channels that it has."""
    edges = [Edge(f"res{level}", op("identity")) for level in (3, 4, 5)]
    module, maps = pyramid([node("a", 3, edges, fuse="concat")], channels=20), small_inputs()
    assert list(module.state_dict()) == ["a_fuse.conv.weight", "a_fuse.conv.bias"]
    conv = module.get_submodule("a_fuse.conv")
    stacked = [F.interpolate(maps[f"res{3 + i}"], scale_factor=2.0**i) for i in range(3)]
    expected = F.conv2d(torch.cat(stacked, 1), conv.weight, conv.bias)
    assert conv.weight.shape == (20, 16 + 24 + 32, 1, 1)
    assert torch.allclose(module(maps)["p3"], expected, atol=1e-6)


def test_an_unprojected_map_goes_to_a_nodes_own_block() -> None:
    edge = Edge("res5", op("identity"), None, op("identity"))
    nodes = [
        node("a", 3, ["res3", "res4"]),
        node("b", 4, [edge], block="conv1x1"),
        node("c", 4, ["a", "b"]),
    ]
    module = pyramid(nodes)
    assert module.get_submodule("b").weight.shape == (24, 32, 1, 1)
    assert module(small_inputs())["p4"].shape == (1, 24, 4, 4)


def same(name: str) -> Edge:
    return Edge(name, project=op("identity"))


@pytest.mark.parametrize(
    "inputs, fuse, message",
    [
        (
            ["res3", "res4", "res5"],
            "global_attention",
            "node 'x', fuse: global_attention fuses 2 maps, but the node has 3 inputs",
        ),
        (["res3", "res4", "res5"], "gate", "node 'x', fuse: gate fuses 2 maps, but the node has 3"),
        (
            [same("res3"), "res4", same("res5")],
            "sum",
            "node 'x', fuse: sum fuses maps of one width, but its inputs have 16, 24 and 32"
            " channels; .* or fuse by concat, stack$",
        ),
        (
            [same("res3"), same("res3"), "res4", "res5"],
            "asff",
            "asff fuses maps of one width, but its inputs have 16, 16, 24 and 24 channels",
        ),
        (
            [same("res5"), same("res5")],
            "max",
            "max fuses maps of the pyramid's width, 24 channels, but its inputs have 32 and 32",
        ),
        (
            ["res4", "res5"],
            "stack",
            "node 'x', block: identity, but stack gives 48 channels and the pyramid has 24: give .*"
            " or fuse by concat",
        ),
        (["res4", "res5"], op("asff", hidden=0), "fuse: hidden 0 is not a positive whole number"),
        (["res4", "res5"], op("attention", reduction=0.5), "node 'x', fuse: reduction 0.5 is not"),
        (["res4", "res5"], op("concat", widths=[1]), "arguments of concat: unknown name 'widths'"),
        (["res4", "res5"], op("global_attention", levels=[1]), "arguments of .*: .*'levels'"),
    ],
)
def test_mistakes_name_the_node(inputs: list, fuse: object, message: str) -> None:
    used = [edge.source if isinstance(edge, Edge) else edge for edge in inputs]
    levels = {name: level for name, level in zip(("res3", "res4", "res5"), (3, 4, 5))}
    graph = Graph(
        {name: level for name, level in levels.items() if name in used},
        (node("x", 4, inputs, fuse=fuse),),  # type: ignore[arg-type]
        ("x",),
    )
    with pytest.raises((ValueError, KeyError), match=message):
        Pyramid(graph, CHANNELS, Defaults(24))


def test_stack_hands_the_sum_of_the_widths_to_the_block() -> None:
    """An edge's `identity` keeps its source's channels, and the maps come in the order given."""
    inputs = [Edge("res5"), Edge("res4", project=op("identity"))]
    graph = Graph({"res4": 4, "res5": 5}, (node("x", 4, inputs, "stack", "conv1x1"),), ("x",))
    pyramid = randomize(Pyramid(graph, CHANNELS, Defaults(12)))
    fine, coarse = torch.randn(2, 24, 6, 5), torch.randn(2, 32, 3, 3)
    moved = F.interpolate(pyramid.get_submodule("x_edge0.project")(coarse), size=(6, 5))
    expected = pyramid.get_submodule("x")(torch.cat([moved, fine], dim=1))
    assert pyramid.get_submodule("x").weight.shape == (12, 12 + 24, 1, 1)
    assert torch.equal(pyramid({"res4": fine, "res5": coarse})["p4"], expected)
