"""A plain ViT with DEIMv2's spatial tuning adapter as a Detectron2 backbone. Shapes are `(N, C, H,
W)`."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Sequence

import torch
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from fpn_plugin.bottom_up.norms import NORMS
from fpn_plugin.registry import unknown_name

KEY = "MODEL.BOTTOM_UP.ARGS.sta"
MAPS = ("res3", "res4", "res5")
_FIRST = 3  # the level of the first of them


class SpatialTuningBackbone(Backbone):
    """DEIMv2's spatial tuning adapter (arXiv:2509.20787) beside a plain ViT.

    A few strided convolutions on the image give the detail that patches of 16 pixels lack; each of
    their maps is stacked on one of the ViT's, resized to it. So any pyramid finds its levels under
    their usual names.

    ::

        D_2 = maxpool(GELU(norm(3x3 s2(image))))
        D_3 = norm(3x3 s2(D_2)),  D_{l+1} = norm(3x3 s2(GELU(D_l)))
        res_l = concat(bilinear(V_l), D_l)   (V: the ViT's maps, the earliest for res3)

    Args:
        network: gives as many maps of one stride as `out_features`, from the ViT's first blocks to
            its last.
        channels: of D_2; D_3 has twice as many, D_4 and D_5 four times.
        norm: one of `norms.NORMS`.
        out_features: of `res3`, `res4` and `res5`, in this order.
        in_channels: of the image.

    Raises:
        ValueError: (KeyError for an unknown norm or map) naming the argument.
    """

    def __init__(
        self,
        network: Backbone,
        channels: int = 16,
        norm: str = "BN",
        out_features: Sequence[str] = MAPS,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        shapes = network.output_shape()
        if type(channels) is not int or channels < 1:
            raise ValueError(f"{KEY}: channels: {channels!r} is not a whole number above 0")
        if norm not in NORMS:
            raise unknown_name(f"{KEY}: norm", norm, NORMS)
        names = [name for name in MAPS if name in out_features]
        if unknown := [name for name in out_features if name not in MAPS]:
            raise unknown_name("MODEL.FPN.IN_FEATURES (maps of the adapter)", unknown[0], MAPS)
        if len(shapes) != len(names) or len({shape.stride for shape in shapes.values()}) > 1:
            raise ValueError(
                f"{KEY}: the network gives {', '.join(shapes)} for {', '.join(names)}; it needs one"
                " map for each, all of one stride"
            )
        self.network = network
        self._size_divisibility = network.size_divisibility
        self._maps = list(shapes)
        self._names = names
        widths = [channels, 2 * channels, 4 * channels, 4 * channels]
        last = MAPS.index(names[-1]) + 1
        self.stem = _conv(in_channels, channels, norm)
        self.convs = nn.ModuleList(
            _conv(before, after, norm) for before, after in zip(widths[:last], widths[1:])
        )
        self._is_returned = [name in names for name in MAPS[:last]]
        self._shapes = {
            name: ShapeSpec(
                channels=(shape.channels or 0) + widths[MAPS.index(name) + 1],
                stride=2 ** (MAPS.index(name) + _FIRST),
            )
            for name, shape in zip(names, shapes.values())
        }

    @property
    def size_divisibility(self) -> int:
        """The image's height and width must be divisible by it, in pixels; 0 for any size."""
        return self._size_divisibility

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Run the network and the adapter.

        Args:
            x: images, `(N, 3, H, W)`.

        Returns:
            `{"res3": (N, C3, H/8, W/8), ...}` from high to low resolution.
        """
        maps = self.network(x)
        detail = F.max_pool2d(F.gelu(self.stem(x)), kernel_size=3, stride=2, padding=1)
        details: List[Tensor] = []
        for i, conv in enumerate(self.convs):
            detail = conv(F.gelu(detail) if i > 0 else detail)
            if self._is_returned[i]:
                details.append(detail)
        results: Dict[str, Tensor] = {}
        for name, source, detail in zip(self._names, self._maps, details):
            size = [detail.shape[2], detail.shape[3]]
            y = F.interpolate(maps[source], size=size, mode="bilinear", align_corners=False)
            results[name] = torch.cat([y, detail.to(y.dtype)], dim=1)
        return results

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride in pixels of each map."""
        return dict(self._shapes)


def _conv(in_channels: int, out_channels: int, norm: str) -> Conv2d:
    conv = Conv2d(
        *(in_channels, out_channels, 3),
        stride=2,
        padding=1,
        bias=False,
        norm=NORMS[norm](nn.BatchNorm2d(out_channels)),
    )
    weight_init.c2_msra_fill(conv)
    return conv


def build_tuned(
    build: Callable[..., Backbone],
    sta: Mapping[str, Any],
    out_features: Sequence[str],
    in_channels: int,
) -> SpatialTuningBackbone:
    """A plain ViT with the adapter, from `MODEL.BOTTOM_UP.ARGS`.

    Args:
        build: the ViT, from its `out_features`.
        sta: `{blocks: [4, 8, 12], channels: 16, norm: BN}`: after which blocks the ViT's maps are
            taken for `res3`, `res4` and `res5`, and arguments of :class:`SpatialTuningBackbone`.
        out_features: of the adapter; empty for all.

    Raises:
        ValueError: (KeyError for an unknown argument) naming the argument.
    """
    known = ("blocks", "channels", "norm")
    if not isinstance(sta, Mapping):
        raise ValueError(f"{KEY}: {sta!r} is not a mapping such as {{blocks: [4, 8, 12]}}")
    for name in sta:
        if name not in known:
            raise unknown_name(KEY, name, known)
    blocks = sta.get("blocks", ())
    numbers = list(blocks) if isinstance(blocks, (list, tuple)) else []
    if (
        len(numbers) != len(MAPS)
        or not all(type(n) is int for n in numbers)
        or numbers != sorted(set(numbers))
    ):
        raise ValueError(
            f"{KEY}: blocks: {blocks!r}; give the numbers of three blocks of the ViT, from the"
            f" first to the last, whose maps become {', '.join(MAPS)}: [4, 8, 12] of twelve"
        )
    names = [name for name in MAPS if name in out_features or not out_features]
    wanted = [f"res4_{numbers[MAPS.index(name)]}" for name in names]
    arguments = {name: value for name, value in sta.items() if name != "blocks"}
    return SpatialTuningBackbone(
        build(wanted), out_features=out_features or MAPS, in_channels=in_channels, **arguments
    )
