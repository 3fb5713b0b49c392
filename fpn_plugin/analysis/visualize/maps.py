"""The maps inside a pyramid while it runs, each as its strength: the root mean square over the
channels. Shapes are `(N, C, H, W)` for maps and `(N, H, W)` for strengths.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor, nn

from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.pyramid.resolve import ResolvedNode


@dataclass
class Recorded:
    """Strengths by name; they are there once the backbone has run.

    Attributes:
        levels: of every name.
        inputs: of the bottom-up maps.
        before: of what a fusing node gets from its own level, as it reaches the fusion; by node.
        fused: of what its fusion gives, before the node's block; by node.
        nodes: of what each node gives.
        outputs: of the backbone's outputs, by their names, "p2" and so on.
    """

    levels: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    fused: dict[str, Tensor] = field(default_factory=dict)
    nodes: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def strength(x: Tensor) -> Tensor:
    """The root mean square over the channels: `(N, C, H, W)` -> `(N, H, W)`, on the CPU."""
    return x.detach().float().square().mean(dim=1).sqrt().cpu()


@contextlib.contextmanager
def recorded_maps(backbone: nn.Module) -> Iterator[Recorded]:
    """Inside, a backbone notes its maps, the latest run's.

    A pyramid of this plugin tells of each node; any other backbone of its outputs, and of those of
    its `bottom_up` network if it has one. What is compiled runs uncompiled, so that nothing is left
    out.
    """
    recorded = Recorded()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if isinstance(backbone, GraphExecutor):
            _watch_graph(backbone, recorded, stack)
        _watch_ends(backbone, recorded, stack)
        yield recorded


def _watch_ends(backbone: Any, recorded: Recorded, stack: contextlib.ExitStack) -> None:
    """The bottom-up maps that are read, and the outputs."""
    outputs = backbone.output_shape()
    recorded.levels.update({name: _level(shape.stride) for name, shape in outputs.items()})
    graph = getattr(backbone, "graph", None)

    def note_outputs(module: nn.Module, args: Any, maps: Mapping[str, Tensor]) -> None:
        recorded.outputs = {name: strength(maps[name]) for name in outputs}

    stack.callback(backbone.register_forward_hook(note_outputs).remove)
    network = getattr(backbone, "bottom_up", None)
    if network is None:
        return
    shapes = network.output_shape()
    names = list(graph.inputs) if graph is not None else list(shapes)
    recorded.levels.update({name: _level(shapes[name].stride) for name in names})

    def note_inputs(module: nn.Module, args: Any, maps: Mapping[str, Tensor]) -> None:
        recorded.inputs = {name: strength(maps[name]) for name in names}

    stack.callback(network.register_forward_hook(note_inputs).remove)


def _level(stride: int) -> int:
    return stride.bit_length() - 1


def _watch_graph(executor: GraphExecutor, recorded: Recorded, stack: contextlib.ExitStack) -> None:
    recorded.levels.update(executor.graph.inputs)
    for step in executor.steps:
        recorded.levels[step.node.name] = step.node.level
        if step.fuse is not None:
            _watch_fusion(executor.get_submodule(step.fuse.path), step, recorded, stack)
        *_, last = [None, *step.parts()]
        if last is not None:
            hook = _noting(recorded.nodes, step.node.name)
            stack.callback(executor.get_submodule(last.path).register_forward_hook(hook).remove)


def _watch_fusion(
    fusion: nn.Module, step: ResolvedNode, recorded: Recorded, stack: contextlib.ExitStack
) -> None:
    name = step.node.name
    own = own_input(step)
    if own is not None:

        def note_before(module: nn.Module, args: tuple[Any, ...], place: int = own) -> None:
            recorded.before[name] = strength(args[0][place])

        stack.callback(fusion.register_forward_pre_hook(note_before).remove)
    stack.callback(fusion.register_forward_hook(_noting(recorded.fused, name)).remove)


def _noting(strengths: dict[str, Tensor], name: str) -> Any:
    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        strengths[name] = strength(output)

    return note


def own_input(step: ResolvedNode) -> int | None:
    """Which of a node's inputs comes from its own level: the first that is not resampled."""
    return next((i for i, edge in enumerate(step.edges) if edge.resample is None), None)
