"""A pyramid as data: a directed acyclic graph of named nodes. This module imports no torch.

A level `l` is a stride of `2**l` pixels. Each node brings every input to its level, fuses them into
one map, and applies its block. A lateral, a top-down step, an output convolution and P6 are all
such nodes. A `Step` works on the maps of several levels together.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any, Collection, Iterable, Mapping, Union

from fpn_plugin.registry import HOW_TO_ADD, bad_argument, unknown_name

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_RESERVED = re.compile(r".*(_fuse|_edge\d+)(\..*)?|(bottom_up|rfp)(\..*)?")
MAX_LEVEL = 12  # a stride of 4096 pixels


@dataclass(frozen=True)
class Operator:
    """A registered operator's name with its arguments: `op("conv3x3", activation="relu")`.

    Attributes:
        args: arguments that the operator must take.
        hints: arguments that a topology prescribes; an operator that takes none such goes without.
    """

    name: str
    args: tuple[tuple[str, Any], ...] = ()
    hints: tuple[tuple[str, Any], ...] = ()

    @property
    def stride(self) -> int:
        """By how much a block makes its map smaller; 1 if it does not."""
        stride = dict(self.args).get("stride", 1)
        if type(stride) is not int or stride < 1 or stride & (stride - 1):
            raise ValueError(f"{self.name}: stride {stride!r} is not a power of two (1, 2, 4, ...)")
        return stride

    def __str__(self) -> str:
        args = ", ".join(f"{key}={value}" for key, value in self.args)
        return f"{self.name}({args})" if args else self.name


def op(name: str, **args: Any) -> Operator:
    """An operator with arguments: `op("conv", activation="relu")`."""
    return Operator(name, tuple(args.items()))


OperatorLike = Union[str, Operator, Mapping[str, Any]]


def as_operator(value: OperatorLike | None, where: str) -> Operator | None:
    """An operator from a name, a text `name(argument=value, ...)`, a `{name: ..., argument: ...}`
    mapping as in YAML, or an operator.

    Raises:
        ValueError: naming `where`, if `value` is none of these.
    """
    if value is None or isinstance(value, Operator):
        return value
    if isinstance(value, str):
        return _parse_call(value, where) if "(" in value else Operator(value)
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return Operator(value["name"], tuple((k, v) for k, v in value.items() if k != "name"))
    raise _no_operator(where, value)


def some_operator(value: OperatorLike | None, where: str) -> Operator:
    operator = as_operator(value, where)
    if operator is None:
        raise _no_operator(where, None)
    return operator


def _parse_call(text: str, where: str) -> Operator:
    """An operator from the text of a call with literal arguments by name."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            args = {each.arg or "**": ast.literal_eval(each.value) for each in call.keywords}
            if "**" not in args:
                return Operator(call.func.id, tuple(args.items()))
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        pass
    raise _no_operator(where, text)


def _no_operator(where: str, value: object) -> ValueError:
    return bad_argument(
        where,
        f"{value!r} is not an operator: write a name, name(argument=value, ...) with texts in"
        " quotes, or {name: ..., argument: ...}",
    )


@dataclass(frozen=True)
class Edge:
    """Where a map comes from and how it reaches the node: `block(resample(project(source)))`.

    Attributes:
        source: a graph input or an earlier node.
        project: a block before the resampling. Default: a 1x1 convolution where the channels need
            it.
        resample: how it changes level. Default: the pyramid's `upsample` or `downsample`.
        block: a block after the resampling. Default: none.
    """

    source: str
    project: Operator | None = None
    resample: Operator | None = None
    block: Operator | None = None


@dataclass(frozen=True)
class Node:
    """Brings every input to its level, fuses them, and applies a block.

    Attributes:
        name: the submodule's name, and so the first part of its checkpoint keys.
        level: of the map that it gives.
        fuse: a fusion operator. Default: the pyramid's `fuse_type`. Not used with one input.
        block: what follows the fusion. A block with a stride takes its input that much finer.
    """

    name: str
    level: int
    inputs: tuple[Edge, ...]
    fuse: Operator | None = None
    block: Operator = Operator("identity")

    @property
    def input_level(self) -> int:
        """The level that inputs are brought to: finer than `level` if the block has a stride."""
        return self.level - (self.block.stride.bit_length() - 1)

    def maps(self) -> dict[str, int]:
        """The level of the map that it gives, by the map's name, which is its own."""
        return {self.name: self.level}


@dataclass(frozen=True)
class Step:
    """Works on the maps of several levels at once, and gives as many maps of the same sizes.

    Attributes:
        name: the submodule's name, and so the first part of its checkpoint keys. The map of level
            `l` that it gives is called `<name>_p<l>`.
        levels: from high to low resolution.
        inputs: a map of each of these levels. None is resampled.
        operator: what it does.
    """

    name: str
    levels: tuple[int, ...]
    inputs: tuple[Edge, ...]
    operator: Operator

    def maps(self) -> dict[str, int]:
        """The levels of the maps that it gives, by their names."""
        return {f"{self.name}_p{level}": level for level in self.levels}


