"""What every fusion is built on. Shapes are `(N, C, H, W)`; `n` is the number of maps.

A fusion is built as `Fusion(channels, count, norm=..., **arguments)` for `count` maps, and called
with a list of maps `(N, C, H, W)`, the node's own level first. One whose constructor has an
argument `levels` or `widths` is also told the levels that the maps come from, or their channels.

A fusion that says `takes_coarse` may be given maps of coarser levels as they are, to repeat their
values itself: the executor then sets its `coarse` and calls it with the size of the result too.
"""

from __future__ import annotations

from typing import Callable, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_plugin.pyramid.one_pass import sum_in_one_pass
from fpn_plugin.registry import Registry

Size = Optional[List[int]]
FUSIONS: Registry[Callable[..., nn.Module]] = Registry("fusion")


class Fusion(nn.Module):
    """What all fusions share: they are told the channels and how many maps there will be.

    A fusion with learned weights that are the same for every image gives what it multiplies the
    maps by in `normalized_weights()`, of shape `(n,)` or `(n, C)`.

    Attributes:
        arity: the number of maps that it fuses; 0 for any.
        input_dependent: whether what the maps are multiplied by is computed from the maps.
        takes_coarse: whether `forward` takes the size of the result as its second argument, and
            repeats the values of the maps that are smaller.
        coarse: which of the maps are.
        triton: whether such maps are summed by a Triton kernel on CUDA (MODEL.FPN.TRITON).
    """

    arity = 0
    input_dependent = False
    takes_coarse = False

    def __init__(self, channels: int, count: int, norm: str = "") -> None:
        super().__init__()
        self.count = count
        self.coarse = [False] * count
        self.triton = False


def add_maps(maps: List[Tensor], coarse: List[bool], size: Size, triton: bool = False) -> Tensor:
    """`Σ xᵢ`, in the order given.

    Args:
        coarse: which maps are to be repeated up to `size`.
        size: of the result; None if all maps are of one size.
        triton: whether a Triton kernel may do it on CUDA.
    """
    if not torch.jit.is_scripting():
        total = sum_in_one_pass(maps, coarse, size, triton=triton)
        if total is not None:
            return total
    maps = repeat_coarse(maps, coarse, size)
    total = maps[0]
    for x in maps[1:]:
        total = total + x
    return total


def repeat_coarse(maps: List[Tensor], coarse: List[bool], size: Size) -> List[Tensor]:
    """The maps with the values of the coarse ones repeated up to `size`, if one is given."""
    if size is None:
        return maps
    repeated: List[Tensor] = []
    for i, x in enumerate(maps):
        repeated.append(F.interpolate(x, size=size, mode="nearest") if coarse[i] else x)
    return repeated


def weigh_maps(maps: List[Tensor], weights: List[Tensor]) -> Tensor:
    """`Σ wᵢ xᵢ`, in the order given.

    A weight must have no dimensions, or the maps' own type: else a half-precision map would leave
    half precision.
    """
    total = maps[0] * weights[0]
    for i in range(1, len(maps)):
        total = total + maps[i] * weights[i]
    return total
