"""Weighted sums of maps of several levels in one pass over memory. Shapes are `(N, C, H, W)`.

A coarse map counts as if its values were repeated (nearest upsampling), but the repeated map is
never made: the fine map is viewed with each coarse pixel's block as an axis of its own, along which
the coarse map is broadcast. Autograd saves the maps as they came, the coarse ones small. Plain sums
have the bits of the plain operations; weighted ones round once where those round the product and
the sum.

This is the CPU's eager path. Compilers, which fuse the plain operations themselves, tracers and
exporters get the plain operations, and so does any sum that :func:`usable` rejects.
"""

from __future__ import annotations

from typing import Any, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fpn_plugin.compat import is_exporting

Factors = Optional[List[float]]


def is_traced() -> bool:
    """Whether a tracer, compiler or exporter records the operations."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or is_exporting()


def usable(maps: Sequence[Tensor], coarse: Sequence[bool], size: Sequence[int]) -> bool:
    """Whether :func:`weighted_sum` can sum these maps.

    Args:
        coarse: which of the maps are to be repeated.
        size: of the result.
    """
    if is_traced():
        return False
    fine = next((x for x, is_coarse in zip(maps, coarse) if not is_coarse), None)
    if fine is None or fine.device.type != "cpu" or fine.dim() != 4 or fine.numel() == 0:
        return False
    layout = memory_layout(fine)
    return layout is not None and all(
        x.dtype == fine.dtype
        and x.shape[:2] == fine.shape[:2]
        and _fits(x, is_coarse, size)
        and (is_coarse or x.is_contiguous(memory_format=layout))
        for x, is_coarse in zip(maps, coarse)
    )


def memory_layout(x: Tensor) -> torch.memory_format | None:
    """The dense layout of a map; None if it has gaps."""
    for layout in (torch.channels_last, torch.contiguous_format):
        if x.is_contiguous(memory_format=layout):
            return layout
    return None


def _fits(x: Tensor, is_coarse: bool, size: Sequence[int]) -> bool:
    """Whether a fine map has this size, or a coarse one a whole fraction of it, the same in both
    directions."""
    height, width = x.shape[2], x.shape[3]
    if not is_coarse:
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


def _forward(
    maps: Sequence[Tensor], coarse: List[bool], size: List[int], weights: Factors
) -> Tensor:
    factors: Sequence[float | None] = weights or [None] * len(maps)
    # Coarse maps are scaled by themselves, as they are small. A fine map is never scaled alone: its
    # factor is `alpha` of the addition that reads it.
    scaled = [_scale(x, f) if is_coarse else x for x, f, is_coarse in zip(maps, factors, coarse)]
    # The first two maps make the new map that the others are added to in place.
    if coarse[0] and coarse[1]:
        # no fine map to broadcast against yet, so the first one is really repeated
        total = _add_coarse(F.interpolate(scaled[0], size=size, mode="nearest"), scaled[1])
    elif coarse[0]:
        total = _coarse_plus_fine(scaled[0], maps[1], factors[1])
    elif coarse[1]:
        total = _coarse_plus_fine(scaled[1], maps[0], factors[0])
    else:
        first = _scale(maps[0], factors[0])
        # in place if scaling made a copy
        total = _add_fine(first, maps[1], factors[1], None if first is maps[0] else first)
    for i in range(2, len(maps)):
        if coarse[i]:
            _add_coarse(total, scaled[i])
        else:
            _add_fine(total, maps[i], factors[i], total)
    return total


def _scale(x: Tensor, factor: float | None) -> Tensor:
    return x if factor is None else x * factor


def _add_fine(x: Tensor, y: Tensor, factor: float | None, out: Tensor | None) -> Tensor:
    """`x + factor · y` in one pass."""
    return torch.add(x, y, alpha=1 if factor is None else factor, out=out)


def _coarse_plus_fine(x: Tensor, fine: Tensor, factor: float | None) -> Tensor:
    """`repeat(x) + factor · fine`, as a new map."""
    small, blocks = _blocks(x, fine)
    total = torch.empty_like(fine)
    _add_fine(small, blocks, factor, total.view(blocks.shape))
    return total


def _add_coarse(total: Tensor, x: Tensor) -> Tensor:
    """Add `repeat(x)` to `total`, in place."""
    small, blocks = _blocks(x, total)
    blocks.add_(small)
    return total


def _blocks(x: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
    """A coarse and a fine map, reshaped so that the coarse one is broadcast along each block.

    In channels-last memory the channels are the innermost axis, and the coarse map is broadcast in
    both directions. Else the innermost axis would only be as long as the factor, which is slow: the
    rows of the coarse map are repeated in a (small) copy, and broadcast vertically.

    Returns:
        a view or copy of the coarse map, and a view of the fine one.
    """
    (n, c, h, w), factor = x.shape, fine.shape[2] // x.shape[2]
    if memory_layout(fine) == torch.channels_last:
        # (N, C, h, 1, w, 1) and (N, C, h, f, w, f)
        return x.reshape(n, c, h, 1, w, 1), fine.view(n, c, h, factor, w, factor)
    rows = x.unsqueeze(-1).expand(n, c, h, w, factor).reshape(n, c, h, 1, w * factor)
    return rows, fine.view(n, c, h, factor, w * factor)  # (N, C, h, 1, W) and (N, C, h, f, W)


class _WeightedSum(torch.autograd.Function):
    """:func:`_forward` with its gradient.

    `Σ grad` over each block of a coarse map is computed once, and gives the gradient both of the
    map, `w · Σ grad`, and of its weight, `⟨Σ grad, x⟩`.
    """

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
        # only the gradient of learned weights depends on the maps
        learned = weights is not None and weights.requires_grad
        ctx.save_for_backward(weights, *(maps if learned else ()))
        return _forward(maps, coarse, size, None if weights is None else weights.tolist())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, *maps = ctx.saved_tensors
        factors = [None] * len(ctx.sizes) if weights is None else weights.tolist()
        map_grads: List[Tensor | None] = []
        weight_grads: List[Tensor] = []
        for i, (is_coarse, size) in enumerate(zip(ctx.coarse, ctx.sizes)):
            # the gradient at the map's own resolution, before its weight
            unscaled = _sum_blocks(grad, size) if is_coarse else grad
            if maps:
                weight_grads.append(_dot(unscaled, maps[i]))
            needed = ctx.needs_input_grad[3 + i]
            map_grads.append(_scale(unscaled, factors[i]) if needed else None)
        stacked = torch.stack(weight_grads).to(weights.dtype) if weight_grads else None
        return (None, None, stacked, *map_grads)


def _sum_blocks(grad: Tensor, size: Sequence[int]) -> Tensor:
    """The sum of each block of a fine map: `(N, C, H, W)` -> `(N, C, *size)`, with the bits of
    interpolation's own gradient."""
    if memory_layout(grad) == torch.channels_last:
        return F.avg_pool2d(grad, grad.shape[2] // size[0], divisor_override=1)
    shape = [*grad.shape[:2], *size]
    return torch.ops.aten.upsample_nearest2d_backward(grad, list(grad.shape[2:]), shape)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """`Σ xy` over all elements, without a map of the products if both have the same layout."""
    layout = memory_layout(x)
    if layout is None or not y.is_contiguous(memory_format=layout):
        return (x * y).sum()
    if layout == torch.channels_last:
        x, y = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
    return torch.dot(x.reshape(-1), y.reshape(-1))
