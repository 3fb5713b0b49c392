"""PyramidBackbone: a bottom-up network and a pyramid as one Detectron2 backbone. Shapes are `(N, C,
H, W)`."""

from __future__ import annotations

from typing import Any, Dict, Mapping, MutableMapping, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ResNet
from torch import Tensor, nn

from fpn_plugin.bottom_up.probe import fits
from fpn_plugin.config.defaults import GONE
from fpn_plugin.config.heads import (
    are_heads_checked,
    head_size_divisibility,
    require_resolved_heads,
    validate_heads,
)
from fpn_plugin.config.pixels import require_pixels
from fpn_plugin.config.settings import (
    SECTION,
    PyramidSettings,
    is_names,
    make_settings,
    read_settings,
)
from fpn_plugin.config.validate import keys_in_errors, plugin_config
from fpn_plugin.config.warm_start import FROM, warm_settings
from fpn_plugin.modeling.bottom_up import (
    accept_small_maps,
    build_bottom_up,
    probe_maps,
    wrong_size,
)
from fpn_plugin.modeling.recursion import FeedbackResNet, RecursivePyramid
from fpn_plugin.pyramid.fused import is_traced
from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.pyramid.warm import combine
from fpn_plugin.registry import bad_argument

# the maps of Detectron2's ResNet after its stem
_STAGES = frozenset(("res2", "res3", "res4", "res5"))