def node(
    name: str,
    level: int,
    inputs: Iterable[str | Edge],
    fuse: OperatorLike | None = None,
    block: OperatorLike = "identity",
) -> Node:
    """A `Node` written shortly: inputs and operators may be plain names."""
    edges = tuple(Edge(source) if isinstance(source, str) else source for source in inputs)
    where = f"node {name!r}"
    fusion, last = as_operator(fuse, f"{where}, fuse"), as_operator(block, f"{where}, block")
    return Node(name, level, edges, fusion, last or Operator("identity"))


def step(name: str, inputs: Mapping[int, str | Edge], operator: OperatorLike) -> Step:
    """A `Step` written shortly: its inputs by level, and names in place of edges and operators."""
    levels = tuple(sorted(inputs))
    sources = (inputs[level] for level in levels)
    edges = tuple(Edge(source) if isinstance(source, str) else source for source in sources)
    return Step(name, levels, edges, some_operator(operator, f"step {name!r}, operator"))


@dataclass(frozen=True)
class Graph:
    """A whole pyramid.

    Attributes:
        inputs: the level of each bottom-up map, by name.
        nodes: and steps, in an order in which they can be computed.
        outputs: names of maps from high to low resolution, one per level. A node's map has the
            node's name.
    """

    inputs: Mapping[str, int]
    nodes: tuple[Node | Step, ...]
    outputs: tuple[str, ...]

    def levels(self) -> dict[str, int]:
        """The level of every map, inputs first."""
        return {**self.inputs, **maps_of(self.nodes)}

    def level(self, name: str) -> int:
        """The level of an input or another map."""
        return self.levels()[name]

    def output_names(self) -> dict[str, str]:
        """`{"p3": name of the map, ...}` from high to low resolution."""
        levels = self.levels()
        return {f"p{levels[name]}": name for name in self.outputs}

    def size_divisibility(self) -> int:
        """What height and width must be divisible by for upsampled maps to meet: 0 if nothing is
        upsampled."""
        levels = self.levels()
        upsampled = [
            levels[edge.source]
            for node in self.nodes
            if isinstance(node, Node)  # a step moves no map to another level
            for edge in node.inputs
            if levels[edge.source] > node.input_level
        ]
        return 2 ** max(upsampled) if upsampled else 0

    def check(self, operators: Mapping[str, Collection[str]] | None = None) -> None:
        """Verify that the graph can be built.

        Args:
            operators: the names that exist, by kind: "fuse", "block", "up", "down" and "step".

        Raises:
            ValueError: (or a KeyError for an unknown operator) naming the node, the value and the
                choices.
        """
        self._check_inputs()
        defined = dict(self.inputs)
        steps: set[str] = set()
        for node in self.nodes:
            _check_name(node, {*defined, *steps})
            if isinstance(node, Step):
                _check_step(node, defined, operators)
                steps.add(node.name)
            else:
                _check_node(node, defined)
                if operators is not None:
                    _check_operators(node, defined, operators)
            defined.update(node.maps())
        _check_prefixes({*defined, *steps})
        self._check_outputs(defined)
        self._check_readers()

    def _check_inputs(self) -> None:
        if not self.inputs:
            raise ValueError("the graph has no inputs: name at least one bottom-up map")
        for name, level in self.inputs.items():
            check_level(f"input {name!r}", level)

    def _check_outputs(self, defined: Mapping[str, int]) -> None:
        if not self.outputs:
            raise ValueError("the graph has no outputs")
        names = set(maps_of(self.nodes))
        for name in self.outputs:
            if name not in names:
                raise unknown_name("the graph's outputs", name, names)
        levels = [defined[name] for name in self.outputs]
        if levels != sorted(set(levels)):
            raise ValueError(
                f"the graph's outputs {list(self.outputs)} have levels {levels}: give one"
                " output per level, from high to low resolution (levels ascending)"
            )

    def _check_readers(self) -> None:
        read = {edge.source for node in self.nodes for edge in node.inputs} | set(self.outputs)
        unread = [f"input {name!r}" for name in self.inputs if name not in read]
        unread += [_where(node) for node in self.nodes if not read.intersection(node.maps())]
        if unread:
            raise ValueError(
                f"{unread[0]} is neither an output nor read by any node: remove it or use it"
            )


def maps_of(nodes: Iterable[Node | Step]) -> dict[str, int]:
    """The levels of the maps that nodes and steps give."""
    return {name: level for node in nodes for name, level in node.maps().items()}


def _where(node: Node | Step) -> str:
    """How error messages name it."""
    return f"{'step' if isinstance(node, Step) else 'node'} {node.name!r}"


