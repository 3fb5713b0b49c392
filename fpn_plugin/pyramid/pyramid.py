"""The executor: a `Graph` as a `torch.nn.Module`. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import re
import typing
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from fpn_plugin.pyramid.blocks import initialize_together
from fpn_plugin.pyramid.build import REGISTRIES, build_module
from fpn_plugin.pyramid.fused import is_traced
from fpn_plugin.pyramid.graph import Graph, Node
from fpn_plugin.pyramid.resolve import (
    Defaults,
    ModuleSpec,
    ResolvedEdge,
    ResolvedNode,
    resolve,
)

# the nodes whose parameters Detectron2's FPN has too
_DETECTRON2S = re.compile(r"top_block\..*|fpn_(lateral|merge|output)(?P<level>\d+)")


class GraphExecutor(nn.Module):
    """Builds the modules of a graph and runs them.

    The block of a node, or the operator of a step, is the submodule of its name; a node's fusion is
    `<node>_fuse`, and input number i passes `<node>_edge<i>.project`, `.resample` and `.block`.
    These names are the checkpoint's keys. Modules without parameters have no key, and modules are
    registered from high to low resolution, in Detectron2's order.

    Args:
        graph: the nodes.
        in_channels: of the graph's inputs, by name.
        defaults: the width, and what applies to nodes and edges that do not say otherwise.
        per_node: other defaults, of the same width, for single nodes, by the node's name.

    Raises:
        ValueError: (KeyError for an unknown operator) naming the node, the value and what is valid.
    """

    # submodules that TorchScript cannot compile by themselves: see __prepare_scriptable__
    _unrolled: tuple[type, ...] = ()
    # whether training computes nodes again in the backward pass (`recompute`)
    recompute = False

    def __init__(
        self,
        graph: Graph,
        in_channels: Mapping[str, int],
        defaults: Defaults,
        per_node: Mapping[str, Defaults] | None = None,
    ) -> None:
        super().__init__()
        graph.check({kind: registry.names() for kind, registry in REGISTRIES.items()})
        self.graph = graph
        self.defaults = defaults
        self._compiled: Callable[[Dict[str, Tensor]], Dict[str, Tensor]] | None = None
        self.steps: tuple[ResolvedNode, ...] = resolve(graph, in_channels, defaults, per_node)
        self.output_channels = {name: defaults.channels for name in graph.output_names()}
        for path, module in self._build_modules(per_node or {}):
            self._register(path, module)
        resamplers = [
            (step, edge.resample) for step in self.steps for edge in step.edges if edge.resample
        ]
        # the levels whose size must be known, because a map is resampled to them
        self._sized_levels = {
            step.node.input_level for step, _ in resamplers if isinstance(step.node, Node)
        }
        # which input of its node a guided resampler is shown, by the resampler's path
        self._guides = {
            spec.path: _find_guide(step, spec)
            for step, spec in resamplers
            if getattr(self._module(spec), "guided", False)
        }
        # the resamplers whose work the node's fusion does itself, by path
        self._deferred = {path for step in self.steps for path in self._defer_resamplers(step)}

    def _build_modules(self, per_node: Mapping[str, Defaults]) -> list[tuple[str, nn.Module]]:
        """The modules by path, from high to low resolution.

        Detectron2's FPN has the same weights as its counterpart under the same seed: random numbers
        are drawn in its order, first for the top block, then level by level.
        """
        ordered = sorted(self.steps, key=lambda step: min(step.node.maps().values()))
        modules: dict[str, list[tuple[str, nn.Module]]] = {}
        top_first = sorted(ordered, key=lambda step: not step.node.name.startswith("top_block."))
        for together, steps in groupby(top_first, key=_made_together):
            with initialize_together() if together else nullcontext():
                for step in steps:
                    settings = per_node.get(step.node.name, self.defaults)
                    modules[step.node.name] = [
                        (spec.path, build_module(spec, settings)) for spec in step.parts()
                    ]
        return [each for step in ordered for each in modules[step.node.name]]

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

    def _module(self, spec: ModuleSpec) -> nn.Module:
        return self.get_submodule(spec.path)

    def _defer_resamplers(self, step: ResolvedNode) -> list[str]:
        """Tell a fusion with `takes_coarse` which inputs it repeats itself, and return their
        resamplers' paths."""
        fusion = self._module(step.fuse) if step.fuse else None
        if fusion is None or not getattr(fusion, "takes_coarse", False):
            return []
        paths = [
            (
                edge.resample.path
                if edge.resample
                and edge.block is None  # which would read the repeated map
                and getattr(self._module(edge.resample), "repeats", False)
                else ""
            )
            for edge in step.edges
        ]
        setattr(fusion, "coarse", [bool(path) for path in paths])
        if getattr(fusion, "needs_coarse", False) and sum(map(bool, paths)) != 1:
            raise _not_coarse(step)
        return [path for path in paths if path]

    def compile_graph(self, **options: Any) -> None:
        """Run the graph, but not the network that computes its inputs, through `torch.compile`.

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
        sizes: dict[int, List[int]] = {}
        for name, level in self.graph.inputs.items():
            self._note_size(sizes, level, maps[name])
        for step in self.steps:
            if isinstance(step.node, Node):
                size = sizes.get(step.node.input_level)
                results = [self._combine(step, self._gather(step, maps, size), size)]
            else:
                results = self._run_step(step, self._gather(step, maps, None))
            for i, (name, level) in enumerate(step.node.maps().items()):
                maps[name] = results[i]
                self._note_size(sizes, level, results[i])
            for name in step.drop:
                del maps[name]
        return {name: maps[source] for name, source in self.graph.output_names().items()}

    def _note_size(self, sizes: dict[int, List[int]], level: int, x: Tensor) -> None:
        """The first map of a level sets the size that others are resampled to."""
        if level in self._sized_levels and level not in sizes:
            sizes[level] = [x.shape[2], x.shape[3]]

    def _gather(
        self, step: ResolvedNode, maps: Mapping[str, Tensor], size: Optional[List[int]]
    ) -> List[Tensor]:
        """Bring every input to the node's level, or to what a step takes.

        Args:
            size: of the maps of that level; None if there is none yet.
        """
        inputs: dict[int, Tensor] = {}
        # edges with a guided resampler run last: they are shown another input of the node
        for i in sorted(range(len(step.edges)), key=lambda i: self._is_guided(step.edges[i])):
            edge = step.edges[i]
            x = maps[edge.source]
            if edge.project:
                x = self._module(edge.project)(x)
            if edge.resample and not (edge.resample.path in self._deferred and size is not None):
                guide = self._guides.get(edge.resample.path)
                arguments = (x, size) if guide is None else (x, size, inputs[guide])
                x = self._module(edge.resample)(*arguments)
            if edge.block:
                x = self._module(edge.block)(x)
            inputs[i] = x
        return [inputs[i] for i in range(len(inputs))]

    def _is_guided(self, edge: ResolvedEdge) -> bool:
        return edge.resample is not None and edge.resample.path in self._guides

    def _combine(
        self, step: ResolvedNode, inputs: List[Tensor], size: Optional[List[int]]
    ) -> Tensor:
        """:meth:`_fuse`, in training with what `recompute` asks for.

        Where the fusion has no weights, autograd need not save its inputs, so nothing is gained.
        """
        fusion = step.fuse and self._module(step.fuse)
        if self._recomputes() and fusion and next(fusion.parameters(), None) is not None:
            return self._checkpoint(step, lambda maps: self._fuse(step, maps, size), inputs)
        return self._fuse(step, inputs, size)

    def _recomputes(self) -> bool:
        return self.recompute and torch.is_grad_enabled() and not is_traced()

    def _run_step(self, step: ResolvedNode, inputs: List[Tensor]) -> List[Tensor]:
        """The maps that a step gives, in training with what `recompute` asks for.

        Raises:
            ValueError: naming the step, if they are not as many as it takes.
        """
        assert step.block is not None  # a step's operator
        module = self._module(step.block)
        results = self._checkpoint(step, module, inputs) if self._recomputes() else module(inputs)
        if isinstance(results, (list, tuple)) and len(results) != len(inputs):
            raise ValueError(
                f"{step.block.where}: {step.block.operator} takes {len(inputs)} maps but gives"
                f" {len(results)}; it must give one per level"
            )
        return results

    def _fuse(self, step: ResolvedNode, inputs: List[Tensor], size: Optional[List[int]]) -> Tensor:
        """The node's fusion, if it has several inputs, and its block, if it has one."""
        x = inputs[0]
        if step.fuse is not None:
            fusion = self._module(step.fuse)
            takes_size = getattr(fusion, "takes_coarse", False)
            x = fusion(inputs, size) if takes_size else fusion(inputs)
        return x if step.block is None else self._module(step.block)(x)

    def _checkpoint(
        self, step: ResolvedNode, function: Callable[[List[Tensor]], Any], inputs: List[Tensor]
    ) -> Any:
        """A node's or step's function, of which autograd saves only the inputs and computes the
        rest again."""
        norms = [
            norm
            for spec in (step.fuse, step.block)
            if spec is not None
            for norm in self._module(spec).modules()
            if isinstance(norm, _NormBase) and norm.track_running_stats
        ]
        return checkpoint(
            lambda *maps: function(list(maps)),
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in a pyramid is random
            context_fn=lambda: (nullcontext(), _frozen_statistics(norms)),
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles in this module's place: the same submodules, called in
        straight-line code.

        TorchScript cannot look up a submodule by a computed name, so torch.fx unrolls the loop over
        the graph, with the submodules as leaves.
        """
        graph = _Unroller(self._unrolled).trace(self)
        types = typing.get_type_hints(type(self).forward)
        for node in graph.nodes:  # the tracer keeps the annotations as strings
            if node.op in ("placeholder", "output"):
                node.type = types["return" if node.op == "output" else node.target]
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


@contextmanager
def _frozen_statistics(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Keep batch norms from updating their running statistics twice with the same batch."""
    settings = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, settings):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _not_coarse(step: ResolvedNode) -> ValueError:
    """That a node's fusion upsamples one of its maps itself, but cannot."""
    assert step.fuse is not None and isinstance(step.node, Node)  # for mypy: the fusion asks
    level = step.node.input_level
    given = [
        f"{edge.source!r} comes "
        + (f"by {edge.resample.operator}" if edge.resample else f"from level {level}")
        + (f" and {edge.block.operator}" if edge.block else "")
        for edge in step.edges
    ]
    return ValueError(
        f"{step.fuse.where}: {step.fuse.operator} upsamples a map to level {level} itself."
        " That map must come from a higher level by the upsampler nearest, without a block after"
        f" it, and the other from level {level}; but {' and '.join(given)}"
    )