class PyramidBackbone(GraphExecutor, Backbone):
    """A bottom-up network and the pyramid on its maps.

    The defaults build Detectron2's `FPN` (arXiv:1612.03144) with its parameter names, so its
    checkpoints load.

    Args:
        bottom_up: the network whose maps the pyramid reads.
        in_features: the maps to read, from high to low resolution.
        out_channels: channels of every pyramid map.
        settings: the pyramid's settings as one record, in place of their fields.
        size_divisibility: the divisor of the image's sides that the heads need, if it is larger
            than the pyramid's.
        square_pad: if > 0, images are padded to squares of this size.
        recompute: whether training recomputes nodes with weighted fusions, and steps, in the
            backward pass instead of keeping their intermediate results.
        warm_from: a pyramid on the same network, whose function this one has at its start (see
            `warm.py`); only its structure is used, not its weights.
        arguments: further fields of `PyramidSettings`, such as `topology="bifpn"`; docs/config.md
            explains them under the names of their keys, `MODEL.FPN.TOPOLOGY`.

    Attributes:
        settings: the pyramid's settings.
        warm_start: the two pyramids as one; None without `warm_from`.
        rfp: the further runs of a recursive pyramid (`rfp_steps`); None for a single one.

    Raises:
        ValueError: (KeyError for an unknown name) naming the argument or node, the value and what
            is valid.
        TypeError: for an unknown argument.
    """

    # Detectron2's ResNet keeps its stages in a plain list, which TorchScript refuses
    _unrolled = (ResNet, RecursivePyramid, FeedbackResNet)

    @configurable
    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str] | None = None,
        out_channels: int | None = None,
        *,
        settings: PyramidSettings | None = None,
        size_divisibility: int = 0,
        square_pad: int = 0,
        recompute: bool = False,
        warm_from: PyramidBackbone | None = None,
        **arguments: Any,
    ) -> None:
        features = {"in_features": in_features, "out_channels": out_channels}
        given = {name: value for name, value in features.items() if value is not None}
        settings = _settings(settings, {**given, **arguments})
        shapes = bottom_up.output_shape()
        levels = _feature_levels(shapes, settings)
        graph = settings.build_graph(levels)
        defaults = settings.defaults()
        channels = {name: shape.channels for name, shape in shapes.items()}
        settings.refuse_unread(levels, channels)
        warm = None
        if warm_from is not None:
            _check_steps(warm_from.settings.rfp_steps, settings.rfp_steps)
            warm = combine((warm_from.graph, warm_from.defaults), (graph, defaults), channels)
        whole, per_node = (warm.graph, warm.per_node) if warm else (graph, None)
        inputs = {name: channels[name] for name in whole.inputs}
        super().__init__(whole, inputs, defaults, per_node)
        self.settings: PyramidSettings = settings
        self.warm_start = warm
        self.bottom_up = bottom_up
        accept_small_maps(bottom_up)
        self.rfp = self._further_runs()
        self._square_pad = square_pad
        self.recompute = recompute
        # a warm start pads images as the checkpoint does, or it would not compute its function
        padding_graph = warm_from.graph if warm_from is not None else graph
        self._size_divisibility = max(
            padding_graph.size_divisibility(), bottom_up.size_divisibility, size_divisibility
        )

    def _further_runs(self) -> RecursivePyramid | None:
        steps, graph = self.settings.rfp_steps, self.graph
        if steps == 1:
            return None
        levels = {name: graph.level(node) for name, node in graph.output_names().items()}
        width = self.defaults.channels
        return RecursivePyramid(self.bottom_up, steps, width, list(graph.inputs), levels)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """The constructor's arguments, from `MODEL.FPN` and `MODEL.BOTTOM_UP`."""
        cfg = plugin_config(cfg)
        settings, old = read_settings(cfg), warm_settings(cfg)
        settings.check()  # before the network is built, which may take long
        bottom_up = _build_network(cfg, input_shape, old.in_features if old else ())
        return {
            "bottom_up": bottom_up,
            "settings": settings,
            "size_divisibility": max(head_size_divisibility(cfg), probe_maps(cfg, bottom_up)),
            "recompute": cfg.MODEL.FPN.RECOMPUTE,
            "warm_from": _blueprint(bottom_up, old),
        }

    @property
    def size_divisibility(self) -> int:
        """The image's height and width must be divisible by it, in pixels; 0 for any size."""
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
        features = self.bottom_up(x)
        if isinstance(x, Tensor) and not is_traced():  # no proxy of torch.fx
            self._check_sizes(features, x)
        maps = self._run(features)
        return maps if self.rfp is None else self.rfp(x, maps, self._run)

    def _check_sizes(self, features: Mapping[str, Tensor], x: Tensor) -> None:
        """Refuse maps whose places are not those that their strides say.

        Raises:
            ValueError: naming the map, its size, and the image's.
        """
        image = x.shape[2:]
        if any(side % max(self._size_divisibility, 1) for side in image):
            return  # not padded as it should be
        for name, level in self.graph.inputs.items():
            size = features[name].shape[2:]
            if not fits([size], [2**level], image):
                raise wrong_size(type(self.bottom_up).__name__, name, 2**level, size, image)

    def complete_state(self, state: MutableMapping[str, Tensor], prefix: str) -> None:
        """Add to a state dict, in place, what it lacks and other tensors of it say: the weights of
        a recursive pyramid's further networks, which begin as the first.

        Args:
            prefix: before the backbone's names in it.
        """
        if self.rfp is not None:
            self.rfp.copy_weights(state, f"{prefix}rfp.", f"{prefix}bottom_up.")

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Tensor], prefix: str, *rest: Any
    ) -> None:
        self.complete_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __prepare_scriptable__(self) -> nn.Module:
        module = super().__prepare_scriptable__()
        # what Detectron2's models read from a scripted backbone
        for name in ("size_divisibility", "padding_constraints"):
            setattr(module, name, getattr(self, name))
        return module


def _settings(settings: PyramidSettings | None, arguments: Mapping[str, Any]) -> PyramidSettings:
    """The settings as one record, from the record itself or from its fields.

    Raises:
        ValueError: for an argument that is gone.
        TypeError: for both, or an unknown argument.
    """
    for name, value in arguments.items():
        if gone := GONE.get(f"{SECTION}.{name.upper()}"):
            text = f"{value!r} is given, but the argument is gone: {gone.reason}. Remove it"
            raise bad_argument(name, text)
    if settings is None:
        return make_settings(**arguments)
    if not isinstance(settings, PyramidSettings) or arguments:
        raise TypeError(
            f"settings: {settings!r} is not a PyramidSettings alone: give such a record, or its"
            f" fields by name ({', '.join(arguments) or 'in_features=..., out_channels=...'})"
        )
    return settings


