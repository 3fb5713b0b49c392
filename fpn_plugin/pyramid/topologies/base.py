"""What every topology function takes and returns. This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable, Mapping, Sequence

from fpn_plugin.pyramid.graph import Edge, Graph, Node, Operator, Step, node, op, step
from fpn_plugin.registry import Registry, bad_argument

Levels = Mapping[str, int]
Maps = dict[int, str]  # the node or input that gives each level


@dataclass(frozen=True)
class Style:
    """What a topology leaves open.

    Attributes:
        lateral: the block on each bottom-up map.
        block: the block of each output, or of each node where a topology has one block per node.
        activation: for a topology that prescribes one; "" is the paper's.
        inner_levels: how many coarser levels a topology that fuses them makes from its top input.
        first: whether the inputs are bottom-up maps, and not another pyramid's.
    """

    lateral: Operator = Operator("conv1x1")
    block: Operator = Operator("conv3x3")
    activation: str = ""
    inner_levels: int = 0
    first: bool = True

    def act(self, default: str) -> str:
        """The activation that was asked for, or the paper's."""
        return self.activation or default

    def pre_activated(self, default: str) -> Operator:
        """The block, with its activation before its convolution."""
        return prescribe(self.block, order="act-conv-norm", activation=self.act(default))


Topology = Callable[..., Graph]  # of Levels and Style, and of arguments if it passes them to a step
TOPOLOGIES: Registry[Topology] = Registry("topology")
# how many levels a topology that makes levels of its own brings its inputs to, if it comes first
INNER_LEVELS: dict[str, int] = {}
# topologies that make coarser levels than they read; those that read several maps of one level
OWN_LEVELS = {"simple", "projector", "feature2pyramid"}
SEVERAL_OF_A_LEVEL = OWN_LEVELS - {"simple"}


def prescribe(operator: Operator, **hints: Any) -> Operator:
    """The operator with what the topology prescribes, where it says nothing itself."""
    return replace(operator, hints=tuple(hints.items()))


def by_level(inputs: Levels) -> Maps:
    """The inputs by level, from high to low resolution.

    Raises:
        ValueError: naming `in_features`, if there are several of one level.
    """
    maps: Maps = {}
    for name, level in sorted(inputs.items(), key=lambda pair: pair[1]):
        if level in maps:
            raise bad_argument(
                "in_features",
                f"{maps[level]!r} and {name!r} are both of level {level}, and `topology` reads one"
                " map of each: name one of them, or take a topology that reads several of one"
                f" level ({', '.join(sorted(SEVERAL_OF_A_LEVEL))})",
            )
        maps[level] = name
    return maps


def the_level(topology: str, inputs: Levels, finer: int) -> int:
    """The level that all inputs have.

    Args:
        finer: how many finer levels are made from it.

    Raises:
        ValueError: naming the inputs, if they are of several levels, or too fine.
    """
    levels = sorted(set(inputs.values()))
    if len(levels) > 1:
        raise bad_argument(
            "topology",
            f"{topology!r} reads maps of one level, as a plain ViT's, but `in_features`"
            f" {list(inputs)} are of levels {levels}",
        )
    if levels[0] < finer:
        raise bad_argument(
            "topology",
            f"{topology!r} makes a map {2**finer} times finer than {next(iter(inputs))!r}, which"
            f" has a stride of {2 ** levels[0]} already",
        )
    return levels[0]


def graph_of(inputs: Levels, nodes: Sequence[Node | Step], outputs: Mapping[int, str]) -> Graph:
    """A graph with one output per level.

    Args:
        outputs: the node, or the map of a step, that gives each level.
    """
    return Graph(inputs, tuple(nodes), tuple(outputs[level] for level in sorted(outputs)))


def need_levels(topology: str, inputs: Levels, least: int, inner: int = 0) -> None:
    """Refuse too few levels.

    Raises:
        ValueError: naming `topology` and the inputs.
    """
    if len(inputs) + inner < least:
        raise bad_argument(
            "topology",
            f"{topology!r} needs at least {least} levels, but gets {len(inputs)} from `in_features`"
            f" {list(inputs)} and {inner} of its own (`inner_levels`)",
        )


def laterals(prefix: str, inputs: Levels, style: Style, **hints: Any) -> tuple[list[Node], Maps]:
    """A lateral on each bottom-up map; another pyramid's maps have the width already.

    Args:
        hints: what the topology prescribes for them.
    """
    maps = by_level(inputs)
    if not style.first:
        return [], maps
    block = prescribe(style.lateral, **hints)
    nodes = [
        node(f"{prefix}_lateral{level}", level, [name], block=block) for level, name in maps.items()
    ]
    return nodes, {each.level: each.name for each in nodes}


def add_inner_levels(
    prefix: str, maps: Maps, count: int, down: Operator | None = None
) -> list[Node]:
    """Nodes that make coarser levels by downsampling the top map; `maps` gets them too.

    The first one's input is projected where its channels need it (EfficientDet, arXiv:1911.09070:
    1x1 with norm, then a max pool).

    Args:
        down: the resampler. Default: the pyramid's `downsample`.
    """
    nodes = []
    for _ in range(count):
        top = max(maps)
        nodes.append(node(f"{prefix}_in{top + 1}", top + 1, [Edge(maps[top], resample=down)]))
        maps[top + 1] = nodes[-1].name
    return nodes


__all__ = [
    "Edge",
    "Graph",
    "INNER_LEVELS",
    "Levels",
    "Maps",
    "Node",
    "Operator",
    "OWN_LEVELS",
    "SEVERAL_OF_A_LEVEL",
    "Step",
    "Style",
    "TOPOLOGIES",
    "Topology",
    "add_inner_levels",
    "bad_argument",
    "by_level",
    "graph_of",
    "laterals",
    "need_levels",
    "node",
    "op",
    "prescribe",
    "the_level",
    "step",
]