def _made_together(step: ResolvedNode) -> str:
    """What of Detectron2's FPN, whose weights are initialised together, a node belongs to: the top
    block or a level; "" for other nodes."""
    name = _DETECTRON2S.fullmatch(step.node.name)
    return (name["level"] or "top_block") if name else ""


class _Unroller(fx.Tracer):
    """Traces a module's forward into straight-line calls of its submodules.

    Args:
        unrolled: types of submodules that are traced into as well. Their forward must not branch on
            tensors except in assertions, which are assumed to hold.
    """

    def __init__(self, unrolled: tuple[type, ...]) -> None:
        super().__init__()
        self.unrolled = unrolled

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, self.unrolled)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return True


def _find_guide(step: ResolvedNode, spec: ModuleSpec) -> int:
    """The index of the node's input that guides a resampler: the first that is not resampled.

    Raises:
        ValueError: naming the node, if there is none, or it has other channels.
    """
    assert isinstance(step.node, Node)  # a step has no resamplers
    where = f"{spec.where}: {spec.operator} is guided by an input of the node's own level"
    for i, edge in enumerate(step.edges):
        if edge.resample is None and step.fuse is not None:
            if step.fuse.widths[i] != spec.in_channels:
                raise ValueError(
                    f"{where}, but {edge.source!r} has {step.fuse.widths[i]} channels and the"
                    f" resampled map {spec.in_channels}; project both"
                )
            return i
    raise ValueError(
        f"{where}, {step.node.input_level}, but the node has none; add one, or resample otherwise"
    )