def check_level(where: str, level: object) -> None:
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= MAX_LEVEL:
        raise bad_argument(where, f"level {level!r} is not a whole number from 0 to {MAX_LEVEL}")


def _check_name(node: Node | Step, taken: Collection[str]) -> None:
    where = _where(node)
    if not isinstance(node.name, str) or not _NAME.fullmatch(node.name):
        raise ValueError(
            f"{where}: a name is letters, digits and underscores, not beginning with a digit"
        )
    if _RESERVED.fullmatch(node.name):
        raise ValueError(
            f"{where}: names that end in _fuse or _edge<n>, bottom_up and rfp are taken"
        )
    for name in {node.name, *node.maps()}:
        if name in taken:
            whose = "the name" if name == node.name else f"the name of its map {name!r}"
            raise ValueError(f"{where}: {whose} is used twice; every input and node needs its own")


def _check_node(node: Node, defined: Mapping[str, int]) -> None:
    where = _where(node)
    check_level(where, node.level)
    _check_strides(node)
    if node.input_level < 0:
        raise ValueError(
            f"{where}: the stride {node.block.stride} of its block is too large for level"
            f" {node.level}"
        )
    _check_sources(node, defined)


def _check_sources(node: Node | Step, defined: Mapping[str, int]) -> None:
    where = _where(node)
    if not node.inputs:
        raise ValueError(f"{where}: it has no inputs; choose from {', '.join(defined)}")
    for edge in node.inputs:
        if edge.source not in defined:
            raise unknown_name(
                f"{where}, inputs (only maps that are defined before it)", edge.source, defined
            )


def _check_step(
    step: Step, defined: Mapping[str, int], operators: Mapping[str, Collection[str]] | None
) -> None:
    where = _where(step)
    _check_sources(step, defined)
    levels = [defined[edge.source] for edge in step.inputs]
    if levels != sorted(set(levels)):
        raise ValueError(
            f"{where}: its inputs {[edge.source for edge in step.inputs]} are of levels {levels};"
            " give one map per level, finest first"
        )
    if levels != list(step.levels):
        raise ValueError(
            f"{where}: it is for levels {list(step.levels)}, but its inputs"
            f" {[edge.source for edge in step.inputs]} are of levels {levels}"
        )
    for edge in step.inputs:
        if edge.resample is not None:
            raise ValueError(
                f"{where}, input {edge.source!r}, resample: {edge.resample}, but a step takes"
                " every map at its own level"
            )
    _check_strides(step)
    if operators is not None:
        _check_operator(where, step.operator, operators["step"])
        _check_edges(step, operators)


def _check_strides(node: Node | Step) -> None:
    """A node's block may have a stride; what is on the inputs of a node or step may not."""
    parts = [("block", node.block)] if isinstance(node, Node) else []
    for edge in node.inputs:
        for part, operator in (("project", edge.project), ("block", edge.block)):
            parts.append((f"input {edge.source!r}, {part}", operator or Operator("identity")))
    for place, operator in parts:
        try:
            stride = operator.stride
        except ValueError as error:
            raise ValueError(f"{_where(node)}, {place}: {error}") from None
        if stride != 1 and place != "block":
            raise ValueError(
                f"{_where(node)}, {place}: {operator} changes the level; use resample: conv"
            )


def _check_edges(node: Node | Step, operators: Mapping[str, Collection[str]]) -> None:
    for edge in node.inputs:
        for part, operator in (("project", edge.project), ("block", edge.block)):
            place = f"{_where(node)}, input {edge.source!r}, {part}"
            _check_operator(place, operator, operators["block"])


def _check_operators(
    node: Node, defined: Mapping[str, int], operators: Mapping[str, Collection[str]]
) -> None:
    where = f"node {node.name!r}"
    _check_operator(f"{where}, block", node.block, operators["block"])
    _check_operator(f"{where}, fuse", node.fuse, operators["fuse"])
    _check_edges(node, operators)
    for edge in node.inputs:
        place = f"{where}, input {edge.source!r}"
        gap = defined[edge.source] - node.input_level
        if gap == 0 and edge.resample is not None:
            raise ValueError(
                f"{place}, resample: {edge.resample}, but both are at level {node.input_level}"
            )
        _check_operator(f"{place}, resample", edge.resample, operators["up" if gap > 0 else "down"])


def _check_operator(where: str, value: Operator | None, choices: Collection[str]) -> None:
    if value is not None and value.name not in choices:
        raise unknown_name(where, value.name, choices, advice=HOW_TO_ADD)


def _check_prefixes(names: Iterable[str]) -> None:
    """A node `a` and a node `a.b` would be the same submodule."""
    known = set(names)
    for name in known:
        parts = name.split(".")
        for count in range(1, len(parts)):
            if ".".join(parts[:count]) in known:
                raise ValueError(
                    f"node {name!r}: {'.'.join(parts[:count])!r} is a node too; rename one of them"
                )
