"""Parameters and multiply-accumulates of a backbone, node by node, and the table that shows them.

fvcore counts, and it counts one multiplication with its addition as one operation ("GFLOPs" in the
papers of Detectron2 and RegNet). Convolutions, matrix products, normalisations and interpolations
are counted; additions, activations and poolings are not.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn

from fpn_plugin.config.settings import extra_levels_for
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.pyramid.graph import Operator
from fpn_plugin.pyramid.resolve import ResolvedEdge

# parts of the names of operators that are worth a warning where fvcore cannot count them
_HEAVY = ("conv", "mm", "matmul", "einsum", "linear", "attention", "PythonOp")
HEADER = (
    *("node", "level", "stride", "inputs", "fusion", "block"),
    *("channels", "map", "parameters", "GFLOPs"),
)
_RIGHT = {"level", "stride", "channels", "parameters", "GFLOPs"}
_NOTE = (
    "GFLOPs: 10^9 multiply-accumulates for one image of {} x {} pixels, counted by fvcore\n"
    "(a multiplication with its addition is one; additions, activations, poolings are not counted)"
)


@dataclass(frozen=True)
class Cost:
    """What one part of a network costs.

    Attributes:
        parameters: the number of trained and frozen weights; statistics of norms are not among
            them.
        flops: multiply-accumulates for one image.
    """

    parameters: int
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.flops + other.flops)


@dataclass(frozen=True)
class Complexity:
    """What a backbone costs for one image.

    Attributes:
        size: of the image with its padding, height and width in pixels.
        nodes: of the pyramid, in the order in which they run; of a recursive one in all its runs.
        bottom_up: the network underneath.
        recursion: what else a recursive pyramid has: further networks, and what is fed back.
        shapes: `(C, H, W)` of each map that the pyramid gives, from high to low resolution.
        uncounted: operators that may be costly and that fvcore cannot count, with how often each
            runs.
    """

    size: tuple[int, int]
    nodes: Mapping[str, Cost]
    bottom_up: Cost
    shapes: Mapping[str, tuple[int, int, int]]
    uncounted: Mapping[str, int]
    recursion: Cost = Cost(0, 0)

    @property
    def pyramid(self) -> Cost:
        """All nodes together."""
        return sum(self.nodes.values(), Cost(0, 0))


def count_parameters(module: nn.Module, paths: Iterable[str] = ("",)) -> int:
    """Count the parameters of submodules, by default of the whole; shared ones count once."""
    submodules = map(module.get_submodule, paths)
    parameters = {parameter for submodule in submodules for parameter in submodule.parameters()}
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True)
class Totals:
    """What a backbone, or a part of one, costs for one image.

    Attributes:
        parameters: as in :class:`Cost`.
        flops: as in :class:`Cost`.
        activations: the number of values that convolutions and matrix products give.
    """

    parameters: int
    flops: float
    activations: int

    def __sub__(self, other: Totals) -> Totals:
        return Totals(
            self.parameters - other.parameters,
            self.flops - other.flops,
            self.activations - other.activations,
        )


def totals(backbone: Backbone, below: str, size: Sequence[int] = (800, 1344)) -> dict[str, Totals]:
    """Count what any backbone costs for one image: "backbone", "bottom_up", and the rest as "neck".

    Args:
        below: the name of the submodule that is the network underneath.
        size: height and width of the image in pixels, before padding.

    Raises:
        ValueError: if `size` is not two positive whole numbers.
    """
    model, image = _model_and_image(backbone, below, size)
    flops = _flop_count(model, image).by_module()
    activations = _quiet(ActivationCountAnalysis(model, image)).by_module()
    whole, lower = (
        Totals(count_parameters(model, [path]), flops[path], activations[path])
        for path in ("", below)
    )
    return {"backbone": whole, "bottom_up": lower, "neck": whole - lower}


def _flop_count(model: nn.Module, image: Tensor) -> FlopCountAnalysis:
    analysis = FlopCountAnalysis(model, image)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _count_attention)
    return _quiet(analysis)


def _count_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> float:
    """`softmax(q kᵀ) v`: two matrix products."""
    query, key, value = (get_shape(x) for x in inputs[:3])  # (…, L, E), (…, S, E), (…, S, E')
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _quiet(analysis: Any) -> Any:
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.tracer_warnings("none")


def _model_and_image(backbone: Backbone, below: str, size: Sequence[int]) -> tuple[Any, Tensor]:
    """A copy on the CPU in evaluation mode, and an image of zeros of the padded size."""
    height, width = padded_size(backbone, size)
    # a copy: counting must not change the mode, the device or the hooks of a model in use
    model = copy.deepcopy(backbone).cpu().eval()
    network = model.get_submodule(below)
    dtype = next(network.parameters()).dtype
    return model, torch.zeros(1, _image_channels(network), height, width, dtype=dtype)


def padded_size(backbone: Backbone, size: Sequence[int]) -> tuple[int, int]:
    """The height and width that Detectron2 pads an image of `size` to, in pixels.

    Raises:
        ValueError: if `size` is not two positive whole numbers.
    """
    if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(
            f"size: {tuple(size)!r} is not a height and a width in pixels, such as (800, 1344)"
        )
    step = max(backbone.size_divisibility, 1)
    return -(-size[0] // step) * step, -(-size[1] // step) * step


def measure(backbone: PyramidBackbone, size: Sequence[int] = (800, 1344)) -> Complexity:
    """Count what the backbone costs for one image.

    A copy of it runs on the CPU, in evaluation mode.

    Args:
        size: height and width of the image in pixels, before padding.

    Raises:
        ValueError: if `size` is not two positive whole numbers.
    """
    model, image = _model_and_image(backbone, "bottom_up", size)
    height, width = image.shape[2], image.shape[3]
    analysis = _flop_count(model, image)
    with torch.no_grad():
        flops = analysis.by_module()
        maps = model(image)
    nodes = {}
    for step in backbone.steps:
        paths = [part.path for part in step.parts()]
        nodes[step.node.name] = Cost(
            count_parameters(backbone, paths), sum(flops[path] for path in paths)
        )
    bottom_up = Cost(count_parameters(backbone, ["bottom_up"]), flops["bottom_up"])
    recursion = Cost(0, 0)
    if backbone.rfp is not None:
        parts = [f"networks.{i}" for i in range(len(backbone.rfp.networks))]
        counts = (flops[f"rfp.{part}"] for part in (*parts, "aspp", "gate"))
        recursion = Cost(count_parameters(backbone.rfp), sum(counts))
    shapes = {name: (x.shape[1], x.shape[2], x.shape[3]) for name, x in maps.items()}
    uncounted = {
        name: count
        for name, count in analysis.unsupported_ops().items()
        if any(word in name for word in _HEAVY)
    }
    return Complexity((height, width), nodes, bottom_up, shapes, uncounted, recursion)


def _image_channels(network: nn.Module) -> int:
    """The input channels of the first convolution of the network underneath."""
    convs = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    return next((conv.in_channels for conv in convs), 3)


def operator_text(operator: Operator) -> str:
    """An operator with its arguments, texts among them in quotes."""
    args = ", ".join(f"{k}={v!r}" if isinstance(v, str) else f"{k}={v}" for k, v in operator.args)
    return f"{operator.name}({args})" if args else operator.name


def edge_text(edge: ResolvedEdge) -> str:
    """An input and all that happens to it on its way to the node.

    For example `fpn_merge5 ↑nearest×2`, `res5 →conv1x1 ↓maxpool×4`.
    """
    texts = [edge.source]
    for part in edge.parts():
        arrow = {"up": "↑", "down": "↓"}.get(part.kind, "→")
        factor = f"×{2 ** part.amount}" if part.kind in ("up", "down") else ""
        texts.append(f"{arrow}{operator_text(part.operator)}{factor}")
    return " ".join(texts)


def node_table(backbone: PyramidBackbone, complexity: Complexity | None = None) -> str:
    """One row per node or step, in the order in which they run, with one line per input.

    Args:
        complexity: without it there are no GFLOPs.
    """
    maps = {node: name for name, node in backbone.graph.output_names().items()}
    rows: list[Sequence[str]] = [HEADER]
    columns = len(HEADER) if complexity else len(HEADER) - 1
    for step in backbone.steps:
        name, levels = step.node.name, sorted(step.node.maps().values())
        first, *others = (edge_text(edge) for edge in step.edges)
        operators = [
            operator_text(part.operator) if part else "-" for part in (step.fuse, step.block)
        ]
        parameters = count_parameters(backbone, [part.path for part in step.parts()])
        flops = complexity.nodes[name].flops if complexity else 0
        counts = [f"{parameters:,}" if parameters else "-", f"{flops / 1e9:.3f}" if flops else "-"]
        channels = str(backbone.defaults.channels)
        output = " ".join(maps[each] for each in step.node.maps() if each in maps) or "-"
        level, stride = _range(levels), _range([2**level for level in levels])
        rows.append([name, level, stride, first, *operators, channels, output, *counts])
        rows.extend(["", "", "", text, *[""] * 6] for text in others)
    return aligned([row[:columns] for row in rows])


def _range(numbers: Sequence[int]) -> str:
    """One number, or the first and the last of several."""
    return "…".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1])))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, with numbers to the right; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [name in _RIGHT for name in rows[0]]
    lines = []
    for row in rows:
        cells = (x.rjust(w) if r else x.ljust(w) for x, w, r in zip(row, widths, right))
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def pyramid_names(cfg: CfgNode) -> dict[str, str]:
    """What a config says of its pyramid that the backbone does not know of itself."""
    fpn = cfg.MODEL.FPN
    repeats = f" x {fpn.REPEATS}" if fpn.REPEATS > 1 else ""
    return {
        "topology": "MODEL.FPN.GRAPH (inline)" if fpn.GRAPH else f"{fpn.TOPOLOGY}{repeats}",
        "bottom-up": cfg.MODEL.BOTTOM_UP.NAME,
        "extra levels": extra_levels_for(cfg),
        **({"starts as": fpn.WARM_START_FROM.get("TOPOLOGY", "fpn")} if fpn.WARM_START else {}),
    }


def settings_text(backbone: PyramidBackbone, names: Mapping[str, str]) -> str:
    """The settings that a backbone was resolved with, one a line.

    Args:
        names: of :func:`pyramid_names`: they come first.
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
        **({"runs": str(backbone.settings.rfp_steps)} if backbone.rfp is not None else {}),
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
    """Describe what it costs in all, the maps that it gives, and who reads them.

    Args:
        readers: the maps that each config key of the heads names.
    """
    pyramid, below, again = complexity.pyramid, complexity.bottom_up, complexity.recursion
    rows = {"pyramid": pyramid, "bottom-up": below}
    rows |= {"recursion": again} if again.parameters else {}
    rows["backbone"] = pyramid + below + again
    lines = [
        f"{name.ljust(9)}  {cost.parameters:>12,} parameters  {cost.flops / 1e9:>9.3f} GFLOPs"
        for name, cost in rows.items()
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
