"""The base of all adapters for other libraries' networks. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from fpn_plugin.registry import unknown_name


class MapInfo(NamedTuple):
    """A feature map of a network.

    Attributes:
        channels: its channels.
        stride: in pixels.
        channels_last: whether it is `(N, H, W, C)`.
    """

    channels: int
    stride: int
    channels_last: bool = False


def name_maps(source: str, strides: Sequence[int], advice: str = "") -> dict[str, int]:
    """Name maps by their strides: `res<log2(stride)>`.

    Of several maps with the same stride the last counts, the deepest of its stage, as in
    arXiv:1612.03144; the others have names by :func:`number_maps`.

    Args:
        source: the network's name, for messages.
        strides: in pixels, in the order in which the network computes the maps.
        advice: what to do about a stride that is not a power of two.

    Returns:
        the position of each map in `strides` by its name, from high to low resolution.

    Raises:
        ValueError: if a stride is not a power of two, or there is no map at all.
    """
    where = f"MODEL.BOTTOM_UP.NAME: {source}"
    if not strides:
        raise ValueError(f"{where} gives no maps that a pyramid could read")
    deepest: dict[int, int] = {}
    for position, stride in enumerate(strides):
        if stride < 1 or stride & (stride - 1):
            raise ValueError(
                f"{where} gives a map of stride {stride} pixels, not a power of two"
                f" (its strides: {list(strides)}){advice}"
            )
        deepest[stride] = position
    return {f"res{stride.bit_length() - 1}": deepest[stride] for stride in sorted(deepest)}


def number_maps(strides: Sequence[int]) -> dict[str, int]:
    """Name each of several maps with the same stride: for a plain ViT `res4_1` after its first
    block, `res4_2` after its second, ...

    Args:
        strides: in pixels, in the order in which the network computes the maps.

    Returns:
        the position of each map in `strides` by its name.
    """
    names: dict[str, int] = {}
    for stride in dict.fromkeys(strides):
        same = [position for position, other in enumerate(strides) if other == stride]
        if len(same) > 1 and stride & (stride - 1) == 0:
            level = stride.bit_length() - 1
            names.update({f"res{level}_{number}": at for number, at in enumerate(same, start=1)})
    return names


def refuse_twins(source: str, names: Sequence[str], positions: Sequence[int]) -> None:
    """Refuse two names of one map, such as `res4_12` and `res4`.

    Args:
        positions: of the maps with these names, as the network computes them.

    Raises:
        ValueError: naming `MODEL.FPN.IN_FEATURES`.
    """
    if len(set(positions)) < len(positions):
        raise ValueError(f"MODEL.FPN.IN_FEATURES: {names}: two of them are one map of {source}")


def select_maps(source: str, names: Sequence[str], out_features: Sequence[str]) -> list[str]:
    """The names of the maps to return, in the network's order: `out_features`, or all if empty.

    Raises:
        KeyError: naming a map that the network lacks, and those that it has.
    """
    for name in out_features:
        if name not in names:
            raise unknown_name(f"MODEL.FPN.IN_FEATURES (maps of {source})", name, names)
    return [name for name in names if name in out_features or not out_features]


class AdaptedBackbone(Backbone):
    """A network of another library, as a Detectron2 backbone.

    Args:
        model: maps images `(N, 3, H, W)` to a dict whose values are the feature maps.
        maps: their properties by name, in the same order, from high to low resolution.
        size_divisibility: the image's height and width must be divisible by it, in pixels; 0 for
            any size.
        resample: brings every map to the size that its stride says, by linear interpolation, which
            leaves one of that size as it is: for networks whose convolutions lose the border, and
            images that are not padded as `size_divisibility` says.
    """

    def __init__(
        self,
        model: nn.Module,
        maps: Mapping[str, MapInfo],
        size_divisibility: int = 0,
        resample: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.maps = dict(maps)
        # what forward reads, in types that TorchScript has
        self._names = list(maps)
        self._channels_last = [info.channels_last for info in maps.values()]
        self._strides = [info.stride for info in maps.values()]
        self._resamples = resample
        self._size_divisibility = size_divisibility

    @property
    def size_divisibility(self) -> int:
        """The image's height and width must be divisible by it, in pixels; 0 for any size."""
        return self._size_divisibility

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Run the network.

        Args:
            x: images, `(N, 3, H, W)`.

        Returns:
            `{"res2": (N, C2, H/4, W/4), ...}` from high to low resolution.
        """
        return self._named(list(self.model(x).values()), x)

    def _named(self, values: List[Tensor], x: Tensor) -> Dict[str, Tensor]:
        """The maps of the images `x` as `(N, C, H, W)` by name."""
        maps: Dict[str, Tensor] = {}
        for name, channels_last, stride, y in zip(
            self._names, self._channels_last, self._strides, values
        ):
            y = y.permute(0, 3, 1, 2) if channels_last else y
            if self._resamples:
                size = [(x.shape[2] + stride - 1) // stride, (x.shape[3] + stride - 1) // stride]
                y = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
            maps[name] = y
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride in pixels of each map."""
        return {
            name: ShapeSpec(channels=info.channels, stride=info.stride)
            for name, info in self.maps.items()
        }


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Exclude these parameters from training."""
    for parameter in parameters:
        parameter.requires_grad = False


def parameters_behind(values: Iterable[Tensor]) -> set[nn.Parameter]:
    """The parameters that these values depend on, according to autograd's graph.

    This is exact for parallel branches too, where the order of registered layers is not.
    """
    parameters: set[nn.Parameter] = set()
    seen: set[Any] = {None}
    pending: list[Any] = [value.grad_fn for value in values]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(previous for previous, _ in node.next_functions)
            if hasattr(node, "variable"):  # autograd's leaf
                parameters.add(node.variable)
    return parameters
