"""A tensor for another width of the pyramid, so that the model computes the same.

Growing from `C` to `C'` channels, new channel `j` is a copy of channel `j * C // C'`: copies lie
side by side, so that groups of channels (group norm, deformable groups) keep their members. Who
reads a map splits each weight among the copies, in random shares that sum to one, so that the
copies learn different things. Cutting takes the same channels and lets the others go.

Which axes of a tensor follow the width is not guessed from its shape: it is where the model at the
old width differs from the model at the new one.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import ModulatedConv

# what computes something else when its channels are copied
INEXACT = ("non_local", "pixel_shuffle")
_MATRICES = (nn.Conv2d, nn.Linear, ModulatedConv)


def shapes_at_width(cfg: CfgNode, width: int) -> dict[str, torch.Size]:
    """The shapes of a model's tensors, by name, if `MODEL.FPN.OUT_CHANNELS` were `width`."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FPN.OUT_CHANNELS = width
    cfg.MODEL.DEVICE, cfg.MODEL.BOTTOM_UP.WEIGHTS = "cpu", ""
    with torch.random.fork_rng(devices=[]):  # the run's own random numbers stay what they were
        return {name: x.shape for name, x in build_model(cfg).state_dict().items()}


def resize(
    owner: nn.Module, leaf: str, given: Tensor, wanted: torch.Size, widths: tuple[int, int]
) -> Tensor:
    """A tensor of `owner` in the shape that it has at another width of the pyramid.

    Args:
        leaf: the tensor's own name, such as "weight".
        given: in the shape that it has at the old width.
        widths: of the pyramid, old and new.
    """
    reads = 1 if isinstance(owner, _MATRICES) else 0
    reading = leaf == "weight" and isinstance(owner, (*_MATRICES, nn.ConvTranspose2d))
    for axis, size in enumerate(wanted):
        if given.shape[axis] == size:
            continue
        if reading and axis == reads:
            given = _split(given, axis, size, widths)
        else:
            given = given.index_select(axis, _sources(given.shape[axis], size))
    return given


def _sources(old: int, new: int) -> Tensor:
    """Which old channel each new one copies."""
    return torch.arange(new) * old // new


def _split(given: Tensor, axis: int, size: int, widths: tuple[int, int]) -> Tensor:
    """Weights of a reader, for the copies of what it reads.

    A linear layer reads a flattened map, all places of a channel side by side; a convolution reads
    channels alone, possibly of several maps in a row.
    """
    old = given.shape[axis]
    places = old // widths[0] if given.dim() == 2 and old % widths[0] == 0 else 1
    x = given.transpose(0, axis)
    x = x.reshape(old // places, places, *x.shape[1:])
    sources = _sources(old // places, size // places)
    x = x.index_select(0, sources) * _shares(sources, old // places).view(-1, *[1] * (x.dim() - 1))
    return x.flatten(0, 1).transpose(0, axis).contiguous()


def _shares(sources: Tensor, old: int) -> Tensor:
    """Of each copy in its channel: random, the same in every process."""
    if len(sources) <= old:
        return torch.ones(len(sources))
    generator = torch.Generator().manual_seed(old)
    parts = torch.rand(len(sources), generator=generator) + 0.5
    return parts / torch.zeros(old).index_add(0, sources, parts)[sources]
