"""UPSAMPLE and DOWNSAMPLE: how a map changes level.

A resampler is built as `Resampler(channels, steps, norm=..., **arguments)` for a change of `steps`
levels (a factor of `2**steps`) and called with a map `(N, C, H, W)` and the size `[H', W']` that
the target level has, or None where no map of that level exists yet; then it gives exactly
`2**steps` times the size (up), or that fraction rounded up (down).

A class with `guided = True` is called with a third argument: the node's first input that is at the
node's level already.
"""

from __future__ import annotations

from typing import Callable, List, Optional

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from fpn_plugin.compat import is_exporting
from fpn_plugin.pyramid.blocks import (
    ACTIVATIONS,
    ModulatedConv,
    at_least_float32,
    conv_block,
)
from fpn_plugin.pyramid.norms import norm_layer
from fpn_plugin.pyramid.reassemble import reassemble
from fpn_plugin.pyramid.resolve import halvings
from fpn_plugin.registry import Registry

Size = Optional[List[int]]
UPSAMPLE: Registry[Callable[..., nn.Module]] = Registry("upsampler")
DOWNSAMPLE: Registry[Callable[..., nn.Module]] = Registry("downsampler")


class Resampler(nn.Module):
    """Base class of all resamplers.

    Attributes:
        guided: whether `forward` takes a guide as its third argument.
        repeats: whether it only repeats values, which a fusion with `takes_coarse` does itself.
    """

    guided = False
    repeats = False

    def __init__(self, channels: int, steps: int, norm: str = "") -> None:
        super().__init__()
        self.steps = steps
        self.factor = 2**steps


def _is_exporting() -> bool:
    """Whether `torch.export` is running.

    It refuses graphs whose branches or slices depend on a property of odd sizes that it cannot
    prove, so the same result is then computed without a branch.
    """
    if not torch.jit.is_scripting():  # TorchScript does not know is_exporting
        return is_exporting()
    return False


def _is_recorded() -> bool:
    """Whether `torch.export` or `torch.jit.trace`, which keeps one branch for all sizes, runs."""
    if not torch.jit.is_scripting():
        return is_exporting() or torch.jit.is_tracing()
    return False


def fit(x: Tensor, size: Size) -> Tensor:
    """Resize a downsampled map to the target's size.

    They differ where a backbone rounds odd sizes down, while resamplers round up.
    """
    if size is not None and (_is_exporting() or x.shape[2] != size[0] or x.shape[3] != size[1]):
        x = F.interpolate(x, size=size, mode="nearest")
    return x


def _pad_to_whole_windows(x: Tensor, side: int, value: float) -> Tensor:
    return F.pad(x, [0, -x.shape[3] % side, 0, -x.shape[2] % side], value=value)


