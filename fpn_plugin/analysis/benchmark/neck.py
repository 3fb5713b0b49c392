"""A backbone's pyramid without the network underneath. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import copy
from typing import Any, Dict, Mapping

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

# what Detectron2's FPN and this plugin's pyramid, and its SimpleFeaturePyramid, call it
_BELOW = ("bottom_up", "net")


class Given(Backbone):
    """In place of a network: the maps that it is given. Of the other one it has the contract.

    Args:
        shapes: of the maps.
        like: whose padding it asks for.
    """

    def __init__(self, shapes: Mapping[str, ShapeSpec], like: Backbone) -> None:
        super().__init__()
        self._shapes = dict(shapes)
        self._divisibility = like.size_divisibility
        self._padding = like.padding_constraints

    @property
    def size_divisibility(self) -> int:
        return self._divisibility

    @property
    def padding_constraints(self) -> Dict[str, int]:
        return self._padding

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes

    def forward(self, x: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """The maps, as they are."""
        return x


class Fixed(Given):
    """In place of a backbone: always the same maps, whatever the image.

    Args:
        maps: what it gives.
    """

    def __init__(self, maps: Mapping[str, Tensor], like: Backbone) -> None:
        super().__init__(like.output_shape(), like)
        self._maps = dict(maps)

    def forward(self, x: Any) -> Dict[str, Tensor]:
        """The maps."""
        return dict(self._maps)


def find_below(backbone: nn.Module) -> str:
    """What a backbone calls the network underneath its pyramid; "" if it has none."""
    found = [name for name in _BELOW if isinstance(getattr(backbone, name, None), nn.Module)]
    return found[0] if found else ""


def below_name(backbone: nn.Module) -> str:
    """What a backbone calls the network underneath its pyramid.

    Raises:
        ValueError: if it has none.
    """
    found = find_below(backbone)
    if not found:
        raise ValueError(
            f"MODEL.BACKBONE.NAME: a {type(backbone).__name__} has no network underneath a pyramid"
            f" (no attribute {' or '.join(_BELOW)}): its neck cannot be measured alone"
        )
    return found


def neck_of(backbone: nn.Module) -> nn.Module:
    """The pyramid of a backbone, called with a dict of bottom-up maps; parameters are shared.

    It is the backbone itself, run on maps that are there already, so that what was done to the
    backbone (a layout, a compiled part) holds for it too.

    Raises:
        ValueError: if the backbone has no network underneath.
    """
    name = below_name(backbone)
    network = getattr(backbone, name)
    neck = copy.copy(backbone)
    neck._modules = dict(backbone._modules)  # the copy's own list of submodules
    neck.add_module(name, Given(network.output_shape(), network))
    return neck


@torch.no_grad()
def maps_below(backbone: Any, image: Tensor) -> dict[str, Tensor]:
    """What the network underneath gives to the pyramid, and only that.

    Args:
        image: of a padded size, `(N, 3, H, W)`.
    """
    maps = getattr(backbone, below_name(backbone))(image)
    read = getattr(backbone, "in_features", None) or getattr(backbone, "in_feature", None)
    names = (
        list(backbone.graph.inputs) if read is None else [read] if isinstance(read, str) else read
    )
    return {name: maps[name].detach() for name in names}


def image_tensor(model: Any, images: list[dict[str, Any]]) -> Tensor:
    """Images as a detector's backbone gets them: normalised, padded, in one tensor."""
    made = [
        (item["image"].to(model.pixel_mean) - model.pixel_mean) / model.pixel_std for item in images
    ]
    backbone = model.backbone
    return ImageList.from_tensors(
        made, backbone.size_divisibility, padding_constraints=backbone.padding_constraints
    ).tensor
