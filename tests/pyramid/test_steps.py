"""Steps: what works on the maps of several levels at once, in a graph with nodes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Iterator, List, Sequence

import pytest
import torch
from backbones import toy_backbone
from helpers import CHANNELS, LEVELS, assert_same, randomize, small_maps
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fpn_plugin.pyramid import STEPS, Graph, Pyramid, conv_block, node, step
from fpn_plugin.pyramid.compose import build_graph, chain
from fpn_plugin.pyramid.graph import Edge, op
from fpn_plugin.pyramid.graph_yaml import parse_graph
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.warm import combine
from fpn_plugin.visualize.complexity import measure, node_table
from fpn_plugin.visualize.draw import draw_graph
from fpn_plugin.visualize.layout import lay_out
from fpn_plugin.visualize.maps import map_rows, record_maps


class Mix(nn.Module):
    """Adds to every map what a convolution makes of the mean of all maps' averages."""

    def __init__(
        self, channels: int, levels: Sequence[int], norm: str = "", activation: str = ""
    ) -> None:
        super().__init__()
        self.conv = conv_block(channels, channels, 1, 1, norm, activation)
        self.scale = nn.Parameter(torch.ones(len(levels)))

    def forward(self, maps: List[Tensor]) -> List[Tensor]:
        means = [x.mean(dim=[2, 3], keepdim=True) for x in maps]
        added = self.conv(torch.stack(means).mean(0))
        return [x + self.scale[i] * added for i, x in enumerate(maps)]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(STEPS._objects)
    STEPS.register("mix")(Mix)
    STEPS.register("lose")(Lose)
    yield
    STEPS._objects.clear()
    STEPS._objects.update(before)


class Lose(Mix):
    """Gives one map too few."""

    def forward(self, maps: List[Tensor]) -> List[Tensor]:
        return maps[1:]


def mixed(name: str = "mix", operator: Any = "mix") -> Graph:
    """FPN, of which the three finest maps are mixed."""
    fpn = build_graph("fpn", LEVELS)
    last = step(name, {level: f"fpn_output{level}" for level in (2, 3, 4)}, operator)
    outputs = (*last.maps(), "fpn_output5")
    return Graph(fpn.inputs, (*fpn.nodes, last), outputs)


def pyramid_of(graph: Graph, **defaults: Any) -> Pyramid:
    return randomize(Pyramid(graph, CHANNELS, Defaults(32, **defaults))).eval()


@torch.no_grad()
def test_a_step_takes_and_gives_the_maps_of_its_levels() -> None:
    pyramid = pyramid_of(mixed(), norm="LN", activation="relu")
    plain = Pyramid(
        build_graph("fpn", LEVELS), CHANNELS, Defaults(32, norm="LN", activation="relu")
    )
    state = pyramid.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    assert set(state) - set(plain.state_dict()) == {
        "mix.conv.weight", "mix.conv.norm.weight", "mix.conv.norm.bias", "mix.scale"
    }  # fmt: skip
    maps = small_maps(38, 54, batch=2)
    outputs, before = pyramid(maps), plain(maps)
    assert list(outputs) == ["p2", "p3", "p4", "p5"]
    expected = pyramid.get_submodule("mix")([before["p2"], before["p3"], before["p4"]])
    assert_same(dict(zip(outputs, [*expected, before["p5"]])), outputs)
    assert not torch.equal(outputs["p2"], before["p2"])


@pytest.mark.parametrize("operator", ["msdeform", "dyhead(depth=2)"])
def test_computing_steps_again_keeps_every_bit(operator: str) -> None:
    """`recompute`: the same gradients and statistics, with less saved for the backward pass."""
    pyramid = pyramid_of(mixed(operator=operator), norm="BN").train()
    state, found, sizes = copy.deepcopy(pyramid.state_dict()), [], []
    given = small_maps(batch=2)
    for again in (False, True):
        pyramid.load_state_dict(state)
        pyramid.zero_grad()
        pyramid.recompute = again
        saved: list[int] = []
        maps = {name: x.clone().requires_grad_() for name, x in given.items()}
        with saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            outputs = pyramid(maps)
        sum(x.square().mean() for x in outputs.values()).backward()
        found.append([*(p.grad for p in (*pyramid.parameters(), *maps.values()))])
        found[-1] += [x.clone() for x in (*outputs.values(), *pyramid.buffers())]
        sizes.append(sum(saved))
    assert all(torch.equal(one, two) for one, two in zip(*found))
    assert sizes[1] < sizes[0]


