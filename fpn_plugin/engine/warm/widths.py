"""Resizes a tensor for another width of the pyramid, so that the model computes the same.

From `C` to `C'` channels, new channel `j` is a copy of channel `j * C // C'`. Copies are adjacent,
so that groups of channels (group norm, deformable groups) keep their members. A layer that reads
the map divides each weight among the copies, in random shares that sum to one, so that the copies
learn different things. With fewer channels, the same formula says which ones are kept.

Which axes of a tensor follow the width is not guessed from its shape: they are those in which the
model at the old width differs from the model at the new one.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from fpn_plugin.modeling.build import build_model
from fpn_plugin.pyramid.blocks import ModulatedKernel

# operators that compute something else when their channels are copied, or when not all of them are
# copied equally often
INEXACT = ("eca", "msdeform", "non_local", "pixel_shuffle")
UNEVEN = ("cbam", "ema")
_MATRICES = (nn.Conv2d, nn.Linear, ModulatedKernel)


def shapes_at_width(cfg: CfgNode, width: int) -> dict[str, torch.Size]:
    """The shapes of a model's tensors, by name, if `MODEL.FPN.OUT_CHANNELS` were `width`."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FPN.OUT_CHANNELS = width
    cfg.MODEL.DEVICE, cfg.MODEL.BOTTOM_UP.WEIGHTS = "cpu", ""
    with torch.random.fork_rng(devices=[]):  # the run's random numbers stay the same
        return {name: x.shape for name, x in build_model(cfg).state_dict().items()}


def resize(
    module: nn.Module, leaf: str, x: Tensor, shape: torch.Size, widths: tuple[int, int]
) -> Tensor:
    """A tensor of a module in the shape that it has at another width of the pyramid.

    Args:
        leaf: the tensor's name in the module, such as "weight".
        x: the tensor at the old width.
        shape: its shape at the new width.
        widths: of the pyramid, old and new.
    """
    # the axis along which a weight is multiplied with channels of its input, if it is such a weight
    input_axis = 1 if isinstance(module, _MATRICES) else 0
    is_matrix = leaf == "weight" and isinstance(module, (*_MATRICES, nn.ConvTranspose2d))
    for axis, size in enumerate(shape):
        if x.shape[axis] == size:
            continue
        if is_matrix and axis == input_axis:
            x = _divide(x, axis, size, widths)
        else:
            x = x.index_select(axis, _sources(x.shape[axis], size))
    return x


def _sources(old: int, new: int) -> Tensor:
    """The old channel that each new channel copies."""
    return torch.arange(new) * old // new


def _divide(x: Tensor, axis: int, size: int, widths: tuple[int, int]) -> Tensor:
    """Divide the weights of a layer among the copies of its input channels.

    A linear layer reads a flattened map, in which the pixels of a channel are adjacent. A
    convolution reads channels, possibly those of several concatenated maps.
    """
    old = x.shape[axis]
    pixels = old // widths[0] if x.dim() == 2 and old % widths[0] == 0 else 1
    x = x.transpose(0, axis)
    x = x.reshape(old // pixels, pixels, *x.shape[1:])  # (channels, pixels, …)
    sources = _sources(old // pixels, size // pixels)
    x = x.index_select(0, sources) * _shares(sources, old // pixels).view(-1, *[1] * (x.dim() - 1))
    return x.flatten(0, 1).transpose(0, axis).contiguous()


def _shares(sources: Tensor, old: int) -> Tensor:
    """The share of each copy in its channel: random, but the same in every process."""
    if len(sources) <= old:
        return torch.ones(len(sources))
    generator = torch.Generator().manual_seed(old)
    shares = torch.rand(len(sources), generator=generator) + 0.5
    return shares / torch.zeros(old).index_add(0, sources, shares)[sources]