def crop(x: Tensor, size: Size) -> Tensor:
    """Crop an upsampled map to the target's size, which is smaller if a side is odd.

    Where a backbone rounds odd sizes down the target is larger, and the last row and column are
    repeated.
    """
    if size is None:
        return x
    if _is_recorded() or size[0] > x.shape[2] or size[1] > x.shape[3]:
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
    """An upsampler that doubles the size level by level and crops to an odd target.

    Args:
        layers: run one after another; together they double the size `steps` times.
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
        reduce_above: with `shrink`, a map of more channels than this first passes a 1×1 that halves
            them, with norm and ReLU (LW-DETR, arXiv:2406.03459: 512); 0 for none such.

    Raises:
        ValueError: if the channels cannot be halved that often, or `reduce_above` is given without
            `shrink`.
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        norm: str = "",
        activation: str = "",
        shrink: bool = False,
        reduce_above: int = 0,
    ) -> None:
        if type(reduce_above) is not int or reduce_above < 0 or (reduce_above and not shrink):
            raise ValueError(
                f"reduce_above: {reduce_above!r}; give a number of channels, with shrink=True, or 0"
            )
        times = halvings({"shrink": shrink, "reduce_above": reduce_above}, channels, steps)
        if channels % 2**times:
            raise ValueError(f"shrink: {channels} channels cannot be halved {times} times")
        layers: List[nn.Module] = []
        if times > steps:
            layers.append(conv_block(channels, channels // 2, 1, norm=norm, activation="relu"))
            channels //= 2
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


class _Reassemble(nn.Module):
    """CARAFE for a factor of two."""

    def __init__(self, channels: int, compressed_channels: int) -> None:
        super().__init__()
        self.side = 5  # of the neighbourhood
        self.compress = conv_block(channels, compressed_channels, 1)
        self.encode = Conv2d(compressed_channels, 4 * self.side**2, 3, padding=1)
        nn.init.normal_(self.encode.weight, std=0.001)  # near the average at first
        nn.init.zeros_(self.encode.bias)

    def forward(self, x: Tensor) -> Tensor:
        kernels = F.pixel_shuffle(self.encode(self.compress(x)), 2)  # (N, 25, 2H, 2W)
        return reassemble(x, at_least_float32(kernels).softmax(dim=1), self.side, factor=2)


@UPSAMPLE.register("carafe")
class Carafe(Doubling):
    """Every pixel is a weighted average of the 5×5 source pixels around it, zero beyond the border,
    with weights predicted from the content (CARAFE, arXiv:1905.02188). Per level: 1×1 → 64,
    3×3 → 25·4, pixel shuffle, softmax over the 25, reassembly.

    Args:
        compressed_channels: of the map that the weights are predicted from.
    """

    def __init__(self, channels: int, steps: int, compressed_channels: int = 64) -> None:
        super().__init__(
            channels, steps, [_Reassemble(channels, compressed_channels) for _ in range(steps)]
        )


def sample_at_offset(x: Tensor, offset: Tensor, groups: int) -> Tensor:
    """Bilinear interpolation at the pixels of a map twice as large as a source map, moved by an
    offset; the outermost values go on beyond the border.

    Args:
        x: the source map, or another one of the same area.
        offset: shape `(N, 2 · groups, 2h, 2w)` for a source map of `h × w`, in its pixels: to the
            right for each group of the channels, then down.

    Returns:
        shape `(N, C, 2h, 2w)`.
    """
    n, c = x.shape[0], x.shape[1]
    height, width = offset.shape[2], offset.shape[3]
    offset = offset.reshape(n, 2, groups, height, width)
    # the positions of bilinear interpolation, in source pixels
    columns = (torch.arange(width, dtype=offset.dtype, device=x.device) + 0.5) / 2
    rows = (torch.arange(height, dtype=offset.dtype, device=x.device) + 0.5) / 2
    # grid_sample's coordinates go from -1 to 1
    x_position = (offset[:, 0] + columns) * 2 / (width // 2) - 1
    y_position = (offset[:, 1] + rows.unsqueeze(1)) * 2 / (height // 2) - 1
    grid = torch.stack([x_position, y_position], dim=-1).flatten(0, 1)  # (N·groups, 2h, 2w, 2)
    parts = at_least_float32(x).reshape(n * groups, c // groups, x.shape[2], x.shape[3])
    sampled = F.grid_sample(
        parts, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled.reshape(n, c, height, width).to(x.dtype)


class _PointSample(nn.Module):
    """DySample for a factor of two."""

    def __init__(self, channels: int, groups: int, dynamic_scope: bool) -> None:
        super().__init__()
        self.groups = groups
        self.offset = Conv2d(channels, 2 * groups * 4, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)
        self.scope = Conv2d(channels, 2 * groups * 4, 1, bias=False) if dynamic_scope else None
        if self.scope is not None:
            nn.init.zeros_(self.scope.weight)

    def forward(self, x: Tensor) -> Tensor:
        offset = at_least_float32(self.offset(x))
        if self.scope is None:
            offset = offset * 0.25
        else:
            offset = offset * at_least_float32(self.scope(x)).sigmoid() * 0.5
        return sample_at_offset(x, F.pixel_shuffle(offset, 2), self.groups)


@UPSAMPLE.register("dysample")
class DySample(Doubling):
    """Bilinear interpolation at positions moved by `0.25 · 1×1(x)` source pixels, per level
    (DySample, arXiv:2308.15085, its style 'lp').

    Args:
        groups: of the channels, each with its own positions.
        dynamic_scope: whether they move by `0.5 · 1×1(x) · σ(1×1(x))` instead (DySample+). The
            second 1×1 has no bias and starts at zero, and so with the same movement.

    Raises:
        ValueError: if the groups do not divide the channels.
    """

    def __init__(
        self, channels: int, steps: int, groups: int = 4, dynamic_scope: bool = False
    ) -> None:
        if groups < 1 or channels % groups:
            raise ValueError(f"groups: {groups} groups do not divide {channels} channels")
        if type(dynamic_scope) is not bool:
            raise ValueError(f"dynamic_scope {dynamic_scope!r} is not True or False")
        layers: List[nn.Module] = []
        for _ in range(steps):
            layers.append(_PointSample(channels, groups, dynamic_scope))
        super().__init__(channels, steps, layers)


@UPSAMPLE.register("fam")
class FeatureAlign(Resampler):
    """Bilinear interpolation, then a deformable convolution that aligns the result with the finer
    map (FaPN, arXiv:2108.07058): `ReLU(DCN(up, 1×1(concat(lateral, 2 · up))))`.

    Args:
        norm: of the 1×1 that offsets and masks are predicted from.
        groups: of the channels, each with its own offsets and masks.

    Raises:
        ValueError: if the groups do not divide the channels.
    """

    guided = True

    def __init__(self, channels: int, steps: int, norm: str = "", groups: int = 8) -> None:
        super().__init__(channels, steps)
        self.difference = conv_block(2 * channels, channels, 1, norm=norm, bias=False)
        self.align = ModulatedConv(channels, channels, channels, groups)

    def forward(self, x: Tensor, size: Size, guide: Tensor) -> Tensor:
        """Upsample `x` to the size of `guide`, a map of the same channels; `size` is not used."""
        up = F.interpolate(x, size=guide.shape[2:], mode="bilinear", align_corners=False)
        difference = self.difference(torch.cat([guide, 2 * up], dim=1))
        return F.relu(self.align(up, difference))


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


@DOWNSAMPLE.register("scdown")
class SpatialChannelDown(Resampler):
    """Per level a 1×1 convolution, then a depthwise 3×3 with stride 2, a norm after each (YOLOv10,
    arXiv:2405.14458; without activation as in D-FINE, arXiv:2410.13842).

    Args:
        activation: after the 1×1 ("silu" in YOLOv10), or before it in the order "act-conv-norm".
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
    ) -> None:
        super().__init__(channels, steps)
        layers: List[nn.Module] = []
        for _ in range(steps):
            layers.append(conv_block(channels, channels, 1, 1, norm, activation, order))
            layers.append(conv_block(channels, channels, 3, 2, norm, groups=channels))
        self.convs = nn.Sequential(*layers)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return fit(self.convs(x), size)
