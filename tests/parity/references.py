"""Pyramids of other packages with the weights of ours, for the comparison of maps, gradients and
times. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Maps = dict[str, Tensor]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """A pyramid of ours and what it must equal.

    Attributes:
        ours: takes and returns maps by name.
        theirs: in the reference's own form.
        run: calls `theirs` with ours' inputs; returns the maps from high to low resolution.
        convert: turns tensors by `theirs`' names into tensors by ours': its weights and statistics,
            or their gradients. It must use all that it is given.
    """

    ours: nn.Module
    theirs: nn.Module
    run: Callable[[nn.Module, Maps], Sequence[Tensor]]
    convert: Callable[[State], Maps]

    def copy_weights(self) -> None:
        """Give ours the weights and statistics of theirs; every tensor of ours must be given."""
        given = self.convert(_without_counters(self.theirs.state_dict()))
        wanted = _without_counters(self.ours.state_dict())
        assert set(given) == set(wanted), sorted(set(given) ^ set(wanted))[:6]
        self.ours.load_state_dict(given, strict=False)

    def inputs(self, channels: Mapping[int, int], size: Sequence[int], batch: int = 2) -> Maps:
        """Random maps; each level's size is half of the finer one's, rounded up.

        Args:
            channels: by level.
            size: of the finest map.
        """
        finest = min(channels)
        return {
            f"res{level}": torch.randn(
                batch, count, *(-(-side // 2 ** (level - finest)) for side in size)
            )
            for level, count in channels.items()
        }


@dataclass(frozen=True)
class Recipe:
    """How a reference is built, and what it can be compared at.

    Attributes:
        build: from the channels of the bottom-up maps by level, and the pyramid's width.
        levels: of the bottom-up maps.
        width: for the comparison of maps; small, since that costs a second per recipe.
        sizes: of the finest map: square and not, even, and odd where the reference takes it.
        parameters: of the pyramid on R50's maps with width 256; 0 if none is published or counted.
    """

    build: Callable[[Mapping[int, int], int], Reference]
    levels: Sequence[int]
    width: int
    sizes: Sequence[tuple[int, int]]
    parameters: int


R50 = {2: 256, 3: 512, 4: 1024, 5: 2048}
SMALL = {2: 8, 3: 16, 4: 24, 5: 32}
RECIPES: dict[str, Recipe] = {}


def recipe(
    name: str,
    levels: Sequence[int] = (3, 4, 5),
    width: int = 32,
    sizes: Sequence[tuple[int, int]] = ((24, 40), (13, 21)),
    parameters: int = 0,
) -> Callable[[Callable[[Mapping[int, int], int], Reference]], None]:
    """Register a function that builds a reference: see `Recipe`."""

    def register(build: Callable[[Mapping[int, int], int], Reference]) -> None:
        RECIPES[name] = Recipe(build, levels, width, sizes, parameters)

    return register


@torch.no_grad()
def randomize_weights(module: nn.Module) -> None:
    """Random weights and statistics that keep values near 1, where float32 has seven digits."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.uniform_(0.2, 1.0)
    for layer in module.modules():
        if isinstance(layer, _NormBase) and layer.running_mean is not None:
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.5, 2.0)


def _without_counters(state: State) -> Maps:
    return {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}
