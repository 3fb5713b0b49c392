"""The executor: a `Graph` as a `torch.nn.Module`. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import typing
from typing import Any, Callable, Dict, Mapping

import torch
from torch import Tensor, fx, nn

from fpn_plugin.pyramid import merge, recompute
from fpn_plugin.pyramid.graph import Graph
from fpn_plugin.pyramid.parts import REGISTRIES, build_part
from fpn_plugin.pyramid.resolve import Defaults, Part, ResolvedNode, resolve

_RESAMPLERS = ("up", "down")


class GraphExecutor(nn.Module):
    """Builds the parts of a graph as submodules and runs them.

    Every node's block is the submodule of the node's name; its fusion is `<node>_fuse`, and what
    input number i passes on its way is `<node>_edge<i>.project`, `.resample` and `.block`. These
    names are the checkpoint's keys. Parts without parameters have no key, and modules are
    registered from high to low resolution, in Detectron2's order.

    Args:
        graph: the nodes.
        in_channels: of the graph's inputs, by name.
        defaults: the width, and what a node gets that does not say otherwise.
        own: other defaults, of the same width, for single nodes, by the node's name.

    Raises:
        ValueError: (KeyError for an unknown operator) naming the node, the value and what is valid.
    """

    # submodules that TorchScript cannot compile by themselves: see __prepare_scriptable__
    _unrolled: tuple[type, ...] = ()
    # whether training makes fused maps again instead of keeping them (MODEL.FPN.RECOMPUTE)
    recompute = False
    # whether the 1x1 convolutions of one map run as one (MODEL.FPN.MERGE_PROJECTIONS)
    merge_projections = False

    def __init__(
        self,
        graph: Graph,
        in_channels: Mapping[str, int],
        defaults: Defaults,
        own: Mapping[str, Defaults] | None = None,
    ) -> None:
        super().__init__()
        graph.check({kind: registry.names() for kind, registry in REGISTRIES.items()})
        self.graph = graph
        self.defaults = defaults
        self._compiled: Callable[[Dict[str, Tensor]], Dict[str, Tensor]] | None = None
        self.steps: tuple[ResolvedNode, ...] = resolve(graph, in_channels, defaults, own)
        self.output_channels = {name: defaults.channels for name in graph.output_names()}
        for step in sorted(self.steps, key=lambda step: step.node.level):
            for part in step.parts():
                style = (own or {}).get(step.node.name, defaults)
                self._register(part.path, build_part(part, style))
        # the levels whose size must be known, because a map is resampled to them
        self._sized = {
            step.node.input_level for step in self.steps for edge in step.edges if edge.resample
        }
        # which input a guided resampler is shown, by the resampler's path
        self._guides = {
            edge.resample.path: _find_guide(step, edge.resample)
            for step in self.steps
            for edge in step.edges
            if edge.resample and getattr(self.get_submodule(edge.resample.path), "guided", False)
        }
        # the resamplers whose work a fusion does in the same pass over memory
        self._deferred = {path for step in self.steps for path in self._defer(step)}
        # the convolutions of one map that can run as one, by the path of each
        self.mergeable = merge.find_groups(self, self.steps)

    def _register(self, path: str, module: nn.Module) -> None:
        *containers, name = path.split(".")
        parent: nn.Module = self
        for container in containers:
            if container not in parent._modules:
                parent.add_module(container, nn.Module())
            parent = parent.get_submodule(container)
        if hasattr(parent, name):
            raise ValueError(
                f"node {path!r}: the name is taken by an attribute of the module; choose another"
            )
        parent.add_module(name, module)

    def _defer(self, step: ResolvedNode) -> list[str]:
        """The resamplers of a node that its fusion replaces; the fusion is told which they are."""
        fusion = self.get_submodule(step.fuse.path) if step.fuse else None
        if not getattr(fusion, "takes_coarse", False):
            return []
        last = [edge.resample if edge.block is None else None for edge in step.edges]
        coarse = [
            part is not None and getattr(self.get_submodule(part.path), "repeats", False)
            for part in last
        ]
        setattr(fusion, "coarse", coarse)
        return [part.path for part, repeated in zip(last, coarse) if part and repeated]

    def compile_graph(self, **options: Any) -> None:
        """Let `torch.compile` have the graph, and not what gives it its inputs.

        Args:
            options: of `torch.compile`.
        """
        self._compiled = torch.compile(self._run_eagerly, **options)

    def __getstate__(self) -> dict[str, Any]:
        # a copy is not compiled: what is compiled is tied to this module's parameters
        return {**super().__getstate__(), "_compiled": None}

    def _run(self, features: Dict[str, Tensor]) -> Dict[str, Tensor]:
        return (self._compiled or self._run_eagerly)(features)

    def _run_eagerly(self, features: Dict[str, Tensor]) -> Dict[str, Tensor]:
        maps = {name: features[name] for name in self.graph.inputs}
        del features  # so that each map is freed after its last reader
        sizes: dict[int, list[int]] = {}
        ahead: dict[str, Tensor] = {}  # what convolutions that ran with another one gave, by path
        for name, level in self.graph.inputs.items():
            self._note_size(sizes, level, maps[name])
        for step in self.steps:
            maps[step.node.name] = self._run_node(step, maps, sizes, ahead)
            self._note_size(sizes, step.node.level, maps[step.node.name])
            for name in step.drop:
                del maps[name]
        return {name: maps[source] for name, source in self.graph.output_names().items()}

    def _note_size(self, sizes: dict[int, list[int]], level: int, x: Tensor) -> None:
        """The first map of a level says what size the others of that level are brought to."""
        if level in self._sized and level not in sizes:
            sizes[level] = [x.shape[2], x.shape[3]]

    def _run_node(
        self,
        step: ResolvedNode,
        maps: Dict[str, Tensor],
        sizes: dict[int, list[int]],
        ahead: dict[str, Tensor],
    ) -> Tensor:
        arrived: dict[int, Tensor] = {}
        size = sizes.get(step.node.input_level)
        for i in self._edge_order(step):
            x = maps[step.edges[i].source]
            for part in step.edges[i].parts():
                if part.path in self._deferred and size is not None:
                    continue
                arguments = [size] if part.kind in _RESAMPLERS else []
                guides = [arrived[self._guides[part.path]]] if part.path in self._guides else []
                x = self._call(part, ahead, x, *arguments, *guides)
            arrived[i] = x
        inputs = [arrived[i] for i in range(len(arrived))]
        if step.fuse is None:
            return self._call(step.block, ahead, inputs[0]) if step.block else inputs[0]
        return self._fuse_and_run(step, step.fuse, inputs, size)

    def _call(self, part: Part, ahead: dict[str, Tensor], x: Tensor, *arguments: Any) -> Tensor:
        """Run a part, and with it the others that can run as one with it, which then wait."""
        if self.merge_projections and part.path in self.mergeable and part.path not in ahead:
            paths = self.mergeable[part.path]
            convs = [self.get_submodule(path) for path in paths]
            if merge.usable(convs, x):
                ahead.update(zip(paths, merge.run(convs, x)))
        if part.path in ahead:
            return ahead.pop(part.path)
        return self.get_submodule(part.path)(x, *arguments)

    def _fuse_and_run(
        self, step: ResolvedNode, fuse: Part, inputs: list[Tensor], size: list[int] | None
    ) -> Tensor:
        block = self.get_submodule(step.block.path) if step.block else None
        fusion = self.get_submodule(fuse.path)
        arguments = (inputs, size) if getattr(fusion, "takes_coarse", False) else (inputs,)
        if self.recompute and block is not None and recompute.wanted(fusion):
            return recompute.fuse_and_run(lambda: fusion(*arguments), block)
        x = fusion(*arguments)
        return x if block is None else block(x)

    def _edge_order(self, step: ResolvedNode) -> list[int]:
        """The order in which a node's inputs run: those that wait for a guide after the others."""
        paths = [edge.resample.path if edge.resample else "" for edge in step.edges]
        guided = [i for i, path in enumerate(paths) if path in self._guides]
        return [i for i in range(len(paths)) if i not in guided] + guided

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles in this module's place: the same submodules, called in
        straight-line code.

        TorchScript cannot look up a submodule by a name that it computes, so the loop over the
        graph is unrolled by torch.fx, in which the submodules are leaves.
        """
        graph = _Unroller(self._unrolled).trace(self)
        types = typing.get_type_hints(type(self).forward)
        for item in graph.nodes:  # the tracer has taken over the annotations as strings
            if item.op in ("placeholder", "output"):
                item.type = types["return" if item.op == "output" else item.target]
        return fx.GraphModule(self, graph, type(self).__name__)


class Pyramid(GraphExecutor):
    """Runs a pyramid graph: a dict of bottom-up maps in, a dict of pyramid maps out.

    Arguments, checkpoint keys and errors are those of `GraphExecutor`.

    Example:
        >>> from fpn_plugin.pyramid.topologies import fpn, Style
        >>> graph = fpn({"res2": 2, "res3": 3}, Style())
        >>> pyramid = Pyramid(graph, {"res2": 16, "res3": 32}, Defaults(channels=8))
        >>> maps = {"res2": torch.rand(1, 16, 10, 14), "res3": torch.rand(1, 32, 5, 7)}
        >>> {name: tuple(x.shape) for name, x in pyramid(maps).items()}
        {'p2': (1, 8, 10, 14), 'p3': (1, 8, 5, 7)}
    """

    def forward(self, features: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Run the graph.

        Args:
            features: the graph's inputs by name, and possibly more. Not changed.

        Returns:
            `{"p2": (N, C, H/4, W/4), ...}` from high to low resolution.
        """
        return self._run(features)


class _Unroller(fx.Tracer):
    """Writes a module's forward as straight-line code of calls to its submodules.

    Args:
        unrolled: submodules of these types are written out too. Nothing in their forward may depend
            on a condition on tensors except an assertion, which is taken to hold.
    """

    def __init__(self, unrolled: tuple[type, ...]) -> None:
        super().__init__()
        self.unrolled = unrolled

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, self.unrolled)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return True


def _find_guide(step: ResolvedNode, part: Part) -> int:
    """Which of its node's inputs a guided resampler is shown: the first that is not resampled.

    Raises:
        ValueError: naming the node, if there is none, or it has other channels.
    """
    where = f"{part.where}: {part.operator} is guided by an input of the node's own level"
    for i, edge in enumerate(step.edges):
        if edge.resample is None and step.fuse is not None:
            if step.fuse.widths[i] != part.in_channels:
                raise ValueError(
                    f"{where}, but {edge.source!r} has {step.fuse.widths[i]} channels and the"
                    f" resampled map {part.in_channels}; project both"
                )
            return i
    raise ValueError(
        f"{where}, {step.node.input_level}, but the node has none; add one, or resample otherwise"
    )
