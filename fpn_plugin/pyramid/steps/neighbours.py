"""Steps whose levels read their two neighbours, with weights that all levels share.

Shapes are `(N, C, H, W)`; maps go from high to low resolution.
"""

from __future__ import annotations

from typing import List, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import ACTIVATIONS, ModulatedKernel, at_least_float32
from fpn_plugin.pyramid.norms import GroupNorm, norm_layer
from fpn_plugin.pyramid.resample import _is_exporting
from fpn_plugin.pyramid.steps.base import STEPS


def _check(step: str, levels: Sequence[int], depth: int) -> None:
    """Refuse levels with a gap, a single one, and no depth."""
    if len(levels) < 2:
        raise ValueError(f"levels: {step} joins each level with the next, but gets {list(levels)}")
    for finer, coarser in zip(levels, levels[1:]):
        if coarser != finer + 1:
            raise ValueError(
                f"levels: {step} joins each level with the next, but {coarser} follows {finer} in"
                f" {list(levels)}; give it levels without a gap"
            )
    if type(depth) is not int or depth < 1:
        raise ValueError(f"depth: {depth!r} is not a whole number from 1 on")


def halvable(x: Tensor, like: Tensor) -> Tensor:
    """A map that a convolution with stride 2 turns into one of the size of `like`.

    It is as it comes unless a backbone rounds odd sizes down: then it loses a row or column.
    """
    height, width = 2 * like.shape[2], 2 * like.shape[3]
    if (
        _is_exporting()
        or (x.shape[2] + 1) // 2 != like.shape[2]
        or (x.shape[3] + 1) // 2 != like.shape[3]
    ):
        # a row or column of zeros that this may add has no effect
        x = F.pad(x, [0, width - x.shape[3], 0, height - x.shape[2]])
    return x


