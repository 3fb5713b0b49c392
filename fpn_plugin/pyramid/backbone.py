"""PyramidBackbone: a bottom-up network and a pyramid as one Detectron2 backbone. Shapes are `(N, C,
H, W)`."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ResNet
from torch import Tensor, nn

from fpn_plugin.bottom_up import build_bottom_up
from fpn_plugin.config import (
    extra_levels_for,
    size_divisibility_for,
    validate_config,
)
from fpn_plugin.heads.auto import require_resolved
from fpn_plugin.heads.inputs import validate_heads
from fpn_plugin.pyramid.compose import add_extra_levels, build_graph
from fpn_plugin.pyramid.graph import Operator, OperatorLike, as_operator
from fpn_plugin.pyramid.inline import parse_graph
from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.topologies import Style
from fpn_plugin.pyramid.warm import combine
from fpn_plugin.warm_settings import warm_settings

# what Detectron2's ResNet can give beside its stem
_STAGES = frozenset(("res2", "res3", "res4", "res5"))


class PyramidBackbone(GraphExecutor, Backbone):
    """A bottom-up network and the pyramid on its maps.

    The defaults build Detectron2's `FPN` (arXiv:1612.03144) with its parameter names, so its
    checkpoints load.

    Args:
        bottom_up: the network whose maps the pyramid reads.
        in_features: the maps to read, from high to low resolution.
        out_channels: channels of every pyramid map.
        topology: a name of the TOPOLOGIES registry, or several joined by "+".
        graph: a list of nodes to run instead of `topology`; the format is `MODEL.FPN.GRAPH`'s.
            `repeats`, `lateral` and `block` do not apply to it.
        repeats: how often the topology runs.
        extra_levels: "none", "maxpool", "conv_c5" or "conv_p5".
        inner_levels: how many coarser levels a topology that fuses them makes; -1: to have five.
        fuse_type: a name of the FUSIONS registry; this and the next four also as `{name: ...,
            argument: ...}`.
        size_divisibility: what the heads need the image's sides to be divisible by, if more than
            the pyramid does.
        square_pad: if > 0, images are padded to squares of this size.
        recompute: whether training computes nodes whose fusion has weights again in the backward
            pass instead of keeping what they computed.
        warm_from: a pyramid on the same network, as which this one starts (see `warm.py`); what is
            taken of it is its structure, not its weights.

    Attributes:
        warm_start: the two pyramids as one; None without `warm_from`.

    Raises:
        ValueError: (KeyError for an unknown name) naming the config key or node, the value and what
            is valid.
    """

    # Detectron2's ResNet keeps its stages in a plain list, which TorchScript refuses
    _unrolled = (ResNet,)

    @configurable
    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        *,
        topology: str = "fpn",
        graph: Sequence[Mapping[str, Any]] = (),
        repeats: int = 1,
        extra_levels: str = "none",
        inner_levels: int = -1,
        fuse_type: OperatorLike = "sum",
        upsample: OperatorLike = "nearest",
        downsample: OperatorLike = "maxpool",
        lateral: OperatorLike = "conv1x1",
        block: OperatorLike = "conv3x3",
        norm: str = "",
        norm_eps: float = 0.0,
        norm_momentum: float = 0.0,
        activation: str = "",
        size_divisibility: int = 0,
        square_pad: int = 0,
        recompute: bool = False,
        warm_from: PyramidBackbone | None = None,
    ) -> None:
        shapes = bottom_up.output_shape()
        levels = feature_levels(shapes, in_features)
        if graph:
            made = add_extra_levels(parse_graph(levels, graph), extra_levels)
        else:
            style = Style(_operator(lateral, "LATERAL"), _operator(block, "BLOCK"), activation)
            made = build_graph(topology, levels, style, repeats, extra_levels, inner_levels)
        defaults = Defaults(
            out_channels,
            _operator(fuse_type, "FUSE_TYPE"),
            _operator(upsample, "UPSAMPLE"),
            _operator(downsample, "DOWNSAMPLE"),
            norm,
            activation,
            norm_eps,
            norm_momentum,
        )
        channels = {name: shape.channels for name, shape in shapes.items()}
        warm = None
        if warm_from is not None:
            warm = combine((warm_from.graph, warm_from.defaults), (made, defaults), channels)
        whole, own = (warm.graph, warm.own) if warm else (made, None)
        super().__init__(whole, {name: channels[name] for name in whole.inputs}, defaults, own)
        self.warm_start = warm
        self.bottom_up = bottom_up
        self._square_pad = square_pad
        self.recompute = recompute
        # images padded in another way than the checkpoint's would make its function another one
        padded = warm_from.graph if warm_from is not None else made
        self._size_divisibility = max(
            padded.size_divisibility(), bottom_up.size_divisibility, size_divisibility
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """The constructor's arguments, from `MODEL.FPN` and `MODEL.BOTTOM_UP`."""
        fpn = cfg.MODEL.FPN
        validate_config(cfg)
        warm = warm_settings(cfg)
        bottom_up = _network(cfg, input_shape, warm.get("in_features", ()))
        return {
            "bottom_up": bottom_up,
            "in_features": fpn.IN_FEATURES,
            "out_channels": fpn.OUT_CHANNELS,
            "topology": fpn.TOPOLOGY,
            "graph": fpn.GRAPH,
            "repeats": fpn.REPEATS,
            "extra_levels": extra_levels_for(cfg),
            "inner_levels": fpn.INNER_LEVELS,
            "fuse_type": fpn.FUSE_TYPE,
            "upsample": fpn.UPSAMPLE,
            "downsample": fpn.DOWNSAMPLE,
            "lateral": fpn.LATERAL,
            "block": fpn.BLOCK,
            "norm": fpn.NORM,
            "norm_eps": fpn.NORM_EPS,
            "norm_momentum": fpn.NORM_MOMENTUM,
            "activation": fpn.ACTIVATION,
            "size_divisibility": size_divisibility_for(cfg),
            "recompute": fpn.RECOMPUTE,
            "warm_from": _blueprint(bottom_up, warm),
        }

    @property
    def size_divisibility(self) -> int:
        """What the image's height and width must be divisible by, in pixels; 0 for no such need."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> Dict[str, int]:
        """Detectron2's padding options: `{"square_size": pixels}`, 0 for none."""
        return {"square_size": self._square_pad}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride in pixels of each output, from high to low resolution."""
        return {
            name: ShapeSpec(channels=self.defaults.channels, stride=2 ** self.graph.level(node))
            for name, node in self.graph.output_names().items()
        }

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Run the network and the pyramid.

        Args:
            x: images, `(N, 3, H, W)`.

        Returns:
            `{"p2": (N, C, H/4, W/4), ...}` from high to low resolution.
        """
        return self._run(self.bottom_up(x))

    def __prepare_scriptable__(self) -> nn.Module:
        module = super().__prepare_scriptable__()
        # what Detectron2's models read from a scripted backbone
        for name in ("size_divisibility", "padding_constraints"):
            setattr(module, name, getattr(self, name))
        return module


