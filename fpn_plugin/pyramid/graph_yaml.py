"""A graph as a list of mappings, which is its form in YAML. This module imports no torch."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from fpn_plugin.pyramid.graph import (
    Edge,
    Graph,
    Node,
    Step,
    as_operator,
    check_level,
    maps_of,
    node,
    some_operator,
)
from fpn_plugin.registry import bad_argument, unknown_name


def parse_graph(inputs: Mapping[str, int], nodes: Sequence[Mapping[str, Any]]) -> Graph:
    """A graph from a list of nodes and steps, as a YAML file has it.

    Each node is a mapping with `name`, `level`, `inputs` (names, or mappings with `source`,
    `project`, `resample`, `block`), and if wanted `fuse`, `block` and `output: true`. A step has
    `name`, `step` (its operator), `inputs`, one per level, and if wanted `output: true`; the map of
    level 3 that it gives is called `<name>_p3`. Where nothing says `output`, the outputs are the
    maps that are not read.

    Raises:
        ValueError: naming the node and the field, for anything else.
    """
    levels = dict(inputs)
    parsed: list[Node | Step] = []
    for index, raw in enumerate(nodes):
        is_step = isinstance(raw, Mapping) and "step" in raw
        parsed.append(_parse_step(index, raw, levels) if is_step else _parse_node(index, raw))
        levels.update(parsed[-1].maps())
    marked = maps_of(node for node, raw in zip(parsed, nodes) if raw.get("output"))
    if not marked:
        read = {edge.source for node in parsed for edge in node.inputs}
        marked = {name: level for name, level in maps_of(parsed).items() if name not in read}
    return Graph(inputs, tuple(parsed), tuple(sorted(marked, key=marked.__getitem__)))


def _parse_node(index: int, raw: Mapping[str, Any]) -> Node:
    where = f"graph[{index}]"
    _check_fields(where, raw, ("name", "level", "inputs"), ("fuse", "block", "output"))
    place, edges = _parse_inputs(where, raw)
    check_level(place, raw["level"])
    return node(raw["name"], raw["level"], edges, raw.get("fuse"), raw.get("block") or "identity")


def _parse_step(index: int, raw: Mapping[str, Any], levels: Mapping[str, int]) -> Step:
    """Its levels are those of its inputs."""
    where = f"graph[{index}]"
    _check_fields(where, raw, ("name", "step", "inputs"), ("output",))
    place, edges = _parse_inputs(where, raw)
    for edge in edges:
        if edge.source not in levels:
            advice = "only maps that are defined before it"
            raise unknown_name(f"{place}, inputs ({advice})", edge.source, levels)
    sources = tuple(levels[edge.source] for edge in edges)
    operator = some_operator(raw["step"], f"{place}, step")
    return Step(raw["name"], sources, tuple(edges), operator)


def _parse_inputs(where: str, raw: Mapping[str, Any]) -> tuple[str, list[Edge]]:
    """The place of a node or step in messages, and its inputs."""
    if not isinstance(raw["name"], str):
        raise bad_argument(where, f"name {raw['name']!r} is not a string")
    place = f"{where} ({raw['name']})"
    if isinstance(raw["inputs"], str) or not isinstance(raw["inputs"], Sequence):
        raise bad_argument(place, f"inputs {raw['inputs']!r} is not a list")
    return place, [_parse_edge(place, source) for source in raw["inputs"]]


def _parse_edge(where: str, raw: object) -> Edge:
    if isinstance(raw, str):
        return Edge(raw)
    _check_fields(f"{where}, inputs", raw, ("source",), ("project", "resample", "block"))
    assert isinstance(raw, Mapping)  # for the type checker: _check_fields has seen to it
    place = f"{where}, input {raw['source']!r}"
    if not isinstance(raw["source"], str):
        raise bad_argument(place, "source is not a string")
    operators = {
        key: as_operator(raw.get(key), f"{place}, {key}")
        for key in ("project", "resample", "block")
    }
    return Edge(raw["source"], **operators)


def _check_fields(where: str, raw: object, needed: Sequence[str], optional: Sequence[str]) -> None:
    valid = [*needed, *optional]
    if not isinstance(raw, Mapping):
        raise bad_argument(where, f"{raw!r} is not a mapping with the fields {', '.join(valid)}")
    for key in raw:
        if key not in valid:
            raise unknown_name(where, key, valid)
    for key in needed:
        if key not in raw:
            raise bad_argument(where, f"the field {key!r} is missing")
