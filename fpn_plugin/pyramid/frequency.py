"""The fusion `freq`: frequency-aware feature fusion. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import math
from typing import List, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import at_least_float32, conv_block
from fpn_plugin.pyramid.fusion import FUSIONS, Fusion, Size, check_positive
from fpn_plugin.pyramid.norms import GroupNorm
from fpn_plugin.pyramid.reassemble import BORDERS, reassemble
from fpn_plugin.pyramid.resample import crop, sample_at_offset


@FUSIONS.register("freq")
class FrequencyAware(Fusion):
    """The coarse map, enlarged by an adaptive low pass, plus the fine one, sharpened by an adaptive
    high pass: `up + 2 · fine − blur(fine)`. Each pixel has kernels of its own, which are predicted
    from both maps (FreqFusion, arXiv:2408.12879).

    With `f = 1×1→c(fine)`, `r = 1×1→c(coarse)`, a 3×3 convolution `low` to 25 channels and one
    `high` to 9, each used on both maps, and `blur(x, z)`, at each pixel the average of the 5×5 or
    3×3 pixels around its source pixel by the weights `softmax(z) · Hamming window`, scaled to the
    sum 1:

    1. `zₕ = high(f)`; `f ← 2f − blur(f, zₕ)`;
    2. `zₗ = low(f)`; `zₗ ← zₗ + blur(low(r), zₗ)`; `zₕ ← zₕ + blur(high(r), zₗ)`;
    3. `up = blur(coarse, zₗ)`, which is sampled again at positions moved by an offset predicted
       from how similar the pixels of `f`, and of `r`, are to their neighbours;
    4. the result `up + 2 · fine − blur(fine, zₕ)`.

    The maps are of neighbouring levels. The fusion enlarges the coarser one itself, so that must
    come by the upsampler `nearest`. An odd side of the fine map is completed by its last row or
    column.

    Args:
        levels: the level that each map comes from; empty if the second is the coarser.
        resample: whether `up` is sampled again. The authors' detectors do so; the default of their
            module is not to.
        border: what the kernels see beyond a map's border: "zero", as the authors' published
            weights, or "reflect", as their later module.
        compressed_channels: `c`, of the maps that kernels and offsets are predicted from.
        groups: of the channels, each with its own offsets.

    Raises:
        ValueError: if the levels are not neighbours, or an argument has none of its values.
    """

    arity = 2
    input_dependent = True
    takes_coarse = True
    needs_coarse = True

    def __init__(
        self,
        channels: int,
        count: int,
        levels: Sequence[int] = (),
        resample: bool = True,
        border: str = "zero",
        compressed_channels: int = 64,
        groups: int = 4,
    ) -> None:
        super().__init__(channels, count)
        if levels and abs(levels[0] - levels[1]) != 1:
            raise ValueError(
                f"freq fuses maps of two neighbouring levels, but its inputs are of levels"
                f" {levels[0]} and {levels[1]}"
            )
        if border not in BORDERS:
            raise ValueError(f"border {border!r} is unknown; choose from {', '.join(BORDERS)}")
        if not isinstance(resample, bool):
            raise ValueError(f"resample {resample!r} is neither True nor False")
        check_positive("compressed_channels", compressed_channels)
        check_positive("groups", groups)
        if channels % groups:
            raise ValueError(f"groups: {groups} groups do not divide {channels} channels")
        self.border = border
        # of the neighbourhoods that a pixel of the coarse, and of the fine map is an average of
        self.low_side, self.high_side = 5, 3
        self.coarser = 0 if levels and levels[0] > levels[1] else 1
        self.compress_fine = conv_block(channels, compressed_channels, 1)
        self.compress_coarse = conv_block(channels, compressed_channels, 1)
        self.low = _predictor(compressed_channels, self.low_side**2)
        self.high = _predictor(compressed_channels, self.high_side**2)
        self.sampler = _Sampler(compressed_channels, groups) if resample else None

    def forward(self, maps: List[Tensor], size: Size = None) -> Tensor:
        """Fuse a map with one of half its size, rounded up or down; `size` is not used."""
        x, coarse = maps[1 - self.coarser], maps[self.coarser]
        half = [(x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2]
        fine, coarse = crop(x, [2 * half[0], 2 * half[1]]), crop(coarse, half)
        f, r = self.compress_fine(fine), self.compress_coarse(coarse)
        high = at_least_float32(self.high(f))
        f = 2 * f - self._blur(f, _kernels(high, self.high_side))
        low = at_least_float32(self.low(f))
        low = low + self._enlarge(at_least_float32(self.low(r)), _kernels(low, self.low_side))
        enlarging = _kernels(low, self.low_side)
        high = high + self._enlarge(at_least_float32(self.high(r)), enlarging)
        up = self._enlarge(coarse, enlarging)
        if self.sampler is not None:
            up = self.sampler(up, f, r)
        sharp = 2 * fine - self._blur(fine, _kernels(high, self.high_side))
        return crop(sharp + up, [x.shape[2], x.shape[3]])

    def _blur(self, x: Tensor, kernels: Tensor) -> Tensor:
        return reassemble(x, kernels, self.high_side, 1, self.border)

    def _enlarge(self, x: Tensor, kernels: Tensor) -> Tensor:
        return reassemble(x, kernels, self.low_side, 2, self.border)


def _predictor(in_channels: int, out_channels: int, std: float = 0.001) -> Conv2d:
    """A 3×3 convolution whose results are near zero at first."""
    conv = Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.normal_(conv.weight, std=std)
    nn.init.zeros_(conv.bias)
    return conv


def _kernels(logits: Tensor, side: int) -> Tensor:
    """`softmax(logits) · Hamming window`, scaled to the sum 1, of `side²` channels.

    The window is above zero, so its logarithm can be added before the softmax.
    """
    places = torch.arange(side, dtype=logits.dtype, device=logits.device)
    window = 0.54 - 0.46 * torch.cos(places * (2 * math.pi / (side - 1)))
    window = (window.unsqueeze(1) * window).log().reshape(1, side * side, 1, 1)
    return torch.softmax(logits + window, dim=1)


class _Sampler(nn.Module):
    """Samples an upsampled map again, at positions moved by an offset for each group of channels.

    `offset = o · σ(s)` source pixels, with `o` and `s` each a 3×3 convolution of the coarse
    compressed map plus one of the fine one, of which each sees the similarities too.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        parts = channels // math.gcd(channels, 8)  # groups of 8 channels, as in the paper's code
        self.norm_fine, self.norm_coarse = GroupNorm(parts, channels), GroupNorm(parts, channels)
        seen = channels + 8  # similarities
        self.offset_fine = _predictor(seen, 2 * groups)
        self.offset_coarse = _predictor(seen, 2 * groups * 4)
        self.scope_fine = _predictor(seen, 2 * groups, std=0.0)
        self.scope_coarse = _predictor(seen, 2 * groups * 4, std=0.0)

    def forward(self, up: Tensor, f: Tensor, r: Tensor) -> Tensor:
        f, r = self.norm_fine(f), self.norm_coarse(r)
        f = torch.cat([f, _similarities(f)], dim=1)
        r = torch.cat([r, _similarities(r)], dim=1)
        offset = F.pixel_shuffle(self.offset_coarse(r), 2) + self.offset_fine(f)
        scope = F.pixel_shuffle(self.scope_coarse(r), 2) + self.scope_fine(f)
        offset = at_least_float32(offset) * at_least_float32(scope).sigmoid()
        return sample_at_offset(up, offset, self.groups)


def _similarities(x: Tensor, distance: int = 2) -> Tensor:
    """The cosine similarity of each pixel to its eight neighbours at a distance in pixels, row by
    row; zero to what is beyond the border: `(N, C, H, W)` -> `(N, 8, H, W)`."""
    h, w = x.shape[2], x.shape[3]
    unit = F.normalize(at_least_float32(x), dim=1, eps=1e-8)
    padded = F.pad(unit, [distance] * 4)
    found: List[Tensor] = []
    for place in range(9):
        if place != 4:  # the pixel itself
            top, left = place // 3 * distance, place % 3 * distance
            neighbour = padded[:, :, top : top + h, left : left + w]
            found.append((unit * neighbour).sum(dim=1))
    return torch.stack(found, dim=1).to(x.dtype)
