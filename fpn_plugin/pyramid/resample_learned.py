"""Upsamplers whose result depends on the content, by plain torch and torchvision operators.

Shapes are `(N, C, H, W)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import at_least_float32, conv_block
from fpn_plugin.pyramid.deformable import ModulatedConv
from fpn_plugin.pyramid.resample import UPSAMPLE, Doubling, Resampler, Size


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
        n, c, h, w = x.shape
        # The kernels of the 2×2 pixels of a cell lie side by side, and all four look at the same
        # neighbourhood: so the map is reassembled at its own size, and shuffled last.
        kernels = self.encode(self.compress(x)).reshape(n, -1, 4, h, w)
        kernels = at_least_float32(kernels).softmax(dim=1)
        padded = F.pad(x, [self.side // 2] * 4)
        # Tap by tap, because an unfolded map would be 25 times as large, and autograd would keep it
        out = torch.zeros([n, c, 4, h, w], dtype=kernels.dtype, device=x.device)
        for tap in range(self.side * self.side):
            top, left = tap // self.side, tap % self.side
            shifted = padded[:, :, top : top + h, left : left + w].unsqueeze(2)  # (N, C, 1, H, W)
            out = out + shifted * kernels[:, tap].unsqueeze(1)
        return F.pixel_shuffle(out.to(x.dtype).reshape(n, c * 4, h, w), 2)


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


class _PointSample(nn.Module):
    """DySample for a factor of two."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.offset = Conv2d(channels, 2 * groups * 4, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        offset = at_least_float32(self.offset(x)) * 0.25
        offset = F.pixel_shuffle(offset, 2).reshape(n, 2, self.groups, 2 * h, 2 * w)
        # in source pixels, where bilinear interpolation would look
        columns = (torch.arange(2 * w, dtype=offset.dtype, device=x.device) + 0.5) / 2
        rows = (torch.arange(2 * h, dtype=offset.dtype, device=x.device) + 0.5) / 2
        across = (offset[:, 0] + columns) * 2 / w - 1  # from -1 to 1 over the map
        down = (offset[:, 1] + rows.unsqueeze(1)) * 2 / h - 1
        grid = torch.stack([across, down], dim=-1).flatten(0, 1)  # (N·groups, 2H, 2W, 2)
        parts = at_least_float32(x).reshape(n * self.groups, c // self.groups, h, w)
        sampled = F.grid_sample(
            parts, grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return sampled.reshape(n, c, 2 * h, 2 * w).to(x.dtype)


@UPSAMPLE.register("dysample")
class DySample(Doubling):
    """Bilinear interpolation at positions moved by `0.25 · 1×1(x)` source pixels, per level
    (DySample, arXiv:2308.15085, its style 'lp' with a static scope).

    Args:
        groups: parts of the channels, each with positions of its own.

    Raises:
        ValueError: if the groups do not divide the channels.
    """

    def __init__(self, channels: int, steps: int, groups: int = 4) -> None:
        if groups < 1 or channels % groups:
            raise ValueError(f"groups: {groups} groups do not divide {channels} channels")
        super().__init__(channels, steps, [_PointSample(channels, groups) for _ in range(steps)])


@UPSAMPLE.register("fam")
class FeatureAlign(Resampler):
    """Bilinear interpolation, then a deformable convolution that moves the map to where the finer
    one has its edges (FaPN, arXiv:2108.07058): `ReLU(DCN(up, 1×1(concat(lateral, 2 · up))))`.

    Args:
        norm: of the 1×1 that offsets and masks are predicted from.
        groups: parts of the channels, each with offsets and masks of its own.

    Raises:
        ValueError: if the groups do not divide the channels.
    """

    guided = True

    def __init__(self, channels: int, steps: int, norm: str = "", groups: int = 8) -> None:
        super().__init__(channels, steps)
        self.difference = conv_block(2 * channels, channels, 1, norm=norm, bias=False)
        self.align = ModulatedConv(channels, channels, channels, groups)

    def forward(self, x: Tensor, size: Size, guide: Tensor) -> Tensor:
        """Bring `x` to the size of `guide`, a map of the same channels, whatever `size` says."""
        up = F.interpolate(x, size=guide.shape[2:], mode="bilinear", align_corners=False)
        difference = self.difference(torch.cat([guide, 2 * up], dim=1))
        return F.relu(self.align(up, difference))
