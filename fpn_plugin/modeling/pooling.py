"""ROIAlign on the CPU as one weighted gather.

Every output pixel is a weighted sum of pixels of one map: of rows of `C` numbers in channels-last
memory. torchvision's CPU kernel fetches them one number at a time on one core, and takes a quarter
to a third of a detector's time once its convolutions are fast. Here torch's `embedding_bag` gathers
them from a table of the pixels of all levels. The gradient is a gather as well: of the outputs'
gradients, in the order of the pixels.

Shapes: `N` images, `R` boxes, `C` channels, `p` output pixels a side.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GatherPooler(nn.Module):
    """A Detectron2 `ROIPooler` of `ROIAlign`s: the same results up to rounding, in channels-last
    memory.

    Boxes stay in float32 even if the maps are in half precision: Detectron2 rounds them to the
    maps' type, which for bfloat16 moves a box at 500 pixels by up to one pixel. The pooler itself
    runs on other devices than the CPU, under tracing, and with a fixed sampling ratio.
    """

    def __init__(self, pooler: ROIPooler) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, x: List[Tensor], box_lists: List[Boxes]) -> Tensor:
        """The arguments and the result `(R, C, p, p)` are Detectron2's."""
        if not _usable(self.pooler, x, box_lists):
            return self.pooler(x, box_lists)
        with torch.no_grad():
            gather = _plan(self.pooler, x, box_lists)
        table = torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in x])  # (pixels, C)
        height, width = self.pooler.output_size
        pooled = _Gather.apply(table, *gather)  # (R·p·p, C)
        return pooled.view(-1, height, width, table.shape[1]).permute(0, 3, 1, 2)


def _usable(pooler: ROIPooler, x: Sequence[Tensor], boxes: Sequence[Boxes]) -> bool:
    return (
        not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and any(len(image_boxes) for image_boxes in boxes)
        and all(level.device.type == "cpu" and level.is_floating_point() for level in x)
        and all(level.dtype == x[0].dtype != torch.float64 for level in x)
        and all(layer.sampling_ratio == 0 for layer in pooler.level_poolers)
    )


class _Plan(NamedTuple):
    """Which rows of the table are summed with which weights; the arguments of `embedding_bag`.

    Attributes:
        rows: the indices of the table's rows, output pixel after output pixel.
        weights: the weight of each of these rows.
        starts: where in `rows` each output pixel begins, (R·p·p,).
    """

    rows: Tensor
    weights: Tensor
    starts: Tensor


def _plan(pooler: ROIPooler, x: Sequence[Tensor], box_lists: List[Boxes]) -> _Plan:
    # 1. which map each box is pooled from, as Detectron2 assigns them
    boxes = convert_boxes_to_pooler_format(box_lists).float()  # (R, 5): image, x1, y1, x2, y2
    level = torch.zeros(len(boxes), dtype=torch.int64)
    if len(x) > 1:
        level = assign_boxes_to_levels(
            box_lists,
            pooler.min_level,
            pooler.max_level,
            pooler.canonical_box_size,
            pooler.canonical_level,
        )
    sizes = torch.tensor([maps.shape[2:] for maps in x])[level]  # (R, 2)
    scale = torch.tensor([layer.spatial_scale for layer in pooler.level_poolers])[level]
    # 2. the first row of that map in the table, behind the levels and images before it
    pixels = torch.tensor([0] + [maps[:, 0].numel() for maps in x])
    first = pixels.cumsum(0)[level] + boxes[:, 0].long() * sizes.prod(1)
    # 3. bilinear interpolation separates: weights per row, weights per column, and their products
    aligned = pooler.level_poolers[0].aligned
    height, width = pooler.output_size
    down = _axis(boxes[:, 2], boxes[:, 4], scale, sizes[:, 0], height, aligned)
    across = _axis(boxes[:, 1], boxes[:, 3], scale, sizes[:, 1], width, aligned)
    return _combine(down, across, first, sizes[:, 1])


class _Axis(NamedTuple):
    """The map rows (or columns) that each output row (or column) of each box sums over.

    Attributes:
        counts: how many there are, (R,); entries beyond are padding.
        places: their indices in the map, (R, p, most).
        weights: their weights, (R, p, most).
    """

    counts: Tensor
    places: Tensor
    weights: Tensor


