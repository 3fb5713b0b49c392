"""Weighted sums of maps of several levels in one pass over memory. Shapes are `(N, C, H, W)`.

A coarse map counts as if its values were repeated (nearest upsampling), but the repeated map is
never made: a view of the fine map in which each coarse pixel's block is an axis of its own meets
the coarse map by broadcasting. What autograd keeps is the maps as they came, the coarse ones small.
Plain sums have the bits of the plain operations; weighted ones round once where those round the
product and the sum.

This is the eager path of the CPU. Compilers, which fuse the plain operations themselves, tracers
and exporters see the plain operations, and so does any sum that :func:`usable` turns down.
"""

from __future__ import annotations

from typing import Any, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Weights = Optional[List[float]]


def is_watched() -> bool:
    """Whether a tracer, compiler or exporter looks on, which is shown the plain operations."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.compiler.is_exporting()


def usable(maps: Sequence[Tensor], coarse: Sequence[bool], size: Sequence[int]) -> bool:
    """Whether :func:`weighted_sum` takes these maps, as things stand.

    Args:
        coarse: which of the maps are to be repeated.
        size: of the result.
    """
    if is_watched():
        return False
    first = next((x for x, small in zip(maps, coarse) if not small), None)
    if first is None or first.device.type != "cpu" or first.dim() != 4 or first.numel() == 0:
        return False
    layout = memory_layout(first)
    return layout is not None and all(
        x.dtype == first.dtype
        and x.shape[:2] == first.shape[:2]
        and _meets(x, small, size)
        and (small or x.is_contiguous(memory_format=layout))
        for x, small in zip(maps, coarse)
    )


def memory_layout(x: Tensor) -> torch.memory_format | None:
    """The dense layout of a map; None if it has gaps."""
    for layout in (torch.channels_last, torch.contiguous_format):
        if x.is_contiguous(memory_format=layout):
            return layout
    return None


def _meets(x: Tensor, small: bool, size: Sequence[int]) -> bool:
    """Whether a map is of the size, or half of it, a quarter, … in both directions alike."""
    height, width = x.shape[2], x.shape[3]
    if not small:
        return [height, width] == list(size)
    factor = size[0] // height
    return factor > 1 and [height * factor, width * factor] == list(size)


def weighted_sum(
    maps: List[Tensor], coarse: List[bool], size: List[int], weights: Tensor | None = None
) -> Tensor:
    """`Σ wᵢ xᵢ`, in the order given, for maps that are :func:`usable`.

    Args:
        weights: shape `(n,)`; None for a plain sum.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*maps, weights) if x is not None):
        return _WeightedSum.apply(coarse, size, weights, *maps)
    return _forward(maps, coarse, size, None if weights is None else weights.tolist())


def _forward(maps: Sequence[Tensor], coarse: List[bool], size: List[int], w: Weights) -> Tensor:
    factors: Sequence[float | None] = w or [None] * len(maps)
    scaled = [_scaled(x, f) if small else x for x, small, f in zip(maps, coarse, factors)]
    if coarse[0] and coarse[1]:
        start = F.interpolate(scaled[0], size=size, mode="nearest")
        total = _add_coarse(start, scaled[1])
    elif coarse[0] or coarse[1]:
        one, other = (0, 1) if coarse[0] else (1, 0)
        total = _coarse_plus(scaled[one], maps[other], factors[other])
    else:
        start = _scaled(maps[0], factors[0])
        total = _plus(start, maps[1], factors[1], None if start is maps[0] else start)
    for i in range(2, len(maps)):
        if coarse[i]:
            _add_coarse(total, scaled[i])
        else:
            _plus(total, maps[i], factors[i], total)
    return total


def _scaled(x: Tensor, factor: float | None) -> Tensor:
    return x if factor is None else x * factor


def _plus(x: Tensor, y: Tensor, factor: float | None, out: Tensor | None) -> Tensor:
    """`x + factor · y` in one pass."""
    return torch.add(x, y, alpha=1 if factor is None else factor, out=out)


