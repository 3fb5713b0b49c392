"""Properties of random graphs: what `Graph.check()` accepts builds and runs, and what it rejects says why."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Callable

import torch
from helpers import CHANNELS, LEVELS, assert_same, randomize, rounding_of, small_maps
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpn_plugin.pyramid.blocks import BLOCKS
from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.graph import Edge, Graph, Node, Operator, node, op
from fpn_plugin.pyramid.pyramid import REGISTRIES, Pyramid
from fpn_plugin.pyramid.resample import DOWNSAMPLE, UPSAMPLE
from fpn_plugin.pyramid.resolve import Defaults

OPERATORS = {kind: registry.names() for kind, registry in REGISTRIES.items()}
GUIDED = [name for name in UPSAMPLE.names() if getattr(UPSAMPLE.get(name), "guided", False)]
UNGUIDED = [name for name in UPSAMPLE.names() if name not in GUIDED]
STRIDED = [
    name for name in BLOCKS.names() if "stride" in inspect.signature(BLOCKS.get(name)).parameters
]
WIDTH = 64  # for GN's 32 groups in blocks that halve it
SIZES = [(97, 131), (33, 65), (64, 41)]


def changes_channels(block: str) -> bool:
    try:
        BLOCKS.get(block)(32, 64)
    except ValueError:
        return False
    return True


# blocks that the channels must not change in are a few among the others: most graphs can be built
_CHANGING = [name for name in BLOCKS.names() if changes_channels(name)]
SOME_BLOCKS = [*_CHANGING * 4, *(name for name in BLOCKS.names() if name not in _CHANGING)]


def run_settings(examples: int) -> Callable:
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
    )


def arity(fusion: str) -> int:
    return getattr(FUSIONS.get(fusion), "arity", 0)


@st.composite
def operators(draw: st.DrawFn, names: list[str]) -> Operator:
    """An operator of these names; now and then a convolution gets an activation."""
    name = draw(st.sampled_from(names))
    activation = draw(st.sampled_from(["", "", "relu", "silu"]))
    takes = name in ("conv1x1", "conv3x3", "separable", "bottleneck", "csp", "fsm")
    return op(name, activation=activation) if takes and activation else op(name)


def seldom(strategy: st.SearchStrategy) -> st.SearchStrategy:
    """None three times out of four."""
    return st.sampled_from([False, False, False, True]).flatmap(
        lambda drawn: strategy if drawn else st.none()
    )


@st.composite
def edges(draw: st.DrawFn, source: str, gap: int, guide: bool) -> Edge:
    """An edge over `gap` levels, up if positive, that is guided only where there is a `guide`."""
    resamplers = DOWNSAMPLE.names() if gap < 0 else UNGUIDED + GUIDED * guide
    return Edge(
        source,
        project=draw(seldom(operators(SOME_BLOCKS))),
        resample=draw(st.none() | operators(resamplers)) if gap else None,
        block=draw(seldom(operators(SOME_BLOCKS))),
    )


@st.composite
def nodes(draw: st.DrawFn, name: str, level: int, sources: list[str], levels: dict) -> Node:
    """A node of these sources; now and then its fusion has a fixed arity that does not fit."""
    block = draw(operators(SOME_BLOCKS))
    if level > 0 and block.name in STRIDED and draw(st.booleans()):
        stride = draw(st.sampled_from([2, 4] if level > 2 else [2]))
        block = dataclasses.replace(block, args=(*block.args, ("stride", stride)))
    input_level = Node(name, level, (), None, block).input_level
    guide = any(levels[source] == input_level for source in sources) and draw(st.booleans())
    fitting = [fuse for fuse in FUSIONS.names() if arity(fuse) in (0, len(sources))]
    violate = draw(st.integers(0, 19)) == 19
    fuse = draw(st.none() | operators(FUSIONS.names() if violate else fitting))
    made = [draw(edges(source, levels[source] - input_level, guide)) for source in sources]
    return node(name, level, made, fuse, block)


@st.composite
def graphs(draw: st.DrawFn, most_nodes: int = 6) -> Graph:
    """A random graph that `check()` accepts: what no node reads becomes an output or, where a level
    would have several, is fused into one."""
    names = draw(st.just(set(LEVELS)) | st.sets(st.sampled_from(list(LEVELS)), min_size=1))
    inputs = {name: level for name, level in LEVELS.items() if name in names}
    levels = dict(inputs)
    made: list[Node] = []

    def add(name: str, level: int, sources: list[str]) -> None:
        made.append(draw(nodes(name, level, sources, levels)))
        levels[name] = level

    for index in range(draw(st.integers(1, most_nodes))):
        name = draw(st.sampled_from([f"n{index}", f"stage{index}.td"]))
        sources = draw(st.lists(st.sampled_from(list(levels)), min_size=1, max_size=3))
        add(name, draw(st.integers(2, 6)), sources)
    outputs: dict[int, str] = {}
    for level in sorted(set(levels.values())):
        read = {edge.source for item in made for edge in item.inputs}
        unread = [name for name in levels if levels[name] == level and name not in read]
        if len(unread) == 1 and unread[0] not in inputs:
            outputs[level] = unread[0]
        elif unread:
            add(f"out{level}", level, unread)
            outputs[level] = f"out{level}"
    for item in made:  # a map that a node reads may be an output too
        if item.level not in outputs and draw(st.booleans()):
            outputs[item.level] = item.name
    return Graph(inputs, tuple(made), tuple(outputs[level] for level in sorted(outputs)))


@st.composite
def defaults(draw: st.DrawFn, norms: tuple[str, ...] = ("", "", "GN")) -> Defaults:
    return Defaults(
        WIDTH,
        fuse=op(draw(st.sampled_from([name for name in FUSIONS.names() if not arity(name)]))),
        upsample=op(draw(st.sampled_from(UNGUIDED))),
        downsample=op(draw(st.sampled_from(DOWNSAMPLE.names()))),
        norm=draw(st.sampled_from(norms)),
        activation=draw(st.sampled_from(["", "relu"])),
    )


def build(graph: Graph, given_defaults: Defaults, built: list[bool]) -> Pyramid | None:
    """The pyramid in eval mode, or None where the operators do not go together and the error says
    at which node; `built` counts."""
    torch.manual_seed(0)
    graph.check(OPERATORS)
    try:
        pyramid = randomize(Pyramid(graph, CHANNELS, given_defaults)).eval()
    except (ValueError, KeyError) as error:
        assert any(f"node {item.name!r}" in str(error) for item in graph.nodes), error
        built.append(False)
        event("rejected when it was built")
        return None
    built.append(True)
    event("built")
    return pyramid


def images(graph: Graph, size: tuple[int, int]) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The graph's inputs for an odd image, and its size, after the padding that the graph asks for.

    It needs none where every level that maps are brought to begins with an input of that size.
    """
    known = set(graph.inputs.values())
    if known != set(LEVELS.values()) or any(item.input_level < 2 for item in graph.nodes):
        divisor = graph.size_divisibility() or 1
        size = (-(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor)
    maps = small_maps(*size)
    # small values, because products of products grow
    return {name: 0.5 * maps[name] for name in graph.inputs}, size


def test_what_check_accepts_runs_and_scripts() -> None:
    built: list[bool] = []

    @run_settings(40)
    @given(graphs(), defaults(), st.sampled_from(SIZES))
    def holds(graph: Graph, given_defaults: Defaults, size: tuple[int, int]) -> None:
        pyramid = build(graph, given_defaults, built)
        if pyramid is None:
            return
        maps, size = images(graph, size)
        before = {name: x.clone() for name, x in maps.items()}
        outputs = pyramid(maps)
        assert_same(maps, before)
        assert list(outputs) == [f"p{graph.level(name)}" for name in graph.outputs]
        for name, x in outputs.items():
            stride = 2 ** int(name[1:])
            assert tuple(x.shape) == (1, WIDTH, -(-size[0] // stride), -(-size[1] // stride))
            assert x.isfinite().all(), name
        sum(x.sum() for x in outputs.values()).backward()
        without = [name for name, p in pyramid.named_parameters() if p.grad is None]
        assert without == []
        with torch.no_grad():
            assert_same(torch.jit.script(pyramid)(maps), outputs, rounding_of(pyramid, outputs))

    holds()
    assert sum(built) > len(built) / 2, f"only {sum(built)} of {len(built)} graphs were built"


BAD_OPERATORS = st.sampled_from([op("nothing"), op(""), op("sum"), op("nearest"), op("maxpool")])
STRIDES = st.sampled_from([3, 0, -2, 2, 128, "2", 1.5, None])
BAD_LEVELS = st.sampled_from([-1, 13, 99, 2.5, True, None, "3"])
SOURCES = st.sampled_from(["res9", "n0", "out3", "", None])
NAMES = st.sampled_from(["", "a b", "1a", "n0", "n0.x", "res2", "x_fuse", "bottom_up", None, 3])


@st.composite
def corruptions(draw: st.DrawFn) -> Graph:
    """A good graph with one to three things done to it, each of them wrong more often than not."""
    graph = draw(graphs(most_nodes=3))
    for _ in range(draw(st.integers(1, 3))):
        graph = draw(st.sampled_from([_spoil_node, _spoil_edge, _spoil_graph]))(draw, graph)
    return graph


def _spoil_node(draw: st.DrawFn, graph: Graph) -> Graph:
    index = draw(st.integers(0, len(graph.nodes) - 1)) if graph.nodes else 0
    field, values = draw(
        st.sampled_from(
            [
                ("name", NAMES),
                ("level", BAD_LEVELS),
                ("level", st.integers(0, 12)),
                ("inputs", st.just(())),
                ("fuse", BAD_OPERATORS),
                ("block", BAD_OPERATORS),
                ("block", STRIDES.map(lambda stride: op("conv3x3", stride=stride))),
            ]
        )
    )
    return _change(graph, index, **{field: draw(values)})


def _spoil_edge(draw: st.DrawFn, graph: Graph) -> Graph:
    places = [(i, j) for i, item in enumerate(graph.nodes) for j in range(len(item.inputs))]
    if not places:
        return graph
    index, place = draw(st.sampled_from(places))
    strided = STRIDES.map(lambda stride: op("conv1x1", stride=stride))
    field, values = draw(
        st.sampled_from(
            [
                ("source", SOURCES),
                ("resample", BAD_OPERATORS),
                ("project", BAD_OPERATORS | strided),
                ("block", BAD_OPERATORS | strided),
            ]
        )
    )
    old = list(graph.nodes[index].inputs)
    old[place] = dataclasses.replace(old[place], **{field: draw(values)})
    return _change(graph, index, inputs=tuple(old))


def _spoil_graph(draw: st.DrawFn, graph: Graph) -> Graph:
    unread = node("unread", 3, list(graph.inputs)[:1])
    level = draw(BAD_LEVELS)
    spoiled: list[dict[str, Any]] = [
        {"nodes": (*graph.nodes, unread)},
        {"nodes": graph.nodes + graph.nodes[-1:]},
        {"nodes": graph.nodes[::-1]},
        {"nodes": graph.nodes[1:]},
        {"nodes": ()},
        {"outputs": graph.outputs[::-1]},
        {"outputs": graph.outputs[1:]},
        {"outputs": graph.outputs * 2},
        {"outputs": (*graph.outputs, "nothing")},
        {"outputs": tuple(graph.inputs)},
        {"outputs": ()},
        {"inputs": {}},
        {"inputs": {**graph.inputs, "extra": 3}},
        {"inputs": dict.fromkeys(graph.inputs, level)},
    ]
    return dataclasses.replace(graph, **draw(st.sampled_from(spoiled)))


def _change(graph: Graph, index: int, **fields: Any) -> Graph:
    changed = list(graph.nodes)
    if changed:
        changed[index] = dataclasses.replace(changed[index], **fields)
    return dataclasses.replace(graph, nodes=tuple(changed))


def test_what_check_rejects_says_why() -> None:
    rejected: list[bool] = []

    @run_settings(150)
    @given(corruptions())
    def holds(graph: Graph) -> None:
        try:
            graph.check(OPERATORS)
        except (ValueError, KeyError) as error:
            places = [f"node {item.name!r}" for item in graph.nodes]
            places += [f"input {name!r}" for name in graph.inputs]
            places += ["graph's outputs", "graph has no outputs", "graph has no inputs"]
            assert any(place in str(error) for place in places), f"which node? {error}"
            rejected.append(True)
            event("rejected")
        else:
            rejected.append(False)
            event("accepted")

    holds()
    assert sum(rejected) > len(rejected) / 2
