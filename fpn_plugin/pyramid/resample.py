"""UPSAMPLE and DOWNSAMPLE: how a map changes level.

A resampler is built as `Resampler(channels, steps, norm=..., **arguments)` for a change of `steps`
levels (a factor of `2**steps`) and called with a map `(N, C, H, W)` and the size `[H', W']` that
the target level has, or None where no map of that level exists yet; then it gives exactly
`2**steps` times the size (up), or that fraction rounded up (down).

A class with `guided = True` is called with a third argument: the node's first input that is at the
node's level already. The upsamplers whose result depends on the content are in
`resample_learned.py`.
"""

from __future__ import annotations

from typing import Callable, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import ACTIVATIONS, conv_block, norm_layer
from fpn_plugin.registry import Registry

Size = Optional[List[int]]
UPSAMPLE: Registry[Callable[..., nn.Module]] = Registry("upsampler")
DOWNSAMPLE: Registry[Callable[..., nn.Module]] = Registry("downsampler")


class Resampler(nn.Module):
    """What all resamplers share: they are told the channels and the number of levels.

    Attributes:
        guided: whether `forward` takes a guide as its third argument.
        repeats: whether all it does is to repeat values, which a fusion can do by itself.
    """

    guided = False
    repeats = False

    def __init__(self, channels: int, steps: int, norm: str = "") -> None:
        super().__init__()
        self.steps = steps
        self.factor = 2**steps


def _is_exporting() -> bool:
    """Whether `torch.export` is at work. It refuses a graph whose branches or slices depend on a
    rule about odd sizes that it cannot prove, so then the same is computed without asking."""
    if not torch.jit.is_scripting():  # which does not know the other question
        return torch.compiler.is_exporting()
    return False


def fit(x: Tensor, size: Size) -> Tensor:
    """Make a map meet the target where a backbone rounds odd sizes down, not up as we do."""
    if size is not None and (_is_exporting() or x.shape[2] != size[0] or x.shape[3] != size[1]):
        x = F.interpolate(x, size=size, mode="nearest")
    return x


def _pad_to_whole_windows(x: Tensor, side: int, value: float) -> Tensor:
    return F.pad(x, [0, -x.shape[3] % side, 0, -x.shape[2] % side], value=value)


def crop(x: Tensor, size: Size) -> Tensor:
    """Cut an upsampled map to the target, which is smaller by a pixel or more if its side is odd.

    Where a backbone rounds odd sizes down, and the target is larger, the last row and column are
    repeated.
    """
    if size is None:
        return x
    if _is_exporting() or size[0] > x.shape[2] or size[1] > x.shape[3]:
        rows = torch.arange(size[0], device=x.device).clamp(max=x.shape[2] - 1)
        columns = torch.arange(size[1], device=x.device).clamp(max=x.shape[3] - 1)
        return x.index_select(2, rows).index_select(3, columns)
    return x[:, :, : size[0], : size[1]]


@UPSAMPLE.register("nearest")
class Nearest(Resampler):
    """Each value repeated."""

    repeats = True

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


class Doubling(Resampler):
    """An upsampler that doubles the size level by level, and is cropped to an odd target.

    Args:
        layers: what runs in turn; together they double the size `steps` times.
    """

    def __init__(self, channels: int, steps: int, layers: List[nn.Module]) -> None:
        super().__init__(channels, steps)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return crop(self.layers(x), size)


@UPSAMPLE.register("deconv")
class Deconv(Doubling):
    """A transposed convolution 2×2, stride 2, per level; norm and activation between two of them
    (ViTDet's, arXiv:2203.16527).

    Args:
        shrink: whether each level halves the channels, as in ViTDet.

    Raises:
        ValueError: if the channels cannot be halved that often.
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        norm: str = "",
        activation: str = "",
        shrink: bool = False,
    ) -> None:
        if shrink and channels % 2**steps:
            raise ValueError(f"shrink: {channels} channels cannot be halved {steps} times")
        layers: List[nn.Module] = []
        for step in range(steps):
            if step:
                layers += [layer for layer in (norm_layer(norm, channels),) if layer is not None]
                layers.append(ACTIVATIONS.get(activation, "activation")())
            narrow = channels // 2 if shrink else channels
            conv = nn.ConvTranspose2d(channels, narrow, 2, stride=2)
            # every pixel of the result sees one tap of each channel, so the fan-in is `channels`
            nn.init.uniform_(conv.weight, -((3 / channels) ** 0.5), (3 / channels) ** 0.5)
            assert conv.bias is not None  # for mypy: bias=True is the default
            nn.init.zeros_(conv.bias)
            layers.append(conv)
            channels = narrow
        super().__init__(channels, steps, layers)


@UPSAMPLE.register("pixel_shuffle")
class PixelShuffle(Doubling):
    """Per level a 1×1 convolution to `4 C` channels, which become 2×2 pixels (ESPCN,
    arXiv:1609.05158)."""

    def __init__(self, channels: int, steps: int) -> None:
        layers: List[nn.Module] = []
        for _ in range(steps):
            layers += [conv_block(channels, 4 * channels, 1), nn.PixelShuffle(2)]
        super().__init__(channels, steps, layers)


@DOWNSAMPLE.register("maxpool")
class MaxPool(Resampler):
    """Max pooling 3×3, stride 2, padding 1 on each side, once per level (EfficientDet,
    arXiv:1911.09070)."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        for _ in range(self.steps):
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        return fit(x, size)


@DOWNSAMPLE.register("maxpool_same")
class MaxPoolSame(Resampler):
    """Max pooling 3×3, stride 2, once per level, padded as TensorFlow does for "same": the output
    is half the size rounded up, and of the padding that this takes the larger half comes after the
    map (EfficientDet's own release)."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        for _ in range(self.steps):
            # an even side takes one pixel, after it; an odd side one before and one after
            padding = [x.shape[3] % 2, 1, x.shape[2] % 2, 1]
            x = F.max_pool2d(F.pad(x, padding, value=float("-inf")), kernel_size=3, stride=2)
        return fit(x, size)


@DOWNSAMPLE.register("maxpool_stride")
class MaxPoolStride(Resampler):
    """Max pooling with the kernel as large as the stride (NAS-FPN, arXiv:1904.07392)."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        if _is_exporting():
            x = _pad_to_whole_windows(x, self.factor, float("-inf"))
            return fit(F.max_pool2d(x, self.factor, self.factor), size)
        x = F.max_pool2d(x, kernel_size=self.factor, stride=self.factor, ceil_mode=True)
        return fit(x, size)


@DOWNSAMPLE.register("avgpool")
class AvgPool(Resampler):
    """Average pooling with the kernel as large as the stride (HRFPN, arXiv:1904.04514). A window
    that sticks out averages what is inside."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        if _is_exporting():
            share = _pad_to_whole_windows(torch.ones_like(x), self.factor, 0.0)
            x = F.avg_pool2d(_pad_to_whole_windows(x, self.factor, 0.0), self.factor)
            return fit(x / F.avg_pool2d(share, self.factor), size)
        x = F.avg_pool2d(x, kernel_size=self.factor, stride=self.factor, ceil_mode=True)
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


# it enters its upsamplers in UPSAMPLE; last, because it needs what is above
from fpn_plugin.pyramid import resample_learned  # noqa: E402,F401