def test_projections_where_the_channels_differ() -> None:
    graph = parse_graph(
        {"res4": 4, "res5": 5},
        [
            {"name": "top", "level": 5, "inputs": ["res5"], "block": "conv1x1"},
            {"name": "both", "step": "mix", "inputs": ["res4", "top"], "output": True},
            {"name": "p6", "level": 6, "inputs": ["both_p5"], "output": True},
        ],
    )
    assert graph.outputs == ("both_p4", "both_p5", "p6")
    pyramid = pyramid_of(graph)
    projected = [name for name in pyramid.state_dict() if "edge" in name]
    assert projected == ["both_edge0.project.weight", "both_edge0.project.bias"]
    assert [x.shape[1] for x in pyramid(small_maps()).values()] == [32, 32, 32]


@torch.no_grad()
def test_repeated_graphs_and_a_warm_start() -> None:
    old, new = build_graph("fpn", LEVELS), mixed()
    mix = step("mix", {level: f"p{level}" for level in (2, 3, 4, 5)}, "mix")
    twice = chain(new, Graph({f"p{n}": n for n in (2, 3, 4, 5)}, (mix,), tuple(mix.maps())), "r2_")
    assert twice.outputs == ("r2_mix_p2", "r2_mix_p3", "r2_mix_p4", "r2_mix_p5")
    for before, after in ((old, new), (new, old), (new, twice), (twice, new)):
        warm = combine((before, Defaults(32)), (after, Defaults(32)), CHANNELS)
        whole = randomize(Pyramid(warm.graph, CHANNELS, Defaults(32), warm.per_node))
        for gate in filter(None, warm.gates.values()):
            nn.init.zeros_(whole.get_parameter(f"{gate}_fuse.weights"))
        alone = pyramid_of(before)
        for path, origin in warm.origins.items():
            if origin.exact:
                state = whole.get_submodule(path).state_dict()
                alone.get_submodule(origin.path).load_state_dict(state)
        maps = small_maps(38, 54)
        found, expected = whole(maps), alone(maps)
        assert_same({name: expected[name] for name in found}, found)
    assert [each.name for each in warm.graph.nodes].count("mix") == 1  # both have it


def test_a_step_that_loses_a_map_is_named() -> None:
    with pytest.raises(ValueError, match="step 'mix': lose takes 3 maps but gives 2"):
        pyramid_of(mixed(operator="lose"))(small_maps())


INPUTS = {"res3": 3, "res4": 4}
BAD_STEPS = {
    r"step 'a': unknown name 'mixx' \(did you mean 'mix'": step("a", {3: "res3"}, "mixx"),
    "step 'a', inputs .*'res9'": step("a", {3: "res3", 4: "res9"}, "mix"),
    r"step 'a': it is for levels \[3, 5\], but its .* of levels \[3, 4\]": step(
        "a", {3: "res3", 5: "res4"}, "mix"
    ),
    "step 'a', input 'res3', resample: nearest, but a step takes": step(
        "a", {3: Edge("res3", resample=op("nearest"))}, "mix"
    ),
    "step 'a', input 'res3', project: unknown name 'x'": step(
        "a", {3: Edge("res3", project=op("x"))}, "mix"
    ),
    "step 'a': it has no inputs": step("a", {}, "mix"),
    "step 'res3': the name is used twice": step("res3", {3: "res3"}, "mix"),
    "step 'a b': a name is letters": step("a b", {3: "res3"}, "mix"),
    "step 'a', input 'res3', block: .* changes the level": step(
        "a", {3: Edge("res3", block=op("conv3x3", stride=2))}, "mix"
    ),
    "step 'a', input 'res3': it has 16 channels, but the pyramid 32": step(
        "a", {3: Edge("res3", project=op("identity"))}, "mix"
    ),
    "step 'a', arguments of mix: unknown name 'depth'": step("a", {3: "res3"}, op("mix", depth=2)),
    "step 'a': norm: unknown norm 'XN'": step("a", {3: "res3"}, op("mix", norm="XN")),
}


