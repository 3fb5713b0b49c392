"""What every fusion is built on. Shapes are `(N, C, H, W)`; `n` is the number of maps.

A fusion is built as `Fusion(channels, count, norm=..., **arguments)` for `count` maps, and called
with a list of maps `(N, C, H, W)`, the node's own level first. One whose constructor has an
argument `levels` or `widths` is also told the levels that the maps come from, or their channels.
"""

from __future__ import annotations

from typing import Callable, List

from torch import Tensor, nn

from fpn_plugin.registry import Registry

FUSIONS: Registry[Callable[..., nn.Module]] = Registry("fusion")


class Fusion(nn.Module):
    """What all fusions share: they are told the channels and how many maps there will be.

    A fusion with learned weights that are the same for every image gives what it multiplies the
    maps by in `normalized_weights()`, of shape `(n,)` or `(n, C)`.

    Attributes:
        arity: the number of maps that it fuses; 0 for any.
        input_dependent: whether what the maps are multiplied by is computed from the maps.
    """

    arity = 0
    input_dependent = False

    def __init__(self, channels: int, count: int, norm: str = "") -> None:
        super().__init__()
        self.count = count


def add_maps(maps: List[Tensor]) -> Tensor:
    """`Σ xᵢ`, in the order given."""
    total = maps[0]
    for x in maps[1:]:
        total = total + x
    return total


def weigh_maps(maps: List[Tensor], weights: List[Tensor]) -> Tensor:
    """`Σ wᵢ xᵢ`, in the order given.

    A weight must have no dimensions, or the maps' own type: else a half-precision map would leave
    half precision.
    """
    total = maps[0] * weights[0]
    for i in range(1, len(maps)):
        total = total + maps[i] * weights[i]
    return total