def _check_steps(old: int, new: int) -> None:
    """Refuse a warm start that would lose the further runs of the old pyramid."""
    if old not in (1, new):
        raise bad_argument(
            "warm_from",
            f"its pyramid runs {old} times (RFP_STEPS), which a start with `rfp_steps` {new} would"
            f" not compute: take {old}",
        )


def _build_network(cfg: CfgNode, input_shape: ShapeSpec, more: Sequence[str]) -> Backbone:
    """The bottom-up network.

    Args:
        more: maps that it returns in addition to `MODEL.FPN.IN_FEATURES`.
    """
    if missing := set(more) - set(cfg.MODEL.FPN.IN_FEATURES):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.FPN.IN_FEATURES = sorted({*cfg.MODEL.FPN.IN_FEATURES, *missing})
        stages = {*cfg.MODEL.RESNETS.OUT_FEATURES, *(missing & _STAGES)}
        cfg.MODEL.RESNETS.OUT_FEATURES = sorted(stages)
    return build_bottom_up(cfg, input_shape)


def _blueprint(bottom_up: Backbone, settings: PyramidSettings | None) -> PyramidBackbone | None:
    """The pyramid of the checkpoint, on the meta device; None without a checkpoint.

    Raises:
        ValueError: naming MODEL.FPN.WARM_START_FROM, if it cannot be built on this network.
    """
    if settings is None:
        return None
    try:
        with torch.device("meta"):
            return PyramidBackbone(bottom_up, settings=settings)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{FROM}: the checkpoint's pyramid: {error}") from error


def _feature_levels(shapes: Mapping[str, ShapeSpec], settings: PyramidSettings) -> dict[str, int]:
    """The level (log2 of the stride) of each map to read.

    Raises:
        ValueError: naming `in_features`, if a map does not exist, comes twice or out of order, or
            has a stride that is not a power of two. Several maps of one level are the topology's to
            take or to refuse.
    """
    names, argument = settings.in_features, "in_features"
    if not is_names(names):
        raise bad_argument(argument, f"{names!r} is not a list of names")
    if not names:
        raise bad_argument(argument, f"it is empty; choose from {', '.join(shapes)}")
    levels: dict[str, int] = {}
    for name in names:
        if name not in shapes:
            raise bad_argument(
                argument,
                f"the bottom-up network gives no {name!r}, but {', '.join(shapes)}"
                " (a ResNet gives those that MODEL.RESNETS.OUT_FEATURES lists)",
            )
        stride = shapes[name].stride
        if stride is None or stride < 1 or stride & (stride - 1):
            raise bad_argument(
                argument, f"{name!r} has a stride of {stride} pixels, which is not a power of two"
            )
        levels[name] = stride.bit_length() - 1
    order = list(levels.values())
    if order != sorted(order) or len(levels) != len(names):
        raise bad_argument(
            argument,
            f"{list(names)} are of levels {order}: list each level once, or several maps of one,"
            " finest first",
        )
    return levels


@BACKBONE_REGISTRY.register()
def build_pyramid_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PyramidBackbone:
    """The builder behind `MODEL.BACKBONE.NAME: build_pyramid_backbone`.

    The heads are checked against the pyramid once :func:`fpn_plugin.resolve_config` was called;
    without it the backbone is built alone, whatever the heads' keys say.

    Args:
        input_shape: of the image; its channels are the first convolution's.

    Raises:
        ValueError: (KeyError for an unknown name) naming the key, the value and what is valid; also
            if something that :func:`fpn_plugin.resolve_config` would replace is in the config.
    """
    cfg = plugin_config(cfg)
    require_resolved_heads(cfg)
    require_pixels(cfg)
    with keys_in_errors():
        backbone = PyramidBackbone(cfg, input_shape)
    if are_heads_checked(cfg):
        validate_heads(cfg, {name: x.stride or 1 for name, x in backbone.output_shape().items()})
    return backbone
