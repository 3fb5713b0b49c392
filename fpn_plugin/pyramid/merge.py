"""The 1x1 convolutions that read one map, run as one (`MODEL.FPN.MERGE_PROJECTIONS`).

In BiFPN a bottom-up map is projected once for the top-down path and once for the bottom-up path.
Their weights are put together as the model runs, so parameters, gradients and checkpoint keys are
those of the separate convolutions; each one's norm and activation get its share of the channels, as
a dense map, which is what the one-pass fusions take. Shapes are `(N, C, H, W)`.

Compilers, tracers and exporters see the separate convolutions, and so does whatever hooks into one.
"""

from __future__ import annotations

from typing import Any, Hashable, Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from fpn_plugin.pyramid.fused import is_watched, memory_layout
from fpn_plugin.pyramid.resolve import ResolvedNode

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Groups = Mapping[str, tuple[str, ...]]


def find_groups(network: nn.Module, steps: Sequence[ResolvedNode]) -> Groups:
    """The paths of the convolutions that can run as one, under the path of each of them.

    They are the first on the way of their map: an edge's projection or block, or the block of a
    node with one input (a lateral).
    """
    readers: dict[tuple[str, Hashable], list[str]] = {}
    for step in steps:
        for edge in step.edges:
            first = next(edge.parts(), step.block if step.fuse is None else None)
            kind = _kind(network.get_submodule(first.path)) if first is not None else None
            if first is not None and kind is not None:
                readers.setdefault((edge.source, kind), []).append(first.path)
    return {path: tuple(group) for group in readers.values() if len(group) > 1 for path in group}


def _kind(module: nn.Module) -> Hashable | None:
    """What convolutions must have in common to run as one; None for what cannot."""
    before = getattr(module, "pre_activation", None)  # of a pyramid's blocks that activate first
    if not isinstance(module, Conv2d) or (
        before is None and type(module).forward != Conv2d.forward
    ):
        return None
    if module.kernel_size != (1, 1) or module.groups != 1 or module.padding != (0, 0):
        return None
    if before is not None and next(before.parameters(), None) is not None:
        return None  # learned, and so its own
    weight = module.weight
    # a module's repr has its type and arguments
    return module.stride, module.bias is None, weight.dtype, weight.device, repr(before)


def usable(convs: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether :func:`run` takes these convolutions of `x`, as things stand."""
    if is_watched():
        return False
    if not isinstance(x, Tensor) or x.numel() == 0:  # torch.fx writes down calls of proxies
        return False
    if any(getattr(conv, name) for conv in convs for name in _HOOKS):
        return False
    kinds = {_kind(conv) for conv in convs}
    return len(kinds) == 1 and None not in kinds


def run(convs: Sequence[Any], x: Tensor) -> list[Tensor]:
    """What each of the convolutions, with norm and activation, makes of `x`."""
    first = convs[0]
    if hasattr(first, "pre_activation"):
        x = first.pre_activation(x)
    weight = _join([conv.weight for conv in convs])
    bias = None if first.bias is None else _join([conv.bias for conv in convs])
    y = F.conv2d(x, weight, bias, first.stride)  # (N, ΣC, H', W')
    layout = memory_layout(y) or torch.contiguous_format
    shares = y.split([conv.out_channels for conv in convs], dim=1)
    return [_finish(conv, y.contiguous(memory_format=layout)) for conv, y in zip(convs, shares)]


def _finish(conv: Any, x: Tensor) -> Tensor:
    for layer in (conv.norm, conv.activation):
        if layer is not None:
            x = layer(x)
    return x


def _join(pieces: Sequence[Tensor]) -> Tensor:
    """The tensors one after the other; a view where they lie so and nothing is learned."""
    learned = torch.is_grad_enabled() and any(piece.requires_grad for piece in pieces)
    if learned or not _are_neighbours(pieces):
        return torch.cat(list(pieces))
    first = pieces[0].detach()
    return first.as_strided((sum(map(len, pieces)), *first.shape[1:]), first.stride())


def _are_neighbours(pieces: Sequence[Tensor]) -> bool:
    storage, end = pieces[0].untyped_storage().data_ptr(), pieces[0].storage_offset()
    for piece in pieces:
        same = piece.untyped_storage().data_ptr() == storage and piece.stride(0) == (
            pieces[0].stride(0)
        )
        if not same or piece.storage_offset() != end or not piece.is_contiguous():
            return False
        end += piece.numel()
    return True


def lay_side_by_side(network: nn.Module, groups: Groups) -> None:
    """Put the weights of convolutions that run as one next to each other in memory, as cuDNN has
    those of recurrent networks, so that they are not copied together on every run.

    For weights that are not learned any more. The parameters stay the same objects: what changes
    one later, changes what is run, and where one is moved elsewhere they are copied again.
    """
    for paths in dict.fromkeys(groups.values()):
        convs: list[Any] = [network.get_submodule(path) for path in paths]
        for name in ("weight", "bias"):
            pieces = [getattr(conv, name) for conv in convs]
            if any(piece is None for piece in pieces) or len({p.dtype for p in pieces}) > 1:
                continue
            joined = torch.cat([piece.detach() for piece in pieces])
            for piece, place in zip(pieces, joined.split([len(piece) for piece in pieces])):
                piece.data = place
