"""A backbone as text: its settings, its resolved graph with the cost of each node, its totals."""

from __future__ import annotations

from typing import Mapping, Sequence

from fpn_plugin.analysis.complexity import Complexity, Cost
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.pyramid.graph import Operator
from fpn_plugin.pyramid.resolve import ModuleSpec, ResolvedEdge, ResolvedNode

HEADER = (
    "node",
    "level",
    "stride",
    "inputs",
    "fusion",
    "block",
    "channels",
    "map",
    "parameters",
    "GFLOPs",
)
_RIGHT = {"level", "stride", "channels", "parameters", "GFLOPs"}
_NOTE = (
    "GFLOPs: 10^9 multiply-accumulates for one image of {} x {} pixels, counted by fvcore\n"
    "(a multiplication with its addition is one; additions, activations, poolings are not counted)"
)


def operator_text(operator: Operator) -> str:
    """An operator with its arguments, texts among them in quotes."""
    args = ", ".join(f"{k}={v!r}" if isinstance(v, str) else f"{k}={v}" for k, v in operator.args)
    return f"{operator.name}({args})" if args else operator.name


def part_text(part: ModuleSpec) -> str:
    """How a map passes one part of an edge: `↑nearest×2`, `↓maxpool×4`, `→conv1x1`."""
    arrow = {"up": "↑", "down": "↓"}.get(part.kind, "→")
    factor = f"×{2 ** part.amount}" if part.kind in ("up", "down") else ""
    return f"{arrow}{operator_text(part.operator)}{factor}"


def edge_text(edge: ResolvedEdge) -> str:
    """An input and all that happens to it on its way to the node: `fpn_merge5 ↑nearest×2`."""
    return " ".join([edge.source, *(part_text(part) for part in edge.parts())])


def node_table(backbone: PyramidBackbone, complexity: Complexity) -> str:
    """One row per node, in the order in which they run, with one line per input."""
    maps = {node: name for name, node in backbone.graph.output_names().items()}
    rows: list[Sequence[str]] = [HEADER]
    for step in backbone.steps:
        first, *others = (edge_text(edge) for edge in step.edges)
        cost = complexity.nodes[step.node.name]
        rows.append(
            _row(step, first, backbone.defaults.channels, maps.get(step.node.name, ""), cost)
        )
        rows.extend(("", "", "", text, *[""] * 6) for text in others)
    return aligned(rows)


def _row(
    step: ResolvedNode, first_input: str, channels: int, output: str, cost: Cost
) -> tuple[str, ...]:
    return (
        step.node.name,
        str(step.node.level),
        str(2**step.node.level),
        first_input,
        operator_text(step.fuse.operator) if step.fuse else "-",
        operator_text(step.block.operator) if step.block else "-",
        str(channels),
        output or "-",
        f"{cost.parameters:,}" if cost.parameters else "-",
        f"{cost.flops / 1e9:.3f}" if cost.flops else "-",
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines with columns of one width; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [name in _RIGHT for name in rows[0]]
    lines = []
    for row in rows:
        cells = (x.rjust(w) if r else x.ljust(w) for x, w, r in zip(row, widths, right))
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def settings_text(backbone: PyramidBackbone, names: Mapping[str, str]) -> str:
    """The settings that a backbone was resolved with, one a line.

    Args:
        names: what the backbone does not know of itself ("topology": "fpn", ...): they come first.
    """
    shapes, defaults = backbone.bottom_up.output_shape(), backbone.defaults
    maps = [
        f"{name} ({shapes[name].channels} ch, stride {shapes[name].stride})"
        for name in backbone.graph.inputs
    ]
    settings = {
        **names,
        "in features": ", ".join(maps),
        "channels": str(defaults.channels),
        "norm": defaults.norm or "none",
        "activation": defaults.activation or "none",
        "fuse": operator_text(defaults.fuse),
        "upsample": operator_text(defaults.upsample),
        "downsample": operator_text(defaults.downsample),
        "size divisibility": f"{backbone.size_divisibility} pixels",
    }
    width = max(map(len, settings))
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in settings.items())


def totals_text(complexity: Complexity, readers: Mapping[str, Sequence[str]]) -> str:
    """What it costs in all, the maps that it gives, and who reads them.

    Args:
        readers: the maps that each config key of the heads names.
    """
    pyramid, below = complexity.pyramid, complexity.bottom_up
    both = Cost(pyramid.parameters + below.parameters, pyramid.flops + below.flops)
    lines = [
        f"{name.ljust(9)}  {cost.parameters:>12,} parameters  {cost.flops / 1e9:>9.3f} GFLOPs"
        for name, cost in (("pyramid", pyramid), ("bottom-up", below), ("backbone", both))
    ]
    lines.append(_NOTE.format(*complexity.size))
    lines += [
        f"fvcore cannot count {name}, which runs {n} times"
        for name, n in complexity.uncounted.items()
    ]
    lines += ["", "maps (C x H x W) and the keys that read them"]
    for name, shape in complexity.shapes.items():
        keys = [key for key, features in readers.items() if name in features]
        size = " x ".join(map(str, shape))
        lines.append(f"{name.ljust(4)}  {size.ljust(18)}  {', '.join(keys) or 'nothing reads it'}")
    return "\n".join(lines)