def _blocks(x: Tensor, fine: Tensor) -> tuple[Tensor, ...]:
    """Views (or a small copy) of a coarse and a fine map that broadcast against each other.

    In channels-last memory the channels are innermost, and the coarse map itself is broadcast. Else
    the innermost axis would be as short as the factor; so the coarse rows are made wide first.
    """
    (n, c, h, w), factor = x.shape, fine.shape[2] // x.shape[2]
    if memory_layout(fine) == torch.channels_last:
        # (N, C, h, 1, w, 1) and (N, C, h, f, w, f)
        return x.reshape(n, c, h, 1, w, 1), fine.view(n, c, h, factor, w, factor)
    rows = x.unsqueeze(-1).expand(n, c, h, w, factor).reshape(n, c, h, 1, w * factor)
    return rows, fine.view(n, c, h, factor, w * factor)  # (N, C, h, 1, W) and (N, C, h, f, W)


def _coarse_plus(x: Tensor, fine: Tensor, factor: float | None) -> Tensor:
    """The coarse map repeated, plus `factor` times the fine one, as a new map."""
    small, large = _blocks(x, fine)
    total = torch.empty_like(fine)
    _plus(small, large, factor, total.view(large.shape))
    return total


def _add_coarse(total: Tensor, x: Tensor) -> Tensor:
    """Add the coarse map, repeated, to `total`, in place."""
    small, large = _blocks(x, total)
    large.add_(small)
    return total


class _WeightedSum(torch.autograd.Function):
    """:func:`_forward` with a gradient that adds up each block of the fine gradient once, for the
    coarse map and its weight alike."""

    @staticmethod
    def forward(
        ctx: Any,
        coarse: List[bool],
        size: List[int],
        weights: Tensor | None,
        *maps: Tensor,
    ) -> Tensor:
        ctx.coarse = coarse
        ctx.sizes = [x.shape[2:] for x in maps]
        learned = weights is not None and weights.requires_grad
        # without learned weights the gradient does not depend on the maps
        ctx.save_for_backward(weights, *(maps if learned else ()))
        return _forward(maps, coarse, size, None if weights is None else weights.tolist())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, *maps = ctx.saved_tensors
        factors = [None] * len(ctx.sizes) if weights is None else weights.tolist()
        of_maps: List[Tensor | None] = []
        of_weights: List[Tensor] = []
        for i, (small, side) in enumerate(zip(ctx.coarse, ctx.sizes)):
            here = _add_up(grad, side) if small else grad
            if maps:
                of_weights.append(_dot(here, maps[i]))
            wanted = ctx.needs_input_grad[3 + i]
            of_maps.append(_scaled(here, factors[i]) if wanted else None)
        stacked = torch.stack(of_weights).to(weights.dtype) if of_weights else None
        return (None, None, stacked, *of_maps)


def _add_up(grad: Tensor, size: Sequence[int]) -> Tensor:
    """The sum of each block of a fine map: `(N, C, H, W)` -> `(N, C, *size)`."""
    factor = grad.shape[2] // size[0]
    if memory_layout(grad) == torch.channels_last:
        return F.avg_pool2d(grad, factor, divisor_override=1)
    if grad.dtype != torch.float32:  # adding slices would round in between
        (n, c), shape = grad.shape[:2], list(grad.shape[2:])
        return torch.ops.aten.upsample_nearest2d_backward(grad, shape, [n, c, *size])
    while factor > 1:
        grad = grad[:, :, ::2] + grad[:, :, 1::2]
        grad = grad[:, :, :, ::2] + grad[:, :, :, 1::2]
        factor //= 2
    return grad


def _dot(one: Tensor, two: Tensor) -> Tensor:
    """`Σ xy` over all elements, without a map of the products where both lie alike."""
    layout = memory_layout(one)
    if layout is None or not two.is_contiguous(memory_format=layout):
        return (one * two).sum()
    if layout == torch.channels_last:
        one, two = one.permute(0, 2, 3, 1), two.permute(0, 2, 3, 1)
    return torch.dot(one.reshape(-1), two.reshape(-1))
