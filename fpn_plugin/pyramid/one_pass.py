"""Which code sums maps of several levels in one pass over memory: :mod:`fused` on the CPU, the
Triton kernel of :mod:`triton_fuse` on CUDA where a config wants it (`MODEL.FPN.TRITON`)."""

from __future__ import annotations

import os
from types import ModuleType
from typing import List, Optional

from torch import Tensor, nn

from fpn_plugin.pyramid import fused


def sum_in_one_pass(
    maps: List[Tensor],
    coarse: List[bool],
    size: Optional[List[int]],
    weights: Optional[Tensor] = None,
    triton: bool = False,
) -> Optional[Tensor]:
    """`Σ wᵢ xᵢ`, in the order given; None where it takes the plain operations.

    Args:
        coarse: which maps are to be repeated up to `size`.
        size: of the result; None if the maps are of one size.
        weights: shape `(n,)`; None for a plain sum.
        triton: whether the kernel may do it.

    Raises:
        ImportError: naming MODEL.FPN.TRITON, for maps on CUDA without Triton.
    """
    if size is None:
        return None
    if triton and (maps[0].device.type == "cuda" or is_interpreted()):
        kernel = _import_kernel()
        if kernel.usable(maps, coarse, size):
            return kernel.weighted_sum(maps, coarse, size, weights)
    if fused.usable(maps, coarse, size):
        return fused.weighted_sum(maps, coarse, size, weights)
    return None


def is_interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, in its interpreter, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _import_kernel() -> ModuleType:
    try:
        from fpn_plugin.pyramid import triton_fuse
    except ImportError as error:
        raise ImportError(
            "MODEL.FPN.TRITON: True needs Triton, which cannot be imported here"
            f" ({error}). It comes with torch's CUDA builds for Linux; else `pip install triton`,"
            " or set MODEL.FPN.TRITON to False"
        ) from error
    return triton_fuse


def use_triton(network: nn.Module, wanted: bool) -> None:
    """Tell every fusion in a network whether the kernel may do its sum on CUDA."""
    for module in network.modules():
        if getattr(module, "takes_coarse", False):
            setattr(module, "triton", wanted)