def upsampled(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, from corner to corner."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)


def _hard_sigmoid(x: Tensor) -> Tensor:
    """From 0 to 1. (torch's own has a gradient of only seven digits in float64.)"""
    return F.relu6(x + 3) / 6


class _SpatialAttention(ModulatedKernel):
    """One of a block's three kernels, with its norm."""

    def __init__(self, channels: int, stride: int, norm: str, groups: int, bias: bool) -> None:
        super().__init__(channels, channels, stride=stride, bias=bias)
        self.norm = norm_layer(norm, channels) or GroupNorm(groups, channels)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return self.norm(self.convolve(x, offset, mask))


class _DynamicBlock(nn.Module):
    """One block of :class:`DyHead`; the arguments are the same."""

    def __init__(
        self, channels: int, norm: str, groups: int, bias: bool, published_order: bool
    ) -> None:
        super().__init__()
        self.published_order = published_order
        self.offset = Conv2d(channels, 27, 3, padding=1)
        self.finer = _SpatialAttention(channels, 2, norm, groups, bias)
        self.same = _SpatialAttention(channels, 1, norm, groups, bias)
        self.coarser = _SpatialAttention(channels, 1, norm, groups, bias)
        self.scale = Conv2d(channels, 1, 1)
        self.squeeze = Conv2d(channels, channels // 4, 1)
        self.excite = Conv2d(channels // 4, 4 * channels, 1)
        for conv in (self.offset, self.scale, self.squeeze, self.excite):
            nn.init.normal_(conv.weight, std=0.0 if conv is self.offset else 0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: List[Tensor]) -> List[Tensor]:
        outputs: List[Tensor] = []
        for i, x in enumerate(maps):
            # (N, 27, H, W): the (y, x) offsets of the nine taps, then their masks
            offset, mask = torch.split(at_least_float32(self.offset(x)), [18, 9], dim=1)
            mask = mask.sigmoid()
            total, count = self._scaled(self.same(x, offset, mask)), 1
            if i > 0:
                finer = self.finer(halvable(maps[i - 1], x), offset, mask)
                total, count = total + self._scaled(finer), count + 1
            if i + 1 < len(maps):
                coarser = self._from_coarser(maps[i + 1], x, offset, mask)
                total, count = total + self._scaled(coarser), count + 1
            outputs.append(self._task_attention(total / count))
        return outputs

    def _from_coarser(self, x: Tensor, like: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        if not self.published_order:
            return self.coarser(upsampled(x, like), offset, mask)
        # the numbers that the published kernel reads, which takes the offsets for ones of x's size
        count, size = x.shape[2] * x.shape[3], [x.shape[0], -1, x.shape[2], x.shape[3]]
        offset = offset.flatten(1)[:, : 18 * count].reshape(size)
        mask = mask.flatten(1)[:, : 9 * count].reshape(size)
        return upsampled(self.coarser(x, offset, mask), like)

    def _scaled(self, x: Tensor) -> Tensor:
        """The map times a number of each image, from 0.5 to 1."""
        return x * _hard_sigmoid(F.relu(self.scale(x.mean(dim=(2, 3), keepdim=True))))

    def _task_attention(self, x: Tensor) -> Tensor:
        """The larger of two linear functions of each channel, which depend on the image."""
        y = F.relu(self.squeeze(x.mean(dim=(2, 3), keepdim=True)))
        y = _hard_sigmoid(self.excite(y)) - 0.5  # (N, 4C, 1, 1)
        slope1, shift1, slope2, shift2 = torch.chunk(y, 4, dim=1)
        return torch.maximum((2 * slope1 + 1) * x + shift1, 2 * slope2 * x + shift2)


@STEPS.register("dyhead")
class DyHead(nn.Module):
    """Dynamic head (arXiv:2106.08322): blocks of attention over places, scales and channels.

    For each level's map x a block predicts nine offsets and masks, and with these convolves x, the
    finer map with stride 2, and the coarser one upsampled, by three modulated deformable kernels,
    each followed by a norm. Of the two or three results z it takes the mean of
    `z · hs(ReLU(w · GAP(z) + b))`, with `hs(v) = min(max(v + 3, 0), 6) / 6`. Its result is the
    larger of two linear functions of each channel, `(2a₁ + 1) s + b₁` and `2a₂ s + b₂`, where the
    a and b are `hs(FC(ReLU(FC(GAP(s))))) - ½`. All levels share all weights.

    Half precision is convolved in float32. It takes the place of the convolutions in a one-stage
    head: the paper's heads have none of their own, Detectron2's one at least.

    Args:
        levels: consecutive ones.
        norm: after each kernel. "" for the paper's, a group norm of `groups` groups.
        depth: the number of blocks.
        bias: of the kernels, as in the authors' code; MMDetection's have none.
        published_order: convolve the coarser map at its own size, and upsample after that, by
            offsets and masks as the authors' kernel misreads them (github.com/microsoft/DynamicHead
            issue 25). Only for weights that were trained so.

    Raises:
        ValueError: naming the argument, if the levels have a gap, the groups do not divide the
            channels, or there are fewer than four channels or one block.
    """

    def __init__(
        self,
        channels: int,
        levels: Sequence[int],
        norm: str = "",
        depth: int = 6,
        groups: int = 16,
        bias: bool = False,
        published_order: bool = False,
    ) -> None:
        super().__init__()
        _check("dyhead", levels, depth)
        if type(groups) is not int or groups < 1 or channels % groups:
            raise ValueError(f"groups: {groups!r} groups do not divide {channels} channels")
        if channels < 4:
            raise ValueError(f"dyhead takes a quarter of its channels, and has {channels}")
        self.blocks = nn.ModuleList(
            _DynamicBlock(channels, norm, groups, bias, published_order) for _ in range(depth)
        )

    def forward(self, maps: List[Tensor]) -> List[Tensor]:
        for block in self.blocks:
            maps = block(maps)
        return maps


class _PyramidKernel(ModulatedKernel):
    """A 3×3 kernel; deformable, it predicts its offsets, from zeros on, but for the finest map."""

    def __init__(self, channels: int, stride: int, deformable: bool) -> None:
        super().__init__(channels, channels, stride=stride)
        nn.init.normal_(self.weight, std=0.01)
        self.offset = Conv2d(channels, 18, 3, stride=stride, padding=1) if deformable else None
        if self.offset is not None:
            nn.init.zeros_(self.offset.weight)
            nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor, finest: bool) -> Tensor:
        """Convolve.

        Args:
            finest: whether the result is part of the finest map.
        """
        if self.offset is None or finest:
            stride = (self.stride, self.stride)
            return F.conv2d(x, self.weight, self.bias, stride, padding=(1, 1))
        return self.convolve(x, self.offset(x))


class _PyramidConv(nn.Module):
    """One convolution of :class:`SEPC`."""

    def __init__(self, channels: int, norm: str, activation: str, deformable: bool) -> None:
        super().__init__()
        self.finer = _PyramidKernel(channels, 2, deformable)
        self.same = _PyramidKernel(channels, 1, deformable)
        self.coarser = _PyramidKernel(channels, 1, deformable)
        self.norm = norm_layer(norm, channels)
        self.activation = ACTIVATIONS.get(activation or "relu", "activation")()

    def forward(self, maps: List[Tensor]) -> List[Tensor]:
        sums: List[Tensor] = []
        for i, x in enumerate(maps):
            total = self.same(x, i == 0)
            if i > 0:
                total = total + self.finer(halvable(maps[i - 1], x), i == 0)
            if i + 1 < len(maps):
                total = total + upsampled(self.coarser(maps[i + 1], i == 0), x)
            sums.append(total)
        return [self.activation(x) for x in self._normalized(sums)]

    def _normalized(self, maps: List[Tensor]) -> List[Tensor]:
        """All levels by the same statistics."""
        if self.norm is None:
            return maps
        pixels = self.norm(torch.cat([x.flatten(2) for x in maps], dim=2).unsqueeze(2))
        parts = torch.split(pixels.squeeze(2), [x.shape[2] * x.shape[3] for x in maps], dim=2)
        return [part.reshape(x.shape) for part, x in zip(parts, maps)]


@STEPS.register("sepc")
class SEPC(nn.Module):
    """Scale-equalizing pyramid convolution (arXiv:2005.03101), as its authors' code has it.

    A convolution over levels and places: each level gets the sum of three 3×3 kernels, over its own
    map, over the finer one with stride 2, and over the coarser one, upsampled after it. A norm over
    all levels together follows ("integrated batch norm"), and the activation.

    The paper's two convolutions at the end, one for each head, are not in it.

    Args:
        levels: consecutive ones.
        activation: "" for the paper's, ReLU.
        depth: the number of convolutions one after another.
        deformable: whether the kernels of all levels but the finest move their taps by offsets that
            they predict (the paper's SEPC; without, its PConv).

    Raises:
        ValueError: naming the argument, if the levels have a gap or `depth` is less than 1.
    """

    def __init__(
        self,
        channels: int,
        levels: Sequence[int],
        norm: str = "",
        activation: str = "",
        depth: int = 4,
        deformable: bool = False,
    ) -> None:
        super().__init__()
        _check("sepc", levels, depth)
        self.convs = nn.ModuleList(
            _PyramidConv(channels, norm, activation, deformable) for _ in range(depth)
        )

    def forward(self, maps: List[Tensor]) -> List[Tensor]:
        for conv in self.convs:
            maps = conv(maps)
        return maps