@pytest.mark.parametrize("message", BAD_STEPS)
def test_a_bad_step_is_named(message: str) -> None:
    bad = BAD_STEPS[message]
    nodes = (bad, node("b", 3, [*bad.maps(), "res3", "res4"]))
    with pytest.raises((ValueError, KeyError), match=message):
        Pyramid(Graph(INPUTS, nodes, ("b",)), CHANNELS, Defaults(32))


def test_names_of_maps_are_taken() -> None:
    first = step("a", {3: "res3", 4: "res4"}, "mix")
    for second, message in (
        (node("a_p3", 3, ["a_p4"]), "node 'a_p3': the name is used twice"),
        (node("a", 3, ["a_p4"]), "node 'a': the name is used twice"),
        (node("a.b", 3, ["a_p3", "a_p4"]), "node 'a.b': 'a' is a node too"),
        (node("b", 3, ["res3"]), "step 'a' is neither an output nor read"),
    ):
        with pytest.raises(ValueError, match=message):
            Graph(INPUTS, (first, second), (second.name,)).check()
    named_so = node("a_p4", 4, ["res4"])
    with pytest.raises(ValueError, match="step 'a': the name of its map 'a_p4' is used twice"):
        Graph(INPUTS, (named_so, first), ("a_p3", "a_p4")).check()


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"name": "a", "step": "mix", "level": 3, "inputs": ["res3"]}, r"graph\[0\].*'level'"),
        ({"name": "a", "step": "mix"}, r"graph\[0\]: the field 'inputs' is missing"),
        ({"name": "a", "step": None, "inputs": ["res3"]}, r"graph\[0\] \(a\), step: None is not"),
        ({"name": "a", "step": "mix", "inputs": ["x"]}, r"graph\[0\] \(a\), inputs .*'x'"),
        (
            {"name": "a", "step": "mix", "inputs": ["res4", "res3"]},
            r"levels \[4, 3\].*finest first",
        ),
        ({"name": "a", "step": "mix", "inputs": ["res4", "res4"]}, r"levels \[4, 4\].*one map per"),
    ],
)
def test_bad_inline_steps_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        parse_graph(INPUTS, [raw]).check()


def test_a_step_is_drawn_counted_and_recorded(tmp_path: Path) -> None:
    inner = {2: "res2", 4: "res4"}  # its box goes past level 3, which it does not read
    nodes = [
        {"name": "mix", "step": "mix", "inputs": list(inner.values())},
        {"name": "fused", "level": 3, "inputs": ["res3", "mix_p4"], "output": True},
        {"name": "fine", "level": 2, "inputs": ["mix_p2"], "block": "conv3x3", "output": True},
    ]
    backbone = toy_backbone(graph=nodes)
    layout = lay_out(backbone.graph)
    (column, top), (same, bottom) = layout.cells["mix_p4"], layout.cells["mix_p2"]
    assert (column, bottom - top) == (same, 2)
    for route in layout.routes:  # none passes its box along a row
        start, end = layout.cells[route.source][0], layout.cells[route.target][0]
        if route.track is not None and route.track.lane is None and start < column < end:
            assert not top <= route.track.row <= bottom
    draw_graph(backbone, tmp_path / "a.svg")
    assert "step over several levels" in (tmp_path / "a.svg").read_text()
    costs = measure(backbone, (64, 64))
    assert costs.nodes["mix"].parameters == (8 * 8 + 8) + 2 + (24 * 8 + 8)  # res4 projected
    row = next(line for line in node_table(backbone, costs).splitlines() if line[:3] == "mix")
    assert row.split()[:3] == ["mix", "2…4", "4…16"]
    with record_maps(backbone) as maps:
        backbone(torch.randn(1, 3, 64, 64))
    assert maps.nodes["mix_p2"].shape == (1, 16, 16) and maps.nodes["mix_p4"].shape == (1, 4, 4)
    assert [row.title for row in map_rows(backbone, maps)][-1].startswith("output")
