"""Maps that are made again in the backward pass instead of being kept until then.

A node's fused map and its activation are cheap to make from the node's inputs, which are kept
anyway, for the gradients of the fusion's weights. Made again by the same operations they have the
same bits, so gradients do not change.
"""

from __future__ import annotations

import weakref
from typing import Callable

import torch
from torch import Tensor, nn

Recipe = Callable[[], Tensor]


class _Recipes:
    """What autograd keeps in place of which map. A map's address says which it is only as long as
    the map is alive."""

    def __init__(self) -> None:
        self._recipes: list[tuple[weakref.ref[Tensor], Recipe]] = []

    def add(self, x: Tensor, make: Recipe) -> None:
        """Let `x` be made again by `make`, which must not hold it."""
        self._recipes.append((weakref.ref(x), make))

    def keep(self, x: Tensor) -> Tensor | Recipe:
        for reference, make in self._recipes:
            known = reference()
            if known is not None and _is_same(known, x):
                return make
        return x


def _is_same(one: Tensor, two: Tensor) -> bool:
    return (
        one.data_ptr() == two.data_ptr()
        and one.shape == two.shape
        and one.stride() == two.stride()
        and one.dtype == two.dtype
    )


def _get(kept: Tensor | Recipe) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()


class _Fused:
    """A node's fused map and its activation, as recipes; what is made for the activation's reader
    is kept for the activation itself, which asks next."""

    def __init__(self, fuse: Recipe, activation: nn.Module) -> None:
        self._fuse = fuse
        self._activation = activation
        self._made: Tensor | None = None

    def fused(self) -> Tensor:
        made, self._made = self._made, None
        with torch.no_grad():
            return self._fuse() if made is None else made

    def activated(self) -> Tensor:
        self._made = self.fused()
        with torch.no_grad():
            return self._activation(self._made)


def fuse_and_run(fuse: Recipe, block: nn.Module) -> Tensor:
    """`block(fuse())`, where neither the fused map nor the block's `pre_activation` of it is kept.

    Args:
        fuse: gives the same map each time, and a new one.
        block: which may have a submodule `pre_activation`, that its input goes through first.
    """
    activation = getattr(block, "pre_activation", nn.Identity())
    recipes = _Fused(fuse, activation)
    kept, x = _Recipes(), fuse()
    kept.add(x, recipes.fused)

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output is not args[0]:
            kept.add(output, recipes.activated)

    handle = activation.register_forward_hook(note)
    try:
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, _get):
            return block(x)
    finally:
        handle.remove()


def wanted(fusion: nn.Module) -> bool:
    """Whether autograd runs, in a way that hooks can change, and something is gained.

    A fusion that is cheap to repeat, and whose inputs are kept anyway: for its weights' gradients.
    """
    return (
        getattr(fusion, "takes_coarse", False)
        and next(fusion.parameters(), None) is not None
        and torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )
