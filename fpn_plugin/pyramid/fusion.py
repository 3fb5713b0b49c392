"""FUSIONS: several maps of one shape in, one map of that shape out (`stack`: of more channels).

Shapes are `(N, C, H, W)`; `n` is the number of maps.

A fusion is built as `Fusion(channels, count, norm=..., **arguments)` for `count` maps, and called
with a list of them, the node's own level first. If its constructor has an argument `levels` or
`widths`, it gets the levels that the maps come from, or their channels.

A fusion with `takes_coarse = True` repeats the values of coarser maps itself (nearest upsampling):
the executor sets `coarse`, leaves those maps as they are, and passes the size of the result too.
"""

from __future__ import annotations

from typing import Callable, List, Optional, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from fvcore.nn import weight_init
from torch import Tensor, nn

from fpn_plugin.pyramid import fused
from fpn_plugin.pyramid.blocks import conv_block
from fpn_plugin.pyramid.norms import narrow_norm
from fpn_plugin.registry import Registry

Size = Optional[List[int]]
FUSIONS: Registry[Callable[..., nn.Module]] = Registry("fusion")


class Fusion(nn.Module):
    """Base class of all fusions.

    A fusion whose learned weights are the same for every image returns what it multiplies the maps
    by from `normalized_weights()`, shape `(n,)` or `(n, C)`.

    Attributes:
        arity: the number of maps that it fuses; 0 for any.
        input_dependent: whether the maps' weights are computed from the maps.
        takes_coarse: whether `forward` takes the size of the result as its second argument, and
            repeats the values of coarser maps up to it.
        needs_coarse: whether exactly one of its maps must be left to it so.
        coarse: which maps are coarser.
    """

    arity = 0
    input_dependent = False
    takes_coarse = False
    needs_coarse = False

    def __init__(self, channels: int, count: int, norm: str = "") -> None:
        super().__init__()
        self.count = count
        self.coarse = [False] * count


def sum_maps(
    maps: List[Tensor], coarse: List[bool], size: Size, weights: Optional[Tensor] = None
) -> Tensor:
    """`Σ xᵢ`, or `Σ wᵢ xᵢ`, in the order given.

    Args:
        coarse: which maps are repeated up to `size`.
        size: of the result; None if all maps have it.
        weights: shape `(n,)`.
    """
    if not torch.jit.is_scripting():
        if size is not None and fused.usable(maps, coarse, size):
            return fused.weighted_sum(maps, coarse, size, weights)
    maps = repeat_coarse(maps, coarse, size)
    if weights is not None:
        return weigh_maps(maps, list(weights.unbind(0)))
    total = maps[0]
    for x in maps[1:]:
        total = total + x
    return total


def repeat_coarse(maps: List[Tensor], coarse: List[bool], size: Size) -> List[Tensor]:
    """Repeat the values of the coarse maps up to `size`; None leaves all maps as they are."""
    if size is None:
        return maps
    repeated: List[Tensor] = []
    for i, x in enumerate(maps):
        repeated.append(F.interpolate(x, size=size, mode="nearest") if coarse[i] else x)
    return repeated


def weigh_maps(maps: List[Tensor], weights: List[Tensor]) -> Tensor:
    """`Σ wᵢ xᵢ`, in the order given.

    Weights with dimensions must have the maps' dtype, or half-precision maps would be promoted.
    """
    total = maps[0] * weights[0]
    for i in range(1, len(maps)):
        total = total + maps[i] * weights[i]
    return total


@FUSIONS.register("sum")
class Sum(Fusion):
    """`Σ xᵢ` (FPN, arXiv:1612.03144)."""

    takes_coarse = True

    def forward(self, maps: List[Tensor], size: Size = None) -> Tensor:
        return sum_maps(maps, self.coarse, size)


@FUSIONS.register("avg")
class Average(Fusion):
    """`Σ xᵢ / n` (Detectron2's other `FUSE_TYPE`)."""

    takes_coarse = True

    def forward(self, maps: List[Tensor], size: Size = None) -> Tensor:
        return sum_maps(maps, self.coarse, size).div_(len(maps))


@FUSIONS.register("max")
class Maximum(Fusion):
    """The elementwise maximum."""

    def forward(self, maps: List[Tensor]) -> Tensor:
        largest = maps[0]
        for x in maps[1:]:
            largest = torch.maximum(largest, x)
        return largest


@FUSIONS.register("product")
class Product(Fusion):
    """`Π xᵢ`, elementwise."""

    def forward(self, maps: List[Tensor]) -> Tensor:
        product = maps[0]
        for x in maps[1:]:
            product = product * x
        return product


