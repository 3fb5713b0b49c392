"""Weighted sums of maps of several sizes by one Triton kernel (`MODEL.FPN.TRITON`). Shapes are
`(N, C, H, W)`.

The counterpart of :mod:`fused` for CUDA: each program makes a tile of the result, reads every map
once, the smaller ones where torch's nearest upsampling would read them, and adds up in float32. Any
size can be brought to any other, and maps may have gaps. Imported only where the key is on, since
Triton comes with torch's CUDA builds alone; `TRITON_INTERPRET=1`, set before, runs it on the CPU.

The kernels equal the plain operations in Triton's interpreter (which cuts bfloat16 off where GPUs
round it) and compile for GPUs, but they have not been run on one, let alone timed.
"""

from __future__ import annotations

from typing import Any, List, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fpn_plugin.pyramid.fused import is_watched, memory_layout
from fpn_plugin.pyramid.one_pass import is_interpreted

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = 1024  # elements that one program makes
_DEVICES = ("cuda", "cpu") if is_interpreted() else ("cuda",)  # Triton asks when it decorates


@triton.jit
def place_tile(  # type: ignore[no-untyped-def]
    rows, channels, height, width,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Where the tile of this program lies in a dense map: n, c, h, w, the elements' places, and
    which of them exist. Columns go along the axis that is innermost in memory, channels or width,
    and rows along all others."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    if CHANNELS_LAST:
        length = channels
        c = column
        w = row % width
        h = (row // width) % height
        n = row // width // height
    else:
        length = width
        w = column
        h = row % height
        c = (row // height) % channels
        n = row // height // channels
    return n, c, h, w, row * length + column, (row < rows) & (column < length)


@triton.jit
def load_map(  # type: ignore[no-untyped-def]
    x, n, c, h, w, inside,
    height, width, row_scale, column_scale, stride_n, stride_c, stride_h, stride_w,
    COARSE: tl.constexpr,
):  # fmt: skip
    """A tile of a map, in float32. Scales are a coarse map's size over the result's."""
    if COARSE:  # as torch does it: multiplied in float32, rounded down
        h = tl.minimum((h.to(tl.float32) * row_scale).to(tl.int32), height - 1)
        w = tl.minimum((w.to(tl.float32) * column_scale).to(tl.int32), width - 1)
    places = x + n * stride_n + c * stride_c + h * stride_h + w * stride_w
    return tl.load(places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sum_kernel(  # type: ignore[no-untyped-def]
    out, weights, rows, channels, height, width,
    x0, h0, w0, rs0, cs0, n0, c0, y0, s0,
    x1, h1, w1, rs1, cs1, n1, c1, y1, s1,
    x2, h2, w2, rs2, cs2, n2, c2, y2, s2,
    COARSE0: tl.constexpr, COARSE1: tl.constexpr, COARSE2: tl.constexpr,
    THREE: tl.constexpr, WEIGHTED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`out = Σ wᵢ xᵢ` for one tile. A plain sum rounds after each addition, as the plain operations
    do; a weighted one rounds once."""
    n, c, h, w, places, inside = place_tile(
        rows, channels, height, width, CHANNELS_LAST, ROWS, COLUMNS
    )
    total = load_map(x0, n, c, h, w, inside, h0, w0, rs0, cs0, n0, c0, y0, s0, COARSE0)
    other = load_map(x1, n, c, h, w, inside, h1, w1, rs1, cs1, n1, c1, y1, s1, COARSE1)
    if WEIGHTED:
        total = total * tl.load(weights).to(tl.float32)
        total += other * tl.load(weights + 1).to(tl.float32)
    else:
        total = (total + other).to(out.dtype.element_ty).to(tl.float32)
    if THREE:
        other = load_map(x2, n, c, h, w, inside, h2, w2, rs2, cs2, n2, c2, y2, s2, COARSE2)
        if WEIGHTED:
            other *= tl.load(weights + 2).to(tl.float32)
        total += other
    tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def plus(one, two):  # type: ignore[no-untyped-def]
    return one + two


@triton.jit
def dot_kernel(  # type: ignore[no-untyped-def]
    grad, partial, rows, channels, height, width,
    x0, h0, w0, rs0, cs0, n0, c0, y0, s0,
    x1, h1, w1, rs1, cs1, n1, c1, y1, s1,
    x2, h2, w2, rs2, cs2, n2, c2, y2, s2,
    COARSE0: tl.constexpr, COARSE1: tl.constexpr, COARSE2: tl.constexpr,
    THREE: tl.constexpr, WEIGHTED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`partial[i, program] = Σ grad xᵢ` over one tile: the weights' gradients, grad read once."""
    n, c, h, w, places, inside = place_tile(
        rows, channels, height, width, CHANNELS_LAST, ROWS, COLUMNS
    )
    g = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    programs = tl.num_programs(0) * tl.num_programs(1)
    partial += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    x = load_map(x0, n, c, h, w, inside, h0, w0, rs0, cs0, n0, c0, y0, s0, COARSE0)
    tl.store(partial, tl.reduce(tl.reduce(x * g, 1, plus), 0, plus))
    x = load_map(x1, n, c, h, w, inside, h1, w1, rs1, cs1, n1, c1, y1, s1, COARSE1)
    tl.store(partial + programs, tl.reduce(tl.reduce(x * g, 1, plus), 0, plus))
    if THREE:
        x = load_map(x2, n, c, h, w, inside, h2, w2, rs2, cs2, n2, c2, y2, s2, COARSE2)
        tl.store(partial + 2 * programs, tl.reduce(tl.reduce(x * g, 1, plus), 0, plus))


def usable(maps: Sequence[Tensor], coarse: Sequence[bool], size: Sequence[int]) -> bool:
    """Whether :func:`weighted_sum` takes these maps, as things stand: two or three of one type.

    Args:
        coarse: which of the maps are to be repeated.
        size: of the result.
    """
    if is_watched():
        return False
    first = maps[0]
    if len(maps) not in (2, 3) or first.device.type not in _DEVICES or first.dtype not in DTYPES:
        return False
    return all(
        x.dtype == first.dtype
        and x.device == first.device
        and x.dim() == 4
        and x.shape[:2] == first.shape[:2]
        and (small or list(x.shape[2:]) == list(size))
        and x.numel() > 0
        and _fits(x, size)
        for x, small in zip(maps, coarse)
    )


def _fits(x: Tensor, size: Sequence[int]) -> bool:
    """Whether places in the map, and in a result of its channels, are 32-bit numbers."""
    span = sum((length - 1) * stride for length, stride in zip(x.shape, x.stride()))
    return max(span, x.shape[0] * x.shape[1] * size[0] * size[1] + TILE) < 2**31


def weighted_sum(
    maps: List[Tensor], coarse: List[bool], size: List[int], weights: Tensor | None = None
) -> Tensor:
    """`Σ wᵢ xᵢ`, in the order given, for maps that are :func:`usable`.

    Args:
        weights: shape `(n,)`, on the maps' device; None for a plain sum, which has the bits of the
            plain operations.
    """
    return _WeightedSum.apply(coarse, size, weights, *maps)


def prepare(
    maps: Sequence[Tensor], coarse: Sequence[bool], dense: Tensor
) -> tuple[tuple[int, int], list[Any], dict[str, Any]]:
    """The grid for either kernel, its arguments after the first two, and its constants.

    Args:
        dense: a map of the result's size, in its layout.
    """
    n, c, height, width = dense.shape
    last = memory_layout(dense) == torch.channels_last
    rows, length = (n * height * width, c) if last else (n * c * height, width)
    columns = min(triton.next_power_of_2(length), 128)
    tile = TILE // columns
    arguments: list[Any] = [rows, c, height, width]
    for x in [*maps, maps[0]][:3]:  # of two maps, the kernel does not look at the third
        x_height, x_width = x.shape[2:]
        arguments += [x, x_height, x_width, x_height / height, x_width / width, *x.stride()]
    constants: dict[str, Any] = {f"COARSE{i}": x for i, x in enumerate([*coarse, False][:3])}
    constants |= {"THREE": len(maps) == 3, "CHANNELS_LAST": last, "ROWS": tile, "COLUMNS": columns}
    return (triton.cdiv(rows, tile), triton.cdiv(length, columns)), arguments, constants


def _forward(
    maps: Sequence[Tensor], coarse: Sequence[bool], size: Sequence[int], weights: Tensor | None
) -> Tensor:
    first = next((x for x, small in zip(maps, coarse) if not small), maps[0])
    last = first.stride(1) == 1 and first.shape[1] > 1
    layout = torch.channels_last if last else torch.contiguous_format
    out = torch.empty(
        (*first.shape[:2], *size), dtype=first.dtype, device=first.device, memory_format=layout
    )
    grid, arguments, constants = prepare(maps, coarse, out)
    given = out if weights is None else weights.contiguous()
    with torch.cuda.device_of(out):  # Triton runs on the current device, which may be another
        sum_kernel[grid](out, given, *arguments, WEIGHTED=weights is not None, **constants)
    return out


def _dots(maps: Sequence[Tensor], coarse: Sequence[bool], grad: Tensor) -> Tensor:
    """`Σ grad xᵢ` over all elements for each map, in float32: shape `(n,)`."""
    if memory_layout(grad) is None:
        grad = grad.contiguous()
    grid, arguments, constants = prepare(maps, coarse, grad)
    partial = torch.empty(len(maps), grid[0] * grid[1], dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        dot_kernel[grid](grad, partial, *arguments, WEIGHTED=True, **constants)
    return partial.sum(dim=1)


class _WeightedSum(torch.autograd.Function):
    """:func:`_forward` with its gradient: the weights' by a kernel that reads everything once, the
    maps' by plain operations, each of which has a whole map to write."""

    @staticmethod
    def forward(
        ctx: Any, coarse: List[bool], size: List[int], weights: Tensor | None, *maps: Tensor
    ) -> Tensor:
        ctx.coarse = coarse
        ctx.shapes = [x.shape for x in maps]
        learned = weights is not None and weights.requires_grad
        # without learned weights the gradient does not depend on the maps
        ctx.save_for_backward(weights, *(maps if learned else ()))
        return _forward(maps, coarse, size, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, *maps = ctx.saved_tensors
        of_weights = _dots(maps, ctx.coarse, grad).to(weights.dtype) if maps else None
        of_maps: List[Tensor | None] = []
        for i, (small, shape) in enumerate(zip(ctx.coarse, ctx.shapes)):
            here: Tensor | None = None
            if ctx.needs_input_grad[3 + i]:
                here = _add_up(grad, shape) if small else grad
                here = here if weights is None else here * weights[i]
            of_maps.append(here)
        return (None, None, of_weights, *of_maps)


def _add_up(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """What nearest upsampling gives back to a coarse map of this shape."""
    return torch.ops.aten.upsample_nearest2d_backward(grad, list(grad.shape[2:]), list(shape))
