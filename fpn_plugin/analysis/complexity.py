"""Parameters and multiply-accumulates of a backbone, node by node.

fvcore counts, and it counts one multiplication with its addition as one operation ("GFLOPs" in the
papers of Detectron2 and RegNet). Convolutions, matrix products, normalisations and interpolations
are counted; additions, activations and poolings are not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Sequence

import torch
from detectron2.modeling import Backbone
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from torch import Tensor, nn

from fpn_plugin.modeling.backbone import PyramidBackbone

# parts of the names of operators that are worth a warning where fvcore cannot count them
_HEAVY = ("conv", "mm", "matmul", "einsum", "linear", "attention", "PythonOp")


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


@dataclass(frozen=True)
class Complexity:
    """What a backbone costs for one image.

    Attributes:
        size: of the image with its padding, height and width in pixels.
        nodes: of the pyramid, in the order in which they run.
        bottom_up: the network underneath.
        shapes: `(C, H, W)` of each map that the pyramid gives, from high to low resolution.
        uncounted: operators that may be costly and that fvcore cannot count, with how often each
            runs.
    """

    size: tuple[int, int]
    nodes: Mapping[str, Cost]
    bottom_up: Cost
    shapes: Mapping[str, tuple[int, int, int]]
    uncounted: Mapping[str, int]

    @property
    def pyramid(self) -> Cost:
        """All nodes together."""
        costs = self.nodes.values()
        return Cost(sum(cost.parameters for cost in costs), sum(cost.flops for cost in costs))


def count_parameters(module: nn.Module, paths: Iterable[str] = ("",)) -> int:
    """Of a module, or of those of its submodules that `paths` names; a shared one counts once."""
    found = {
        id(weight): weight for path in paths for weight in module.get_submodule(path).parameters()
    }
    return sum(weight.numel() for weight in found.values())


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
    """What any backbone costs for one image: "backbone", "bottom_up", and the rest as "neck".

    Args:
        below: the name of the submodule that is the network underneath.
        size: height and width of the image in pixels, before padding.

    Raises:
        ValueError: if `size` is not two positive whole numbers.
    """
    model, image = _model_and_image(backbone, below, size)
    flops = _quiet(FlopCountAnalysis(model, image)).by_module()
    activations = _quiet(ActivationCountAnalysis(model, image)).by_module()
    whole, lower = (
        Totals(count_parameters(model, [path]), flops[path], activations[path])
        for path in ("", below)
    )
    return {"backbone": whole, "bottom_up": lower, "neck": whole - lower}


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
    """What the backbone costs for one image.

    A copy of it runs on the CPU, in evaluation mode.

    Args:
        size: height and width of the image in pixels, before padding.

    Raises:
        ValueError: if `size` is not two positive whole numbers.
    """
    model, image = _model_and_image(backbone, "bottom_up", size)
    height, width = image.shape[2], image.shape[3]
    analysis = _quiet(FlopCountAnalysis(model, image))
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
    shapes = {name: (x.shape[1], x.shape[2], x.shape[3]) for name, x in maps.items()}
    heavy = {
        name: n
        for name, n in analysis.unsupported_ops().items()
        if any(word in name for word in _HEAVY)
    }
    return Complexity((height, width), nodes, bottom_up, shapes, heavy)


def pyramid_flops(backbone: PyramidBackbone, size: Sequence[int] = (800, 1344)) -> dict[str, float]:
    """Multiply-accumulates of each node for one image of `size` (height, width in pixels).

    Raises:
        ValueError: if `size` is not two positive whole numbers.
    """
    return {name: cost.flops for name, cost in measure(backbone, size).nodes.items()}


def _image_channels(network: nn.Module) -> int:
    """Of the first convolution of the network underneath."""
    convs = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    return next((conv.in_channels for conv in convs), 3)