@FUSIONS.register("concat")
class Concat(Fusion):
    """`1×1(concat(xᵢ))`, back to `C` channels (YOLO, U-Net).

    Args:
        widths: the channels of each map, which may differ; all `channels` if empty.
    """

    def __init__(
        self, channels: int, count: int, norm: str = "", widths: Sequence[int] = ()
    ) -> None:
        super().__init__(channels, count)
        self.conv = conv_block(sum(widths) or channels * count, channels, 1, norm=norm)

    def forward(self, maps: List[Tensor]) -> Tensor:
        return self.conv(torch.cat(maps, dim=1))  # (N, Σ widths, H, W) -> (N, C, H, W)


@FUSIONS.register("stack")
class Stack(Fusion):
    """`concat(xᵢ)`, of as many channels as all maps together: the node's block takes them (YOLO's
    necks, RT-DETR, arXiv:2304.08069).

    Args:
        widths: the channels of each map, which may differ.
    """

    def __init__(
        self, channels: int, count: int, norm: str = "", widths: Sequence[int] = ()
    ) -> None:
        super().__init__(channels, count)

    def forward(self, maps: List[Tensor]) -> Tensor:
        return torch.cat(maps, dim=1)  # (N, Σ widths, H, W)


@FUSIONS.register("weighted")
class Weighted(Fusion):
    """`Σ wᵢ xᵢ`, w learned from 1, unbounded (EfficientDet, arXiv:1911.09070, equation 1).

    Attributes:
        per_channel: whether a map has one weight per channel, instead of one.
    """

    takes_coarse = True
    per_channel = False

    def __init__(self, channels: int, count: int, norm: str = "") -> None:
        super().__init__(channels, count)
        shape = (count, channels) if self.per_channel else (count,)
        self.weights = nn.Parameter(torch.ones(shape))

    def normalized_weights(self) -> Tensor:
        """What the maps are multiplied by, shape `(n,)`, or `(n, C)` per channel."""
        return self.weights

    def forward(self, maps: List[Tensor], size: Size = None) -> Tensor:
        weights = self.normalized_weights()
        if weights.dim() == 1:
            return sum_maps(maps, self.coarse, size, weights)
        maps = repeat_coarse(maps, self.coarse, size)
        weights = weights.type_as(maps[0])[:, :, None, None]  # (n, C) -> (n, C, 1, 1)
        return weigh_maps(maps, list(weights.unbind(0)))


@FUSIONS.register("softmax")
class Softmax(Weighted):
    """`Σ softmax(w)ᵢ xᵢ` (EfficientDet, arXiv:1911.09070, equation 2)."""

    def normalized_weights(self) -> Tensor:
        return torch.softmax(self.weights, dim=0)


@FUSIONS.register("fast_normalized")
class FastNormalized(Weighted):
    """`Σ relu(wᵢ) xᵢ / (Σ relu(wⱼ) + eps)`, w from 1 (EfficientDet, arXiv:1911.09070, equation
    3)."""

    def __init__(self, channels: int, count: int, norm: str = "", eps: float = 1e-4) -> None:
        super().__init__(channels, count)
        if type(eps) not in (int, float) or not 0 <= eps <= 1:
            raise ValueError(f"eps {eps!r} is not a number from 0 to 1")
        self.eps = eps

    def normalized_weights(self) -> Tensor:
        positive = torch.relu(self.weights)
        return positive / (positive.sum(dim=0) + self.eps)


@FUSIONS.register("channel_softmax")
class ChannelSoftmax(Softmax):
    """`softmax` with a weight per input and channel (google/automl's `channel_attn`)."""

    per_channel = True


@FUSIONS.register("channel_fast")
class ChannelFast(FastNormalized):
    """`fast_normalized` with a weight per input and channel (automl's `channel_fastattn`)."""

    per_channel = True


@FUSIONS.register("blend")
class Blend(Fusion):
    """`old + w · (new - old)`, w learned from 0, unbounded, a weight per channel.

    The node's first input is "old", its second is "new". It starts as the old map, bit for bit, so
    that a warm start can open a new path gradually.

    Args:
        scale: w is the parameter times this, so that an optimizer whose step length does not depend
            on the gradient (Adam) moves w that much faster.
    """

    arity = 2

    def __init__(self, channels: int, count: int, norm: str = "", scale: float = 10.0) -> None:
        super().__init__(channels, count)
        self.scale = scale
        self.weights = nn.Parameter(torch.zeros(channels))

    def normalized_weights(self) -> Tensor:
        """What the maps are multiplied by, shape `(2, C)`."""
        share = self.scale * self.weights
        return torch.stack([1 - share, share])

    def forward(self, maps: List[Tensor]) -> Tensor:
        old, new = maps
        share = (self.scale * self.weights).type_as(old)[:, None, None]  # (C, 1, 1)
        return old + share * (new - old)


