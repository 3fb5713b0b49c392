"""Reassembly: maps that are filtered by another kernel at each pixel (CARAFE, arXiv:1905.02188).

Shapes are `(N, C, H, W)`; `f` is the factor by which the result is larger.

It goes tap by tap: an unfolded map would be `k²` times as large, and autograd would save it. Run
eagerly, autograd saves the map and the kernels alone, and a CPU takes all taps of a few rows before
the next ones, while they are in its cache. Compilers, which fuse the operations themselves, tracers
and exporters get the plain operations.
"""

from __future__ import annotations

from typing import Any, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fpn_plugin.pyramid.fused import is_traced, memory_layout

BORDERS = ("zero", "reflect")
# the values of a block of rows on a CPU, so that what a tap reads and writes stays in its L2 cache
_BLOCK = 2**19


def reassemble(
    x: Tensor, kernels: Tensor, side: int, factor: int = 1, border: str = "zero"
) -> Tensor:
    """The sum of the `side × side` pixels around each pixel, weighted by the pixel's kernel.

    Args:
        kernels: shape `(N, side², f·H, f·W)`, the weights row by row. The sum has their dtype.
        side: of the neighbourhood: 3 or 5.
        factor: `f × f` pixels of the result share the neighbourhood of the source pixel that they
            lie in.
        border: what is beyond it, one of `BORDERS`.

    Returns:
        shape `(N, C, f·H, f·W)`, in the dtype of `x`.
    """
    padded = _pad(x, side // 2, border)
    if not torch.jit.is_scripting():
        if not is_traced() and memory_layout(padded) is not None:
            return _Reassemble.apply(padded, kernels.contiguous(), side, factor)
    return _reassemble(padded, kernels, side, factor).to(x.dtype)


def _pad(x: Tensor, width: int, border: str) -> Tensor:
    if border == "zero":
        return F.pad(x, [width, width, width, width])
    rows = _reflected(x.shape[2], width, x.device)
    columns = _reflected(x.shape[3], width, x.device)
    return x.index_select(2, rows).index_select(3, columns)


def _reflected(side: int, width: int, device: torch.device) -> Tensor:
    """The indices along a side and up to two pixels beyond, reflected at the outermost pixels.

    Unlike torch's padding it takes sides of one and two pixels too.
    """
    last = side - 1
    index = torch.arange(side + 2 * width, device=device) - width
    return (last - (last - index.abs()).abs()).abs().clamp(max=last)


def _repeat(x: Tensor, rows: int, columns: int) -> Tensor:
    """Every row and every column that often."""
    if rows * columns == 1:
        return x
    return F.interpolate(x, size=[rows * x.shape[2], columns * x.shape[3]], mode="nearest")


def _reassemble(padded: Tensor, kernels: Tensor, side: int, factor: int) -> Tensor:
    """The plain operations."""
    height, width = kernels.shape[2], kernels.shape[3]
    source = _repeat(padded.to(kernels.dtype), factor, factor)
    out = source[:, :, :height, :width] * kernels[:, :1]
    for tap in range(1, side * side):
        top, left = factor * (tap // side), factor * (tap % side)
        shifted = source[:, :, top : top + height, left : left + width]
        out = torch.addcmul(out, shifted, kernels[:, tap : tap + 1])
    return out


class _Reassemble(torch.autograd.Function):
    """:func:`_reassemble` with its gradient, a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, kernels: Tensor, side: int, factor: int) -> Tensor:
        ctx.save_for_backward(padded, kernels)
        ctx.side, ctx.factor = side, factor
        n, _, height, width = kernels.shape
        out = torch.empty(
            [n, padded.shape[1], height, width],
            dtype=padded.dtype,
            device=padded.device,
            memory_format=memory_layout(padded),
        )
        source, result = _repeat(padded, 1, factor).unsqueeze(3), _split(out, factor)
        weights = _split(kernels, factor)  # (N, side², H, f, f·W)
        for images, rows, reach in _blocks(result, side):
            taps = _taps(source[images, :, reach].to(kernels.dtype), result.shape, side, factor)
            here = weights[images, :, rows]
            total = next(taps) * here[:, :1]
            for tap, shifted in enumerate(taps, 1):
                total.addcmul_(shifted, here[:, tap : tap + 1])
            result[images, :, rows] = total
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, kernels = ctx.saved_tensors
        side, factor = ctx.side, ctx.factor
        grad = _split(
            grad.contiguous(memory_format=memory_layout(padded) or torch.contiguous_format), factor
        )
        source = _repeat(padded, 1, factor).unsqueeze(3)
        source_grad = torch.zeros_like(source, dtype=kernels.dtype)
        kernels_grad = torch.empty_like(kernels)
        weights, weights_grad = _split(kernels, factor), _split(kernels_grad, factor)
        for images, rows, reach in _blocks(grad, side):
            above = grad[images, :, rows].to(kernels.dtype)
            taps = _taps(source[images, :, reach].to(kernels.dtype), grad.shape, side, factor)
            targets = _taps(source_grad[images, :, reach], grad.shape, side, factor)
            for tap, (shifted, target) in enumerate(zip(taps, targets)):
                weights_grad[images, tap, rows] = (above * shifted).sum(dim=1)
                weight = weights[images, tap : tap + 1, rows]
                for i in range(factor):
                    target.addcmul_(above[:, :, :, i : i + 1], weight[:, :, :, i : i + 1])
        source_grad = source_grad.squeeze(3)
        if factor > 1:  # the sum of the columns that were one
            source_grad = source_grad.unflatten(3, (-1, factor)).sum(dim=4)
        return source_grad.to(padded.dtype), kernels_grad, None, None


def _split(x: Tensor, factor: int) -> Tensor:
    """`(N, C, f·H, f·W)` -> `(N, C, H, f, f·W)`."""
    return x.unflatten(2, (-1, factor))


def _blocks(result: Tensor, side: int) -> Iterator[tuple[slice, slice, slice]]:
    """The parts of a split result that are computed at a time.

    Yields:
        the images, their rows, and the rows of the padded map that those reach.
    """
    n, c, h, factor, width = result.shape
    images, height = max(1, n), max(1, h)
    if result.device.type == "cpu":
        images, height = 1, max(1, _BLOCK // (c * factor * width))
    for image in range(0, n, images):
        for top in range(0, h, height):
            bottom = min(top + height, h)
            reach = slice(top, bottom + side - 1)
            yield slice(image, image + images), slice(top, bottom), reach


def _taps(source: Tensor, shape: Sequence[int], side: int, factor: int) -> Iterator[Tensor]:
    """Views of the rows that a block reaches, one for each pixel of the neighbourhood.

    Args:
        shape: of the split result.
    """
    height, width = source.shape[2] - side + 1, shape[4]
    for tap in range(side * side):
        top, left = tap // side, tap % side * factor
        yield source[:, :, top : top + height, :, left : left + width]
