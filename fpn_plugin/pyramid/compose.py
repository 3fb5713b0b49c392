"""Whole pyramids from the catalogue: repeated, one after another, with extra levels.

This module imports no torch.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from functools import partial
from typing import Mapping

from fpn_plugin.pyramid.graph import MAX_LEVEL, Edge, Graph, Operator, as_operator, node, op
from fpn_plugin.pyramid.topologies import INNER_LEVELS, TOPOLOGIES, Style
from fpn_plugin.registry import bad_argument, unknown_name

EXTRA_LEVELS = ("none", "maxpool", "conv_c5", "conv_p5")
MAX_REPEATS = 64  # EfficientDet's largest has 8


def stages(topology: str) -> list[Operator]:
    """The topologies of a stack like "fpn+dyhead(depth=4)", each registered.

    Raises:
        ValueError: (UnknownNameError, a KeyError, for an unknown topology) naming `topology`.
    """
    texts = re.split(r"\+(?![^()]*\))", topology)  # a plus in brackets separates nothing
    where = "topology" + (f" {topology!r}" if len(texts) > 1 else "")
    operators = [as_operator(text, where) or Operator("") for text in texts]
    for each in operators:
        parameters = inspect.signature(TOPOLOGIES.get(each.name, where)).parameters.values()
        is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        if each.args and not is_open:
            raise bad_argument(where, f"{each}, but {each.name} takes no arguments")
    return operators


def build_graph(
    topology: str,
    inputs: Mapping[str, int],
    style: Style = Style(),
    repeats: int = 1,
    extra_levels: str = "none",
    inner_levels: int = -1,
) -> Graph:
    """The graph of a catalogue topology or a stack of them, repeated, with its extra levels.

    Args:
        topology: one name, or several joined by "+", each on the maps that the one before gives;
            a step's arguments stand in brackets.
        inputs: bottom-up maps as `{name: level}` from high to low resolution.
        repeats: how often it runs. Run r > 1 puts `r{r}_` before its node names, stage s > 1 of a
            stack `s{s}_`.
        extra_levels: one of `EXTRA_LEVELS`.
        inner_levels: how many coarser levels are made and fused by the first stage that fuses
            such; -1: what it takes to have five, if that is the first stage.

    Raises:
        ValueError: (KeyError for an unknown topology) naming the argument.
    """
    operators = stages(topology)
    if type(repeats) is not int or not 1 <= repeats <= MAX_REPEATS:
        raise bad_argument("repeats", f"{repeats!r} is not a whole number from 1 to {MAX_REPEATS}")
    maker, count = _inner_levels([each.name for each in operators], len(inputs), inner_levels)
    graph: Graph | None = None
    for run in range(1, repeats + 1):
        for stage, operator in enumerate(operators, 1):
            prefix = (f"r{run}_" if run > 1 else "") + (f"s{stage}_" if stage > 1 else "")
            inner = count if (run, stage) == (1, maker) else 0
            own_style = replace(style, inner_levels=inner, first=graph is None)
            function = partial(TOPOLOGIES.get(operator.name), **dict(operator.args))
            if graph is None:
                graph = function(inputs, own_style)
                continue
            levels = {f"p{graph.level(output)}": graph.level(output) for output in graph.outputs}
            graph = chain(graph, function(levels, own_style), prefix)
    assert graph is not None  # there is a run and a stage
    return add_extra_levels(graph, extra_levels)


def _inner_levels(names: list[str], inputs: int, asked: int) -> tuple[int, int]:
    """The stage, counted from 1, that makes inner levels, and how many."""
    argument = "inner_levels"
    if type(asked) is not int or not -1 <= asked <= MAX_LEVEL:
        raise bad_argument(argument, f"{asked!r} is not a whole number from -1 to {MAX_LEVEL}")
    if asked < 0:
        return 1, max(0, INNER_LEVELS.get(names[0], 0) - inputs)
    makers = [stage for stage, name in enumerate(names, 1) if name in INNER_LEVELS]
    if asked and not makers:
        raise bad_argument(
            argument,
            f"{asked}, but {'+'.join(names)!r} makes no levels of its own; those that do are"
            f" {', '.join(sorted(INNER_LEVELS))}. For levels after it use `extra_levels`",
        )
    return (makers or [1])[0], asked


def add_extra_levels(graph: Graph, extra_levels: str) -> Graph:
    """Append levels coarser than the graph's coarsest output. The names are those of Detectron2's
    `top_block`.

    Args:
        extra_levels: "none"; "maxpool": one level, the top output subsampled (Mask R-CNN);
            "conv_c5" and "conv_p5": two levels by 3x3 convolutions with stride 2, from the top
            input (RetinaNet) or the top output (FCOS).

    Raises:
        ValueError: (KeyError for an unknown name) naming `extra_levels`.
    """
    argument = "extra_levels"
    if extra_levels not in EXTRA_LEVELS:
        raise unknown_name(argument, extra_levels, EXTRA_LEVELS)
    if extra_levels == "none":
        return graph
    top = graph.outputs[-1]
    level = graph.level(top)
    names = [f"top_block.p{level + 1}", f"top_block.p{level + 2}"]
    if extra_levels == "maxpool":
        nodes = [node(names[0], level + 1, [Edge(top, resample=Operator("subsample"))])]
    else:
        top_input = max(graph.inputs, key=graph.inputs.__getitem__)
        source = top if extra_levels == "conv_p5" else top_input
        if graph.level(source) != level:
            raise bad_argument(
                argument,
                f"{extra_levels!r} reads {source!r} of level {graph.level(source)}, but the"
                f" pyramid's top output is of level {level}: use 'conv_p5'",
            )
        conv = op("conv3x3", stride=2, norm="", activation="")
        after_relu = op("conv3x3", stride=2, norm="", activation="relu", order="act-conv-norm")
        nodes = [node(names[0], level + 1, [source], block=conv)]
        nodes += [node(names[1], level + 2, [names[0]], block=after_relu)]
    outputs = tuple(added.name for added in nodes)
    return Graph(graph.inputs, graph.nodes + tuple(nodes), graph.outputs + outputs)


def chain(first: Graph, second: Graph, prefix: str) -> Graph:
    """One graph after another: the second reads the first's outputs in place of its inputs, level
    by level.

    Args:
        prefix: put before every node name of `second`.

    Raises:
        ValueError: if `second` reads a level that `first` does not give.
    """
    given = {first.level(name): name for name in first.outputs}
    names = {name: prefix + name for each in second.nodes for name in each.maps()}
    for name, level in second.inputs.items():
        if level not in given:
            raise ValueError(
                f"{prefix!r}: reads level {level}, but the pyramid before it gives {sorted(given)}"
            )
        names[name] = given[level]
    moved = tuple(
        replace(
            each,
            name=prefix + each.name,
            inputs=tuple(replace(edge, source=names[edge.source]) for edge in each.inputs),
        )
        for each in second.nodes
    )
    return Graph(first.inputs, first.nodes + moved, tuple(names[name] for name in second.outputs))
