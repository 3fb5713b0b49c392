"""DOWNSAMPLE: learned downsamplers that keep more of a map than a strided convolution does.

Each halves the size level by level, rounded up.
"""

from __future__ import annotations

from typing import List, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import at_least_float32, conv_block
from fpn_plugin.pyramid.fusion import check_positive
from fpn_plugin.pyramid.resample import DOWNSAMPLE, Resampler, Size, fit


class Halving(Resampler):
    """A downsampler that halves the size level by level.

    Args:
        layers: one per level.
    """

    def __init__(self, channels: int, steps: int, layers: Sequence[nn.Module]) -> None:
        super().__init__(channels, steps)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return fit(self.layers(x), size)


class _HalfConvHalfPool(nn.Module):
    """ADown for a factor of two."""

    def __init__(self, channels: int, norm: str, activation: str, order: str) -> None:
        super().__init__()
        half = channels // 2
        self.conv = conv_block(half, half, 3, 2, norm, activation, order)
        self.pooled = conv_block(half, half, 1, 1, norm, activation, order)

    def forward(self, x: Tensor) -> Tensor:
        # The average is one pixel smaller. Of an odd side that would leave half a side rounded
        # down, so the last row or column is repeated.
        x = F.pad(x, [0, x.shape[3] % 2, 0, x.shape[2] % 2], mode="replicate")
        first, second = F.avg_pool2d(x, kernel_size=2, stride=1).chunk(2, dim=1)
        second = F.max_pool2d(second, kernel_size=3, stride=2, padding=1)
        return torch.cat([self.conv(first), self.pooled(second)], dim=1)


@DOWNSAMPLE.register("adown")
class ADown(Halving):
    """Average pooling 2×2 with stride 1, then a 3×3 convolution with stride 2 on one half of the
    channels, and max pooling 3×3 with stride 2 and a 1×1 on the other (YOLOv9, arXiv:2402.13616).

    Where a side is odd, the last row or column is repeated; upstream rounds down.

    Raises:
        ValueError: if the channels are odd.
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        norm: str = "",
        activation: str = "silu",
        order: str = "conv-norm-act",
    ) -> None:
        if channels % 2:
            raise ValueError(f"adown halves its channels: {channels} is odd")
        layers = [_HalfConvHalfPool(channels, norm, activation, order) for _ in range(steps)]
        super().__init__(channels, steps, layers)


def _alternate(x: Tensor, dim: int, side: int) -> Tuple[Tensor, Tensor]:
    """The even and the odd rows or columns of a map that has one more than `side`.

    The one more, a zero, completes an odd side, and is not read of an even one. Thus both have the
    same size whatever the side, as `torch.export` needs it, without a branch.
    """
    x = x.transpose(dim, -1)
    even, odd = x[..., 0:side:2], x[..., 1 : side + 1 : 2]
    return even.transpose(dim, -1), odd.transpose(dim, -1)


class _SpaceToDepth(nn.Module):
    """SPD for a factor of two."""

    def __init__(self, channels: int, norm: str, activation: str, order: str) -> None:
        super().__init__()
        self.conv = conv_block(4 * channels, channels, 3, 1, norm, activation, order)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        places: List[Tensor] = []
        for columns in _alternate(F.pad(x, [0, 1, 0, 1]), 3, width):
            places += _alternate(columns, 2, height)
        return self.conv(torch.cat(places, dim=1))


@DOWNSAMPLE.register("spd")
class SpaceToDepth(Halving):
    """The four pixels of each 2×2 as channels, then a 3×3 convolution back to `C` (SPD-Conv,
    arXiv:2208.03641).

    The channels of each place stand together, in the order (even row, even column), (odd, even),
    (even, odd), (odd, odd): not that of torch's `pixel_unshuffle`. Zeros complete an odd side;
    upstream refuses it.
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        norm: str = "",
        activation: str = "silu",
        order: str = "conv-norm-act",
    ) -> None:
        layers = [_SpaceToDepth(channels, norm, activation, order) for _ in range(steps)]
        super().__init__(channels, steps, layers)


class _HaarTransform(nn.Module):
    """HWD for a factor of two."""

    def __init__(self, channels: int, norm: str, activation: str, order: str) -> None:
        super().__init__()
        self.conv = conv_block(4 * channels, channels, 1, 1, norm, activation, order, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        top, bottom = _alternate(F.pad(x / 2, [0, 1, 0, 1]), 2, height)
        low = _alternate(top + bottom, 3, width)
        high = _alternate(top - bottom, 3, width)
        bands = [low[0] + low[1], high[0] + high[1], low[0] - low[1], high[0] - high[1]]
        return self.conv(torch.cat(bands, dim=1))


@DOWNSAMPLE.register("haar")
class Haar(Halving):
    """The Haar wavelet transform of each 2×2, then a 1×1 convolution, which has a bias, from its
    four bands back to `C` (HWD, Xu et al., Pattern Recognition 143, 2023).

    The bands of `[[a, b], [c, d]]` are `(a+b+c+d)/2`, `(a+b-c-d)/2`, `(a-b+c-d)/2` and
    `(a-b-c+d)/2`. Zeros complete an odd side.
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        norm: str = "",
        activation: str = "relu",
        order: str = "conv-norm-act",
    ) -> None:
        layers = [_HaarTransform(channels, norm, activation, order) for _ in range(steps)]
        super().__init__(channels, steps, layers)


class _ReassembleDown(nn.Module):
    """CARAFE++'s downsampling by a factor of two."""

    def __init__(self, channels: int, compressed_channels: int) -> None:
        super().__init__()
        self.side = 5  # of the neighbourhood
        self.compress = conv_block(channels, compressed_channels, 1)
        self.encode = Conv2d(compressed_channels, self.side**2, 3, stride=2, padding=1)
        nn.init.normal_(self.encode.weight, std=0.001)  # near the average at first
        nn.init.zeros_(self.encode.bias)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2], x.shape[3]
        kernels = at_least_float32(self.encode(self.compress(x))).softmax(dim=1)  # (N, 25, H', W')
        padded = at_least_float32(F.pad(x, [self.side // 2] * 4))
        # tap by tap: an unfolded map would be 25 times as large, and autograd would save it
        out = torch.zeros_like(padded[:, :, 0:h:2, 0:w:2])
        for tap in range(self.side * self.side):
            top, left = tap // self.side, tap % self.side
            shifted = padded[:, :, top : top + h : 2, left : left + w : 2]
            out = torch.addcmul(out, shifted, kernels[:, tap : tap + 1])
        return out.to(x.dtype)


@DOWNSAMPLE.register("carafe_down")
class CarafeDown(Halving):
    """Every pixel is a weighted average of the 5×5 pixels around its source pixel, the one at twice
    its row and column, with weights predicted from the content and zero beyond the border
    (CARAFE++, arXiv:2012.04733). Per level: 1×1 → 64, 3×3 with stride 2 → 25, softmax over the 25,
    reassembly.

    Args:
        compressed_channels: of the map that the weights are predicted from.
    """

    def __init__(self, channels: int, steps: int, compressed_channels: int = 64) -> None:
        check_positive("compressed_channels", compressed_channels)
        layers = [_ReassembleDown(channels, compressed_channels) for _ in range(steps)]
        super().__init__(channels, steps, layers)
