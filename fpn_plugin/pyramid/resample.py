"""UPSAMPLE and DOWNSAMPLE: how a map changes level.

A resampler is built as `Resampler(channels, steps, norm=..., **arguments)` for a change of `steps`
levels (a factor of `2**steps`) and called with a map `(N, C, H, W)` and the size `[H', W']` that
the target level has, or None where no map of that level exists yet; then it gives exactly
`2**steps` times the size (up), or that fraction rounded up (down).
"""

from __future__ import annotations

from typing import Callable, List, Optional

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import conv_block
from fpn_plugin.registry import Registry

Size = Optional[List[int]]
UPSAMPLE: Registry[Callable[..., nn.Module]] = Registry("upsampler")
DOWNSAMPLE: Registry[Callable[..., nn.Module]] = Registry("downsampler")


class Resampler(nn.Module):
    """What all resamplers share: they are told the channels and the number of levels."""

    def __init__(self, channels: int, steps: int, norm: str = "") -> None:
        super().__init__()
        self.steps = steps
        self.factor = 2**steps


def fit(x: Tensor, size: Size) -> Tensor:
    """Make a downsampled map meet the target where a backbone rounds odd sizes down, not up as we
    do."""
    if size is not None and (x.shape[2] != size[0] or x.shape[3] != size[1]):
        x = F.interpolate(x, size=size, mode="nearest")
    return x


@UPSAMPLE.register("nearest")
class Nearest(Resampler):
    """Each value repeated."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        if size is None:
            return F.interpolate(x, scale_factor=float(self.factor), mode="nearest")
        return F.interpolate(x, size=size, mode="nearest")


@UPSAMPLE.register("bilinear")
class Bilinear(Resampler):
    """Linear in both directions, pixel centres aligned (`align_corners=False`)."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        if size is None:
            return F.interpolate(
                x, scale_factor=float(self.factor), mode="bilinear", align_corners=False
            )
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@DOWNSAMPLE.register("maxpool")
class MaxPool(Resampler):
    """Max pooling 3×3, stride 2, padding 1 on each side, once per level (EfficientDet,
    arXiv:1911.09070)."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        for _ in range(self.steps):
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        return fit(x, size)


@DOWNSAMPLE.register("maxpool_stride")
class MaxPoolStride(Resampler):
    """Max pooling with the kernel as large as the stride (NAS-FPN, arXiv:1904.07392)."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        x = F.max_pool2d(x, kernel_size=self.factor, stride=self.factor, ceil_mode=True)
        return fit(x, size)


@DOWNSAMPLE.register("subsample")
class Subsample(Resampler):
    """Every second value of each row and column per level (Detectron2's P6)."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return fit(F.max_pool2d(x, kernel_size=1, stride=self.factor), size)


@DOWNSAMPLE.register("conv")
class ConvDown(Resampler):
    """A 3×3 convolution with stride 2 per level, with norm and activation (PANet,
    arXiv:1803.01534)."""

    def __init__(
        self,
        channels: int,
        steps: int,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
    ) -> None:
        super().__init__(channels, steps)
        convs = [
            conv_block(channels, channels, 3, 2, norm, activation, order) for _ in range(steps)
        ]
        self.convs = nn.Sequential(*convs)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return fit(self.convs(x), size)
