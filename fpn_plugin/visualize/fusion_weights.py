"""What a pyramid's fusions have learned: the weight of every input of every node."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fpn_plugin.checkpoint.load import load_weights
from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.visualize.complexity import aligned, operator_text

KEY = "--weights"
HEADER = ("node", "fusion", "input", "weight")


@dataclass(frozen=True)
class FusionWeights:
    """One node's fusion.

    Attributes:
        fusion: the operator with its arguments, as text.
        inputs: the names of the maps, in the node's order.
        weights: what the maps are multiplied by, `(n,)` or `(n, C)`; None if that is not one set of
            numbers.
        note: why there are no weights, or "".
    """

    fusion: str
    inputs: tuple[str, ...]
    weights: Tensor | None
    note: str

    def means(self) -> list[float]:
        """One weight per input, the mean over the channels; empty if there are no weights."""
        if self.weights is None:
            return []
        return self.weights.reshape(len(self.inputs), -1).mean(dim=1).tolist()


def load_backbone(executor: GraphExecutor, path: str) -> None:
    """Load a checkpoint's backbone (keys with `backbone.` before them, or without).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if nothing in it matches, a tensor has another shape, or a fusion's tensors are
            missing.
    """
    missing = load_weights(executor, path, key=KEY, prefix="backbone.")
    fusions = tuple(f"{step.fuse.path}." for step in executor.steps if step.fuse)
    absent = [name for name in missing if name.startswith(fusions)]
    if absent:
        raise ValueError(
            f"{KEY}: {path} was made with other fusions: it has no {', '.join(absent[:4])}"
            f"{', ...' if len(absent) > 4 else ''}; give the config that it was trained with"
        )


@torch.no_grad()
def fusion_weights(executor: GraphExecutor) -> dict[str, FusionWeights]:
    """The fusion of each node that has one, by the node's name, in the order in which they run."""
    fusions = {}
    for step in executor.steps:
        if step.fuse is None:
            continue
        module = executor.get_submodule(step.fuse.path)
        normalized = getattr(module, "normalized_weights", None)
        if normalized is not None:
            weights, note = normalized().detach().float().cpu(), ""
        elif getattr(module, "input_dependent", False):
            weights, note = None, "depends on the input"
        elif next(module.parameters(), None) is not None:
            weights, note = None, "a convolution of all inputs"
        else:
            weights, note = None, "nothing is learned"
        inputs = tuple(edge.source for edge in step.edges)
        text = operator_text(step.fuse.operator)
        fusions[step.node.name] = FusionWeights(text, inputs, weights, note)
    return fusions


def fusion_table(executor: GraphExecutor) -> str:
    """One line per input of each node: its weight, or the mean ± standard deviation over the
    channels."""
    rows = [HEADER]
    for node, fusion in fusion_weights(executor).items():
        for i, name in enumerate(fusion.inputs):
            text = fusion.note if fusion.weights is None else _weight_text(fusion.weights[i])
            rows.append((node if i == 0 else "", fusion.fusion if i == 0 else "", name, text))
    return aligned(rows) if len(rows) > 1 else "no node of the pyramid fuses maps"


def _weight_text(weight: Tensor) -> str:
    if weight.dim() == 0:
        return f"{weight.item():.4f}"
    return f"{weight.mean().item():.4f} ± {weight.std(correction=0).item():.4f}"
