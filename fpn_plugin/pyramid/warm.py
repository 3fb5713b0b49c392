"""Two pyramids as one graph: a checkpoint's, and a new one that comes in level by level.

The nodes that both have are there once. Of what else the old pyramid has, nodes get the prefix
`warm.`. Where both give a level, `warm_gate<level>` blends the old map with the new one, by a
weight per channel that starts at zero: so the whole begins as the old pyramid, whatever the new one
is.
This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Mapping

from fpn_plugin.pyramid.graph import Edge, Graph, Node, Step, node
from fpn_plugin.pyramid.resolve import Defaults, ModuleSpec, ResolvedNode, resolve
from fpn_plugin.registry import bad_argument

PREFIX = "warm."
GATE = "warm_gate"


@dataclass(frozen=True)
class Origin:
    """Where the weights of a part come from.

    Attributes:
        path: of the part in the old pyramid.
        exact: whether the part computes there what it does here, on the same maps.
    """

    path: str
    exact: bool


@dataclass(frozen=True)
class WarmPyramid:
    """Two pyramids as one.

    Attributes:
        graph: both, with the gates.
        per_node: the defaults of the old pyramid's nodes, by name.
        origins: where parts get their weights from, by path; the others are new.
        gates: the gate of each output ("p3"); "" for an output that both have in common.
        left: the outputs of the old pyramid that the new one does not give.
        width: the channels of the old pyramid as it was trained.
        operators: the names of all operators in the old pyramid.
    """

    graph: Graph
    per_node: Mapping[str, Defaults]
    origins: Mapping[str, Origin]
    gates: Mapping[str, str]
    left: tuple[str, ...]
    width: int
    operators: frozenset[str]


def combine(
    old: tuple[Graph, Defaults], new: tuple[Graph, Defaults], in_channels: Mapping[str, int]
) -> WarmPyramid:
    """Put two pyramids on the same bottom-up maps together.

    Args:
        old: the checkpoint's. Only what leads to the levels that `new` gives as well is kept, and
            it is built with the channels of `new`.
        in_channels: of the bottom-up maps of both, by name.

    Raises:
        ValueError: naming `warm_from`, if they have no level in common.
    """
    (old_graph, trained), (new_graph, defaults) = old, new
    before = replace(trained, channels=defaults.channels)
    old_outputs, new_outputs = old_graph.output_names(), new_graph.output_names()
    common = [name for name in new_outputs if name in old_outputs]
    if not common:
        raise bad_argument(
            "warm_from",
            f"no level is in common: the old pyramid gives {', '.join(old_outputs)}, the new one"
            f" {', '.join(new_outputs)}",
        )
    old_graph = _leading_to(old_graph, [old_outputs[name] for name in common])
    old_steps = resolve(old_graph, in_channels, before)
    new_steps = resolve(new_graph, in_channels, defaults)
    shared = _shared(old_steps, new_steps, _style(before) == _style(defaults), in_channels)
    moved = _renamed(old_graph, shared)
    gates = {name: "" for name in common if old_outputs[name] in shared & {new_outputs[name]}}
    ends = []
    for name in [name for name in common if name not in gates]:
        gates[name] = f"{GATE}{name[1:]}"
        source = _moved(old_outputs[name], shared)
        ends.append(node(gates[name], int(name[1:]), [source, new_outputs[name]], "blend"))
    rest = [each for each in new_graph.nodes if each.name not in shared]
    inputs = {**old_graph.inputs, **new_graph.inputs}
    graph = Graph(
        dict(sorted(inputs.items(), key=lambda pair: pair[1])),
        (*moved, *rest, *ends),
        tuple(gates.get(name) or new_outputs[name] for name in new_outputs),
    )
    per_node = {each.name: before for each in moved if each.name not in shared}
    outputs = (set(old_outputs.values()), set(new_outputs.values()))
    origins = {
        **_kept_origins(old_steps, shared),
        **_relatives(old_steps, new_steps, outputs, shared),
    }
    operators = frozenset(part.operator.name for step in old_steps for part in step.parts())
    left = tuple(name for name in old_outputs if name not in new_outputs)
    return WarmPyramid(graph, per_node, origins, gates, left, trained.channels, operators)


def _leading_to(graph: Graph, outputs: list[str]) -> Graph:
    """The part of a graph that some of its outputs need."""
    needed = set(outputs)
    for each in reversed(graph.nodes):
        if needed.intersection(each.maps()):
            needed |= {edge.source for edge in each.inputs}
    return Graph(
        {name: level for name, level in graph.inputs.items() if name in needed},
        tuple(each for each in graph.nodes if needed.intersection(each.maps())),
        tuple(outputs),
    )


def _style(defaults: Defaults) -> tuple[object, ...]:
    """What of the defaults a resolved node does not show."""
    return (defaults.norm, defaults.activation, defaults.norm_eps, defaults.norm_momentum)


def _shared(
    old: tuple[ResolvedNode, ...],
    new: tuple[ResolvedNode, ...],
    same_style: bool,
    inputs: Mapping[str, int],
) -> set[str]:
    """The nodes and steps that compute the same in both, from the bottom-up maps on, and their
    maps."""
    steps = {step.node.name: step for step in new}
    shared: set[str] = set()
    for step in old:
        twin = steps.get(step.node.name)
        sources = {edge.source for edge in step.edges}
        if same_style and twin is not None and sources <= shared | set(inputs):
            if replace(step, drop=()) == replace(twin, drop=()):
                shared |= {step.node.name, *step.node.maps()}
    return shared


def _moved(name: str, shared: set[str]) -> str:
    return name if name in shared else PREFIX + name


def _renamed(graph: Graph, shared: set[str]) -> list[Node | Step]:
    def source(edge: Edge) -> str:
        return edge.source if edge.source in graph.inputs else _moved(edge.source, shared)

    return [
        replace(
            each,
            name=_moved(each.name, shared),
            inputs=tuple(replace(edge, source=source(edge)) for edge in each.inputs),
        )
        for each in graph.nodes
    ]


def _kept_origins(old: tuple[ResolvedNode, ...], shared: set[str]) -> dict[str, Origin]:
    """The parts of the old pyramid keep their weights."""
    origins = {}
    for step in old:
        for part in step.parts():
            path = part.path if step.node.name in shared else PREFIX + part.path
            origins[path] = Origin(part.path, True)
    return origins


def _relatives(
    old: tuple[ResolvedNode, ...],
    new: tuple[ResolvedNode, ...],
    outputs: tuple[set[str], set[str]],
    shared: set[str],
) -> dict[str, Origin]:
    """Where the parts of the new pyramid that the old one lacks can begin: as their namesakes, or
    as what reads the same bottom-up map or gives the same level in the old one alone."""
    names = {part.path: part for step in old for part in step.parts()}
    roles = {role: part for part, role in reversed(_roles(old, outputs[0], shared)) if role}
    origins: dict[str, Origin] = {}
    for part, role in _roles(new, outputs[1], shared):
        for other in (names.get(part.path), roles.get(role)):
            if other is not None and part.path not in origins and _fits(other, part):
                origins[part.path] = Origin(other.path, False)
    return origins


def _fits(old: ModuleSpec, new: ModuleSpec) -> bool:
    fields = ("kind", "in_channels", "out_channels", "amount")
    alike = all(getattr(old, field) == getattr(new, field) for field in fields)
    return alike and old.operator.name == new.operator.name


def _roles(
    steps: tuple[ResolvedNode, ...], outputs: set[str], shared: set[str]
) -> list[tuple[ModuleSpec, str]]:
    """The parts that only this pyramid has, and what each is for: to read a bottom-up map, to give
    a level's last map, or ""."""
    maps = {name for step in steps for name in step.node.maps()}
    parts = []
    for step in steps:
        roles: dict[str, str] = {}
        if step.block and isinstance(step.node, Node) and step.node.name in outputs:
            roles[step.block.path] = f"gives level {step.node.level}"
        for edge in step.edges:
            is_alone = isinstance(step.node, Node) and step.fuse is None
            first = next(edge.parts(), step.block if is_alone else None)
            if edge.source not in maps and first is not None:
                roles[first.path] = f"reads {edge.source}"
        if step.node.name not in shared:
            parts += [(part, roles.get(part.path, "")) for part in step.parts()]
    return parts
