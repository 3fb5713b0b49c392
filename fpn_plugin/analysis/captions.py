"""What a drawn graph says: the kind of each box, the lines in it, and the labels on its arrows."""

from __future__ import annotations

from collections import Counter
from typing import Mapping

from fpn_plugin.analysis.fusion_weights import FusionWeights
from fpn_plugin.analysis.layout import output_mark
from fpn_plugin.pyramid.graph import Operator
from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.pyramid.resolve import ResolvedEdge

# fill and border of each kind of box
KINDS = {
    "bottom-up map": ("#e9ecf1", "#7b8794"),
    "lateral or block": ("#d6e6fa", "#3d7cc9"),
    "fusion": ("#fde7c8", "#d98a1f"),
    "output node": ("#d3efda", "#2f9e57"),
    "extra level": ("#e7dcf7", "#8257c7"),
}


Learned = Mapping[tuple[str, int], float]  # by target and number of the input
_THIN, _THICK = 0.5, 3.0  # lines of a weight of 0, and of the largest


def kind_of(pyramid: GraphExecutor, name: str) -> str:
    """The kind of a box: a key of KINDS, or "" for the mark of an output."""
    graph = pyramid.graph
    if name in graph.inputs:
        return "bottom-up map"
    step = next((step for step in pyramid.steps if step.node.name == name), None)
    if step is None:
        return ""
    if step.node.level > max(graph.inputs.values()) and step.fuse is None:
        if graph.level(step.edges[0].source) < step.node.level:
            return "extra level"
    if name in graph.outputs:
        return "output node"
    return "fusion" if step.fuse else "lateral or block"


def _short(operator: Operator) -> str:
    """An operator in a few letters: its stride is the only argument that is shown."""
    return f"{operator.name} /{operator.stride}" if operator.stride > 1 else operator.name


def box_texts(pyramid: GraphExecutor) -> dict[str, list[str]]:
    """The lines in each box: its name, then its channels (bottom-up maps) or operators (nodes)."""
    texts = {}
    bottom_up = getattr(pyramid, "bottom_up", None)
    shapes = bottom_up.output_shape() if bottom_up is not None else {}
    for name in pyramid.graph.inputs:
        texts[name] = [name, f"{shapes[name].channels} ch"] if name in shapes else [name]
    for step in pyramid.steps:
        parts = (step.fuse, step.block)
        texts[step.node.name] = [step.node.name, *(_short(part.operator) for part in parts if part)]
    for output, node in pyramid.graph.output_names().items():
        texts[output_mark(node)] = [output]
    return texts


def usual_resamplers(pyramid: GraphExecutor) -> dict[str, str]:
    """The most frequent resampler of each direction; the legend names it, its arrows do not."""
    resamplers = [edge.resample for step in pyramid.steps for edge in step.edges if edge.resample]
    counts = Counter((part.kind, _short(part.operator)) for part in resamplers)
    return {kind: name for (kind, name), _ in reversed(counts.most_common())}


def edge_label(edge: ResolvedEdge, usual: Mapping[str, str], weight: float | None = None) -> str:
    """What happens on an edge besides the usual resampling, and its learned weight."""
    names = [(part, _short(part.operator)) for part in edge.parts()]
    texts = [name for part, name in names if part is not edge.resample or name != usual[part.kind]]
    if weight is not None:
        texts.append(f"{weight:.2f}")
    return " · ".join(texts)


def learned_weights(weights: Mapping[str, FusionWeights]) -> Learned:
    """One number per input of each fusion that has learned such: the mean over the channels."""
    learned = {}
    for name, item in weights.items():
        if item.weights is not None:
            for i, weight in enumerate(item.weights.reshape(len(item.inputs), -1).mean(dim=1)):
                learned[name, i] = float(weight)
    return learned


def line_widths(learned: Learned) -> dict[tuple[str, int], float]:
    """In points, in proportion to a weight's size."""
    largest = max((abs(weight) for weight in learned.values()), default=0.0) or 1.0
    return {
        key: _THIN + (_THICK - _THIN) * abs(weight) / largest for key, weight in learned.items()
    }
