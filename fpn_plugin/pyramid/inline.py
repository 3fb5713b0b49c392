"""A graph from a YAML file's list of nodes (`MODEL.FPN.GRAPH`). This module imports no torch."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from fpn_plugin.pyramid.graph import Edge, Graph, Node, as_operator, check_level, node
from fpn_plugin.registry import unknown_name


def parse_graph(inputs: Mapping[str, int], nodes: Sequence[Mapping[str, Any]]) -> Graph:
    """A graph from the list of nodes of a YAML file (`MODEL.FPN.GRAPH`).

    Each node is a mapping with `name`, `level`, `inputs` (names, or mappings with `source`,
    `project`, `resample`, `block`), and if wanted `fuse`, `block` and `output: true`. Where no node
    says `output`, the outputs are the nodes that no other reads.

    Raises:
        ValueError: naming the node and the field, for anything else.
    """
    parsed = tuple(_parse_node(index, item) for index, item in enumerate(nodes))
    marked = [item.name for item, raw in zip(parsed, nodes) if raw.get("output")]
    if not marked:
        read = {edge.source for item in parsed for edge in item.inputs}
        marked = [item.name for item in parsed if item.name not in read]
    level = {item.name: item.level for item in parsed}
    return Graph(inputs, parsed, tuple(sorted(marked, key=level.__getitem__)))


def _parse_node(index: int, raw: Mapping[str, Any]) -> Node:
    where = f"MODEL.FPN.GRAPH[{index}]"
    _check_fields(where, raw, ("name", "level", "inputs"), ("fuse", "block", "output"))
    if not isinstance(raw["name"], str):
        raise ValueError(f"{where}: name {raw['name']!r} is not a string")
    check_level(f"{where} ({raw['name']})", raw["level"])
    if isinstance(raw["inputs"], str) or not isinstance(raw["inputs"], Sequence):
        raise ValueError(f"{where} ({raw['name']}): inputs {raw['inputs']!r} is not a list")
    edges = [_parse_edge(f"{where} ({raw['name']})", item) for item in raw["inputs"]]
    return node(raw["name"], raw["level"], edges, raw.get("fuse"), raw.get("block") or "identity")


def _parse_edge(where: str, raw: object) -> Edge:
    if isinstance(raw, str):
        return Edge(raw)
    _check_fields(f"{where}, inputs", raw, ("source",), ("project", "resample", "block"))
    assert isinstance(raw, Mapping)  # for the type checker: _check_fields has seen to it
    place = f"{where}, input {raw['source']!r}"
    if not isinstance(raw["source"], str):
        raise ValueError(f"{place}: source is not a string")
    operators = {
        key: as_operator(raw.get(key), f"{place}, {key}")
        for key in ("project", "resample", "block")
    }
    return Edge(raw["source"], **operators)


def _check_fields(where: str, raw: object, needed: Sequence[str], optional: Sequence[str]) -> None:
    valid = [*needed, *optional]
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}: {raw!r} is not a mapping with the fields {', '.join(valid)}")
    for key in raw:
        if key not in valid:
            raise unknown_name(where, key, valid)
    for key in needed:
        if key not in raw:
            raise ValueError(f"{where}: the field {key!r} is missing")
