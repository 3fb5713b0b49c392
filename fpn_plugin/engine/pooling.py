"""ROIAlign as one weighted gather. `N` images, `R` boxes, `C` channels, `p` output pixels a side.

Every output pixel is a weighted sum of pixels of one map, whole rows of `C` numbers in
channels-last memory. torchvision's CPU kernel, which fetches them one number at a time on one core,
takes a quarter to a third of a detector's time once its convolutions are fast. Here they are
gathered by torch's `embedding_bag`, from a table of all levels' pixels; the gradient is a gather
too, from the outputs' gradients in the order of the pixels.
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
    """A Detectron2 `ROIPooler` made of `ROIAlign`s, with its results up to rounding, in
    channels-last memory.

    Boxes stay in float32, also where the maps are in half precision: Detectron2 rounds them to the
    maps' type, which for bfloat16 moves a box at 500 pixels by up to one. Off the CPU, traced, or
    with a fixed sampling ratio, the pooler itself runs.
    """

    def __init__(self, pooler: ROIPooler) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, x: List[Tensor], box_lists: List[Boxes]) -> Tensor:
        """Detectron2's arguments and result: `(R, C, p, p)`."""
        if not _usable(self.pooler, x, box_lists):
            return self.pooler(x, box_lists)
        with torch.no_grad():
            gather = _plan(self.pooler, x, box_lists)
        table = torch.cat([item.permute(0, 2, 3, 1).flatten(0, 2) for item in x])
        height, width = self.pooler.output_size
        pooled = _Gather.apply(table, *gather)  # (rows, C) -> (R·p·p, C)
        return pooled.view(-1, height, width, table.shape[1]).permute(0, 3, 1, 2)


def _usable(pooler: ROIPooler, x: Sequence[Tensor], boxes: Sequence[Boxes]) -> bool:
    return (
        not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and sum(len(item) for item in boxes) > 0
        and all(item.device.type == "cpu" and item.is_floating_point() for item in x)
        and all(item.dtype == x[0].dtype != torch.float64 for item in x)
        and all(layer.sampling_ratio == 0 for layer in pooler.level_poolers)
    )


class _Plan(NamedTuple):
    """Which rows of a table are summed with which weights.

    Attributes:
        rows: of the table, output pixel after output pixel.
        weights: of each of them.
        starts: where each output pixel's begin.
    """

    rows: Tensor
    weights: Tensor
    starts: Tensor


def _plan(pooler: ROIPooler, x: Sequence[Tensor], box_lists: List[Boxes]) -> _Plan:
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
    sizes = torch.tensor([item.shape[2:] for item in x])[level]  # (R, 2)
    scale = torch.tensor([layer.spatial_scale for layer in pooler.level_poolers])[level]
    pixels = torch.tensor([0] + [item[:, 0].numel() for item in x])
    first = pixels.cumsum(0)[level] + boxes[:, 0].long() * sizes.prod(1)
    aligned = pooler.level_poolers[0].aligned
    height, width = pooler.output_size
    down = _axis(boxes[:, 2], boxes[:, 4], scale, sizes[:, 0], height, aligned)
    across = _axis(boxes[:, 1], boxes[:, 3], scale, sizes[:, 1], width, aligned)
    return _combine(down, across, first, sizes[:, 1])


class _Axis(NamedTuple):
    """What each output row (or column) of each box sums over.

    Attributes:
        counts: how many pixels, (R,).
        places: of the pixels, (R, p, most).
        weights: of the pixels, (R, p, most).
    """

    counts: Tensor
    places: Tensor
    weights: Tensor


