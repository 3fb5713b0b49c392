"""Graph.check and the YAML form: what is accepted, and what each error says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fpn_plugin.pyramid.compose import add_extra_levels, build_graph, chain
from fpn_plugin.pyramid.graph import Edge, Graph, Node, Operator, as_operator, node, op
from fpn_plugin.pyramid.graph_yaml import parse_graph
from fpn_plugin.pyramid.pyramid import REGISTRIES
from fpn_plugin.pyramid.topologies import INNER_LEVELS, OWN_LEVELS, TOPOLOGIES, Style

INPUTS = {"res4": 4, "res5": 5}
OPERATORS = {kind: registry.names() for kind, registry in REGISTRIES.items()}
GOOD = node("a", 4, ["res4", "res5"])


def check(*nodes: Node, outputs: tuple[str, ...] = ("a",), inputs: dict[str, int] = INPUTS) -> None:
    Graph(inputs, nodes, outputs).check(OPERATORS)


def test_a_good_graph_is_accepted() -> None:
    check(GOOD)


@pytest.mark.parametrize(
    "nodes, message",
    [
        ([node("a", 4, ["res4", "res9"])], "node 'a', inputs.*'res9'.*choose from: res4, res5"),
        ([GOOD, GOOD], "node 'a': the name is used twice"),
        ([node("res4", 4, ["res4", "res5"])], "node 'res4': the name is used twice"),
        ([node("a", 4, [])], "node 'a': it has no inputs"),
        ([node("a", 99, ["res4", "res5"])], "node 'a': level 99 is not"),
        ([node("a", True, ["res4", "res5"])], "node 'a': level True is not"),
        ([node("a", 0, ["res4", "res5"], block=op("conv3x3", stride=2))], "stride 2 of its block"),
        (
            [node("a", 4, ["res4", "res5"], block=op("conv3x3", stride=3))],
            "stride 3 is not a power",
        ),
        ([node("a b", 4, ["res4", "res5"])], "node 'a b': a name is letters"),
        ([node("a_fuse", 4, ["res4", "res5"])], "are taken"),
        ([node("a_edge0.x", 4, ["res4", "res5"])], "are taken"),
        ([node("bottom_up", 4, ["res4", "res5"])], "are taken"),
        ([GOOD, node("a.b", 4, ["a"])], "node 'a.b': 'a' is a node too"),
        ([node("a", 4, ["res4"])], "input 'res5' is neither an output nor read"),
        ([GOOD, node("b", 4, ["a"])], "node 'b' is neither an output nor read"),
        (
            [node("a", 4, ["res4", "res5"], fuse="summ")],
            "node 'a', fuse.*'summ'.*did you mean 'sum'",
        ),
        ([node("a", 4, ["res4", "res5"], block="conv4x4")], "node 'a', block.*'conv4x4'"),
        (
            [node("a", 4, ["res4", Edge("res5", resample=op("maxpool"))])],
            "node 'a', input 'res5', resample: unknown name 'maxpool'.*nearest",
        ),
        (
            [node("a", 4, [Edge("res4", resample=op("nearest")), "res5"])],
            "node 'a', input 'res4', resample: nearest, but both are at level 4",
        ),
        ([node("a", 4, [Edge("res4", project=op("x")), "res5"])], "input 'res4', project.*'x'"),
        ([node("a", 4, [Edge("res4", block=op("x")), "res5"])], "input 'res4', block.*'x'"),
        (
            [node("a", 4, [Edge("res4", block=op("conv3x3", stride=2)), "res5"])],
            r"input 'res4', block: conv3x3\(stride=2\) changes the level",
        ),
        (
            [node("a", 4, ["res4", Edge("res5", project=op("conv1x1", stride=2))])],
            r"input 'res5', project: conv1x1\(stride=2\) changes the level",
        ),
    ],
)
def test_a_bad_node_is_named(nodes: list[Node], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        check(*nodes)


@pytest.mark.parametrize(
    "outputs, message",
    [
        ((), "no outputs"),
        (("c",), "outputs: unknown name 'c'"),
        (("res4",), "outputs: unknown name 'res4'"),
        (("b", "a"), r"levels \[5, 4\].*ascending"),
        (("a", "a"), r"levels \[4, 4\].*one output per level"),
    ],
)
def test_bad_outputs_are_named(outputs: tuple[str, ...], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        check(GOOD, node("b", 5, ["a"]), outputs=outputs)


def test_inputs_must_exist() -> None:
    with pytest.raises(ValueError, match="no inputs"):
        check(GOOD, inputs={})


@pytest.mark.parametrize("name", sorted(set(TOPOLOGIES.names()) - OWN_LEVELS - {"bifusion"}))
@pytest.mark.parametrize("extra", ["none", "maxpool", "conv_p5"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_every_topology_checks(name: str, extra: str, repeats: int) -> None:
    inputs = {"res2": 2, "res3": 3, "res5": 5}  # a gap between levels is fine
    graph = build_graph(name, inputs, Style(), repeats, extra)
    graph.check(OPERATORS)
    own = [6, 7] if INNER_LEVELS.get(name) else []
    top = max([5, *own])
    added = {"none": [], "maxpool": [top + 1]}.get(extra, [top + 1, top + 2])
    assert list(graph.output_names()) == [f"p{level}" for level in (2, 3, 5, *own, *added)]


def test_graphs_import_no_torch() -> None:
    code = (
        "import sys, types\n"
        "for name in ('fpn_plugin', 'fpn_plugin.pyramid'):\n"  # which import everything
        "    sys.modules[name] = package = types.ModuleType(name)\n"
        "    package.__path__ = [name.replace('.', '/')]\n"
        "import fpn_plugin.pyramid.topologies, fpn_plugin.pyramid.compose, fpn_plugin.pyramid.resolve\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_size_divisibility_is_that_of_the_highest_level_that_is_upsampled() -> None:
    levels = {"res2": 2, "res3": 3, "res4": 4}
    assert build_graph("fpn", levels).size_divisibility() == 16
    assert build_graph("fpn", levels, extra_levels="conv_c5").size_divisibility() == 16
    assert build_graph("channel_mapper", levels).size_divisibility() == 0


def test_operators_from_yaml() -> None:
    assert as_operator("conv", "x") == Operator("conv")
    assert as_operator({"name": "conv", "activation": "relu"}, "x") == op("conv", activation="relu")
    assert as_operator('conv(activation="relu", groups=2)', "x") == op(
        "conv", activation="relu", groups=2
    )
    assert str(op("conv", activation="relu")) == "conv(activation=relu)"
    texts = ("conv(relu)", "conv(", "a.conv()", "conv(**{})", "conv(activation=relu)")
    for bad in (3, ["conv"], {"activation": "relu"}, *texts):
        with pytest.raises(ValueError, match="KEY: .* is not an operator"):
            as_operator(bad, "KEY")  # type: ignore[arg-type]


def test_chain_reads_the_outputs_before_it() -> None:
    first, second = build_graph("fpn", INPUTS), build_graph("fpn", {"p4": 4, "p5": 5})
    graph = chain(first, second, "r2_")
    graph.check(OPERATORS)
    laterals = {item.name: item.inputs[0].source for item in graph.nodes if "lateral" in item.name}
    assert laterals["r2_fpn_lateral4"] == "fpn_output4"
    assert laterals["fpn_lateral4"] == "res4"
    with pytest.raises(
        ValueError, match=r"reads level 3, but the pyramid before it gives \[4, 5\]"
    ):
        chain(first, build_graph("fpn", {"p3": 3}), "r2_")


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True, "2"])
def test_bad_repeats(repeats: object) -> None:
    with pytest.raises(ValueError, match="repeats: .* is not a whole number"):
        build_graph("fpn", INPUTS, repeats=repeats)  # type: ignore[arg-type]


def test_bad_extra_levels() -> None:
    with pytest.raises(KeyError, match="extra_levels: unknown name 'conv_c6'"):
        build_graph("fpn", INPUTS, extra_levels="conv_c6")
    lower = parse_graph(INPUTS, [{"name": "a", "level": 4, "inputs": ["res4", "res5"]}])
    with pytest.raises(
        ValueError, match="'conv_c5' reads 'res5' of level 5.*top output is of level 4"
    ):
        add_extra_levels(lower, "conv_c5")


@pytest.mark.parametrize(
    "raw, message",
    [
        ("res4", r"graph\[0\]: 'res4' is not a mapping"),
        ({"name": "a", "level": 4}, r"graph\[0\]: the field 'inputs' is missing"),
        ({"name": "a", "inputs": ["res4"]}, "the field 'level' is missing"),
        ({"level": 4, "inputs": ["res4"]}, "the field 'name' is missing"),
        ({"name": 4, "level": 4, "inputs": ["res4"]}, "name 4 is not a string"),
        ({"name": "a", "level": "x", "inputs": ["res4"]}, r"graph\[0\] \(a\): level 'x'"),
        ({"name": "a", "level": 4, "inputs": "res4"}, "inputs 'res4' is not a list"),
        ({"name": "a", "level": 4, "inputs": [4]}, "inputs: 4 is not a mapping"),
        (
            {"name": "a", "level": 4, "inputs": [{"project": "conv1x1"}]},
            "field 'source' is missing",
        ),
        ({"name": "a", "level": 4, "inputs": [{"source": "res4", "up": "x"}]}, "unknown name 'up'"),
        (
            {"name": "a", "level": 4, "inputs": ["res4"], "blok": "x"},
            "'blok'.*did you mean 'block'",
        ),
        ({"name": "a", "level": 4, "inputs": ["res4"], "fuse": 3}, "node 'a', fuse: 3 is not"),
    ],
)
def test_bad_inline_nodes_are_named(raw: dict, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        parse_graph(INPUTS, [raw])


def test_inline_outputs_are_marked_or_unread() -> None:
    nodes: list[dict] = [
        {"name": "top", "level": 5, "inputs": ["res5"], "block": "conv1x1"},
        {"name": "low", "level": 4, "inputs": ["res4", "top"]},
    ]
    assert parse_graph(INPUTS, nodes).outputs == ("low",)
    marked = [{**item, "output": True} for item in nodes]
    assert parse_graph(INPUTS, marked).outputs == ("low", "top")