def _axis(
    start: Tensor, end: Tensor, scale: Tensor, size: Tensor, bins: int, aligned: bool
) -> _Axis:
    """torchvision's sampling in one direction, with the weights that fall on one pixel summed.

    torchvision averages bilinear samples, whose points are at most one pixel apart.

    Args:
        start: where the boxes begin in image pixels, (R,).
        end: where they end, (R,).
        scale: map pixels per image pixel, (R,).
        size: of the map, (R,).
        bins: output pixels.
        aligned: whether pixel centres are at halves rather than at whole numbers.
    """
    offset = 0.5 if aligned else 0.0
    start, end = start * scale - offset, end * scale - offset
    length = end - start if aligned else (end - start).clamp(min=1.0)
    # 1. the sampling points of each bin, as many as its length in pixels, rounded up
    points = (length / bins).ceil().clamp(min=0)  # per bin; none for an empty box
    steps = points.clamp(min=1)
    most = int(steps.max())
    step = (length / bins)[:, None, None]
    number = torch.arange(most)
    place = start[:, None, None] + torch.arange(bins)[:, None] * step
    place = place + (number + 0.5) * step / steps[:, None, None]  # (R, p, most)
    # 2. points more than a pixel outside the map count nothing, others are moved to its border
    last = (size - 1)[:, None, None]
    counts = (number < points[:, None, None]) & (place >= -1) & (place <= last + 1)
    place = place.clamp(min=0).minimum(last)
    # 3. each point divides its weight between the two pixels around it
    low = place.floor().minimum(last)
    share = place - low
    low = low.long()
    weight = counts / steps[:, None, None]
    # 4. sum by pixel, counted from the bin's first; padding has no weight, wherever it is put
    begin = low[:, :, :1]
    near = (low - begin).clamp(0, most - 1)
    weights = torch.zeros(*near.shape[:2], most + 1)
    weights.scatter_add_(2, near, weight * (1 - share))
    weights.scatter_add_(2, near + 1, weight * share)
    places = (begin + torch.arange(most + 1)).minimum(last)
    return _Axis(steps.long() + 1, places, weights)


def _combine(down: _Axis, across: _Axis, first: Tensor, width: Tensor) -> _Plan:
    """The products of both directions for all output pixels of all boxes, without the padding.

    Args:
        first: the row in the table of the first pixel of each box's map, (R,).
        width: of each box's map, (R,).
    """
    boxes, bins, most = across.places.shape
    lines = down.places.shape[1]
    # 1. one entry per box, output row, output column, and map row that the output row sums over
    lengths = across.counts[:, None, None, None]
    seen = torch.arange(down.places.shape[2]) < down.counts[:, None, None, None]
    seen = seen.expand(boxes, lines, bins, -1)
    begin = (down.places * width[:, None, None] + first[:, None, None])[:, :, None]
    column = torch.arange(boxes * bins).view(boxes, 1, bins, 1) * most
    begin, column, weight, lengths = (
        values.expand(seen.shape)[seen].contiguous()
        for values in (begin, column, down.weights[:, :, None], lengths)
    )
    # 2. repeat each for the map columns that the output column sums over
    entry = torch.repeat_interleave(lengths)
    ends = lengths.cumsum(0)
    column = (column - ends + lengths)[entry] + torch.arange(len(entry))
    rows = begin[entry] + across.places.flatten()[column]
    weights = weight[entry] * across.weights.flatten()[column]
    # 3. how many products each output pixel has, and so where its begin
    amounts = (down.counts * across.counts).repeat_interleave(lines * bins)
    return _Plan(rows.int(), weights, (amounts.cumsum(0) - amounts).int())


class _Gather(torch.autograd.Function):
    """The weighted sums of a plan: `(pixels, C)` -> `(R·p·p, C)`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, starts)
        ctx.length = len(table)
        return _sum(table, rows, weights, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, starts = ctx.saved_tensors
        ends = torch.cat([starts[1:], starts.new_tensor([len(rows)])])
        output = torch.arange(len(starts), dtype=torch.int32).repeat_interleave(ends - starts)
        # the transposed gather: for each pixel of the table, the outputs that it contributed to
        rows, order = rows.sort(stable=True)
        pixels = torch.arange(ctx.length, dtype=rows.dtype)
        begins = torch.searchsorted(rows, pixels, out_int32=True)
        return _sum(grad.contiguous(), output[order], weights[order], begins), None, None, None


def _sum(table: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    weights = weights.to(table.dtype)
    return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights)


def gather_poolers(model: nn.Module) -> int:
    """Replace every ROIPooler of ROIAligns in a model, in place.

    A pooler has no parameters, so the keys of checkpoints stay the same.

    Returns:
        how many were replaced.
    """
    poolers = [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, GatherPooler)
        for name, child in parent.named_children()
        if _is_align_pooler(child)
    ]
    for parent, name, child in poolers:
        setattr(parent, name, GatherPooler(child))
    return len(poolers)


def _is_align_pooler(module: Any) -> bool:
    return type(module) is ROIPooler and all(
        type(layer) is ROIAlign for layer in module.level_poolers
    )