@FUSIONS.register("global_attention")
class GlobalAttention(Fusion):
    """`coarse + fine · σ(global max pool(coarse))` (NAS-FPN, arXiv:1904.07392, as in its TensorFlow
    release).

    "coarse" is the map from the higher level, or the second if both come from one level.

    Args:
        levels: the level that each map comes from.
    """

    arity = 2
    input_dependent = True

    def __init__(
        self, channels: int, count: int, norm: str = "", levels: Sequence[int] = ()
    ) -> None:
        super().__init__(channels, count)
        self.first_is_coarse = len(levels) == 2 and levels[0] > levels[1]

    def forward(self, maps: List[Tensor]) -> Tensor:
        first, second = maps
        if self.first_is_coarse:
            coarse, fine = first, second
        else:
            coarse, fine = second, first
        return coarse + fine * torch.sigmoid(coarse.amax(dim=[2, 3], keepdim=True))  # (N, C, 1, 1)


@FUSIONS.register("asff")
class AdaptiveSpatial(Fusion):
    """`Σ αᵢ xᵢ` with, at each pixel, `α = softmax over inputs of 1×1(concat(1×1→hidden of each))`
    (ASFF, arXiv:1911.09516).

    The norm follows the convolutions to `hidden` channels; the logits' convolution has none.

    Args:
        hidden: channels that each map is compressed to.
    """

    input_dependent = True

    def __init__(self, channels: int, count: int, norm: str = "", hidden: int = 16) -> None:
        super().__init__(channels, count)
        check_positive("hidden", hidden)
        self.compress = nn.ModuleList(_compression(channels, hidden, norm) for _ in range(count))
        self.logits = conv_block(hidden * count, count, 1)

    def forward(self, maps: List[Tensor]) -> Tensor:
        compressed: List[Tensor] = []
        for i, conv in enumerate(self.compress):
            compressed.append(conv(maps[i]))
        logits = self.logits(torch.cat(compressed, dim=1))  # (N, n·hidden, H, W) -> (N, n, H, W)
        # autocast computes a softmax in float32
        weights = torch.softmax(logits, dim=1).type_as(maps[0])
        return weigh_maps(maps, list(weights.split(1, dim=1)))


def _compression(channels: int, hidden: int, norm: str) -> Conv2d:
    """A 1x1 convolution with norm."""
    layer = narrow_norm(norm, hidden)
    conv = Conv2d(channels, hidden, 1, bias=layer is None, norm=layer)
    weight_init.c2_xavier_fill(conv)
    return conv


@FUSIONS.register("gate")
class Gate(Fusion):
    """`σ(1×1(new)) · new + (1 − σ(1×1(new))) · old` (DetectoRS, arXiv:2006.02334).

    The node's first input is "new", its second is "old". The convolution has one output channel, no
    norm, and starts at zero as in the authors' code, so that both maps start with equal weight.
    """

    arity = 2
    input_dependent = True

    def __init__(self, channels: int, count: int, norm: str = "") -> None:
        super().__init__(channels, count)
        self.conv = nn.Conv2d(channels, 1, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, maps: List[Tensor]) -> Tensor:
        new, old = maps
        gate = torch.sigmoid(self.conv(new)).type_as(new)  # (N, C, H, W) -> (N, 1, H, W)
        return gate * new + (1 - gate) * old


@FUSIONS.register("attention")
class SelectiveKernel(Fusion):
    """`Σ aᵢ xᵢ` with `a = softmax over inputs of FCᵢ(ReLU(FC(GAP(Σ xⱼ))))`, a weight per image,
    input and channel (SKNet, arXiv:1903.06586).

    There is no norm between the two layers: an image has a single value per channel there.

    Args:
        reduction: the first layer has `max(C // reduction, 32)` outputs.
    """

    input_dependent = True

    def __init__(self, channels: int, count: int, norm: str = "", reduction: int = 16) -> None:
        super().__init__(channels, count)
        check_positive("reduction", reduction)
        hidden = max(channels // reduction, 32)
        self.reduce = nn.Linear(channels, hidden)
        self.logits = nn.ModuleList(nn.Linear(hidden, channels) for _ in range(count))
        for layer in (self.reduce, *self.logits):
            weight_init.c2_xavier_fill(layer)

    def forward(self, maps: List[Tensor]) -> Tensor:
        pooled = sum_maps(maps, self.coarse, None).mean(dim=[2, 3])  # (N, C, H, W) -> (N, C)
        hidden = torch.relu(self.reduce(pooled))
        logits: List[Tensor] = []
        for layer in self.logits:
            logits.append(layer(hidden))
        weights = torch.softmax(torch.stack(logits, dim=1), dim=1)  # (N, n, C)
        # autocast computes a softmax in float32
        weights = weights.type_as(maps[0])[:, :, :, None, None]
        return weigh_maps(maps, list(weights.unbind(1)))


def check_positive(name: str, value: object) -> None:
    """Raise a ValueError, naming an argument, unless its value is a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} {value!r} is not a positive whole number")