def _network(cfg: CfgNode, input_shape: ShapeSpec, more: Sequence[str]) -> Backbone:
    """The network underneath, which gives these maps as well."""
    if missing := set(more) - set(cfg.MODEL.FPN.IN_FEATURES):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.FPN.IN_FEATURES = sorted({*cfg.MODEL.FPN.IN_FEATURES, *missing})
        given = {*cfg.MODEL.RESNETS.OUT_FEATURES, *(missing & _STAGES)}
        cfg.MODEL.RESNETS.OUT_FEATURES = sorted(given)
    return build_bottom_up(cfg, input_shape)


def _blueprint(bottom_up: Backbone, settings: Mapping[str, Any]) -> PyramidBackbone | None:
    """The pyramid that a checkpoint has, without memory for weights; None if there is none.

    Raises:
        ValueError: naming MODEL.FPN.WARM_START_FROM, if it cannot be built on this network.
    """
    if not settings:
        return None
    try:
        with torch.device("meta"):
            return PyramidBackbone(bottom_up, **settings)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"MODEL.FPN.WARM_START_FROM: the checkpoint's pyramid: {error.args[0]}"
        ) from error


def _operator(value: OperatorLike, key: str) -> Operator:
    made = as_operator(value, f"MODEL.FPN.{key}")
    if made is None:
        raise ValueError(f"MODEL.FPN.{key}: None is not an operator")
    return made


def feature_levels(shapes: Mapping[str, ShapeSpec], in_features: Sequence[str]) -> dict[str, int]:
    """The level (log2 of the stride) of each map to read.

    Raises:
        ValueError: naming MODEL.FPN.IN_FEATURES, if a map does not exist, comes twice or out of
            order, or has a stride that is not a power of two.
    """
    where = "MODEL.FPN.IN_FEATURES"
    if not in_features:
        raise ValueError(f"{where}: it is empty; choose from {', '.join(shapes)}")
    levels: dict[str, int] = {}
    for name in in_features:
        if name not in shapes:
            raise ValueError(
                f"{where}: the bottom-up network gives no {name!r}, but {', '.join(shapes)}"
                " (a ResNet gives those that MODEL.RESNETS.OUT_FEATURES lists)"
            )
        stride = shapes[name].stride
        if stride is None or stride < 1 or stride & (stride - 1):
            raise ValueError(
                f"{where}: {name!r} has a stride of {stride} pixels, which is not a power of two"
            )
        levels[name] = stride.bit_length() - 1
    order = list(levels.values())
    if order != sorted(set(order)) or len(levels) != len(in_features):
        raise ValueError(
            f"{where}: {list(in_features)} are of levels {order}: list each level once,"
            " finest first"
        )
    return levels


@BACKBONE_REGISTRY.register()
def build_pyramid_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PyramidBackbone:
    """The builder behind `MODEL.BACKBONE.NAME: build_pyramid_backbone`.

    Args:
        input_shape: of the image; its channels are the first convolution's.

    Raises:
        ValueError: also if a head wants maps that the pyramid does not produce, or `[auto]` was not
            worked out.
    """
    require_resolved(cfg)
    backbone = PyramidBackbone(cfg, input_shape)
    validate_heads(cfg, backbone.output_shape())
    return backbone