def _axis(
    start: Tensor, end: Tensor, scale: Tensor, size: Tensor, bins: int, aligned: bool
) -> _Axis:
    """torchvision's sampling, whose points are a pixel or less apart, with the weights that fall to
    one pixel added up.

    Args:
        start: and `end`: of the boxes in image pixels, (R,).
        scale: map pixels per image pixel, (R,).
        size: of the map, (R,).
        bins: output pixels.
        aligned: whether pixel centres are at halves, and not at whole numbers.
    """
    offset = 0.5 if aligned else 0.0
    start, end = start * scale - offset, end * scale - offset
    length = end - start if aligned else (end - start).clamp(min=1.0)
    points = (length / bins).ceil().clamp(min=0)  # per bin; none for an empty box
    steps = points.clamp(min=1)
    most = int(steps.max())
    step = (length / bins)[:, None, None]
    number = torch.arange(most)
    place = start[:, None, None] + torch.arange(bins)[:, None] * step
    place = place + (number + 0.5) * step / steps[:, None, None]  # (R, p, most)
    last = (size - 1)[:, None, None]
    counts = (number < points[:, None, None]) & (place >= -1) & (place <= last + 1)
    place = place.clamp(min=0).minimum(last)
    low = place.floor().minimum(last)
    share = place - low
    low = low.long()
    weight = counts / steps[:, None, None]
    begin = low[:, :, :1]
    # points beyond a box's own number weigh nothing, wherever they are put
    near = (low - begin).clamp(0, most - 1)
    weights = torch.zeros(*near.shape[:2], most + 1)
    weights.scatter_add_(2, near, weight * (1 - share))
    weights.scatter_add_(2, near + 1, weight * share)
    places = (begin + torch.arange(most + 1)).minimum(last)
    return _Axis(steps.long() + 1, places, weights)


def _combine(down: _Axis, across: _Axis, first: Tensor, width: Tensor) -> _Plan:
    """The products of both directions, for all output pixels of all boxes, without gaps.

    Args:
        first: the table's row of each box's map's first pixel, (R,).
        width: of each box's map, (R,).
    """
    boxes, bins, most = across.places.shape
    lines = down.places.shape[1]
    # one entry per box, output row, output column, and row of the map that these two see
    lengths = across.counts[:, None, None, None]
    seen = torch.arange(down.places.shape[2]) < down.counts[:, None, None, None]
    seen = seen.expand(boxes, lines, bins, -1)
    begin = (down.places * width[:, None, None] + first[:, None, None])[:, :, None]
    column = torch.arange(boxes * bins).view(boxes, 1, bins, 1) * most
    begin, column, weight, lengths = (
        item.expand(seen.shape)[seen].contiguous()
        for item in (begin, column, down.weights[:, :, None], lengths)
    )
    # … and of these one per column of the map
    entry = torch.repeat_interleave(lengths)
    ends = lengths.cumsum(0)
    column = (column - ends + lengths)[entry] + torch.arange(len(entry))
    rows = begin[entry] + across.places.flatten()[column]
    weights = weight[entry] * across.weights.flatten()[column]
    amounts = (down.counts * across.counts).repeat_interleave(lines * bins)
    return _Plan(rows.int(), weights, (amounts.cumsum(0) - amounts).int())


class _Gather(torch.autograd.Function):
    """The weighted sums of a plan: `(rows, C)` -> `(outputs, C)`."""

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
        rows, order = rows.sort(stable=True)
        pixels = torch.arange(ctx.length, dtype=rows.dtype)
        begins = torch.searchsorted(rows, pixels, out_int32=True)
        return _sum(grad.contiguous(), output[order], weights[order], begins), None, None, None


def _sum(table: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    weights = weights.to(table.dtype)
    return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights)


def gather_poolers(model: nn.Module) -> int:
    """Replace, in place, every ROIPooler that is made of ROIAligns.

    A pooler has no parameters, so no key of a checkpoint changes.

    Returns:
        how many there were.
    """
    found = [
        (owner, name, child)
        for owner in model.modules()
        if not isinstance(owner, GatherPooler)
        for name, child in owner.named_children()
        if _aligns(child)
    ]
    for owner, name, child in found:
        setattr(owner, name, GatherPooler(child))
    return len(found)


def _aligns(module: Any) -> bool:
    """Whether it is a pooler of the one kind that is computed here."""
    return type(module) is ROIPooler and all(
        type(layer) is ROIAlign for layer in module.level_poolers
    )
