"""Building the network underneath a pyramid: Detectron2's registered backbones, and adapters for
others."""

from __future__ import annotations

import logging
import sys
from typing import Callable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from fpn_plugin.bottom_up.base import AdaptedBackbone
from fpn_plugin.bottom_up.detectron2 import register_builders
from fpn_plugin.bottom_up.names import NAME, check_network_name
from fpn_plugin.bottom_up.norms import convert_norms, freeze_norm_statistics
from fpn_plugin.bottom_up.probe import find_divisor, fits, run_in_evaluation
from fpn_plugin.bottom_up.sta import SpatialTuningBackbone, build_tuned
from fpn_plugin.bottom_up.timm import TimmBackbone
from fpn_plugin.bottom_up.torchvision import TorchvisionBackbone
from fpn_plugin.checkpoint.files import read_shapes
from fpn_plugin.checkpoint.load import KEY, holds_network, load_weights
from fpn_plugin.config.defaults import OWN_BUILDERS
from fpn_plugin.config.heads import head_features, require_resolved_heads, validate_heads
from fpn_plugin.config.pixels import require_pixels
from fpn_plugin.config.validate import deformable_stages, plugin_config
from fpn_plugin.modeling.deformable import build_deformable_resnet
from fpn_plugin.pyramid.norms import accept_single_values

logger = logging.getLogger(__name__)

_TRUSTED = ("detectron2.modeling.", "fpn_plugin.")  # where networks have maps of the right sizes
# Adapters for libraries whose networks are named <library>/<model>. These names are also values of
# MODEL.BOTTOM_UP.WEIGHTS: the weights that the library publishes
LIBRARIES: dict[str, Callable[..., Backbone]] = {
    "timm": TimmBackbone,
    "torchvision": TorchvisionBackbone,
}
ALONE = "build_bottom_up_backbone"  # the network without a pyramid, as MODEL.BACKBONE.NAME
# Builders of whole backbones: they contain a bottom-up network, so they cannot be one
HOLDERS = (
    *OWN_BUILDERS,
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
)


def build_bottom_up(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The network that `MODEL.BOTTOM_UP.NAME` names, with the weights of `MODEL.BOTTOM_UP.WEIGHTS`.

    These are not read where `MODEL.WEIGHTS` is a checkpoint with all of the network's tensors.

    Raises:
        KeyError: if there is no network of that name.
        ImportError: if the network's library is not installed.
        ValueError: if the weights, the norm or the arguments do not fit.
    """
    library, slash, _ = cfg.MODEL.BOTTOM_UP.NAME.partition("/")
    weights = cfg.MODEL.BOTTOM_UP.WEIGHTS
    if weights in LIBRARIES and not (slash and weights == library):
        raise ValueError(
            f"{KEY}: {weights!r} are the weights that {weights} publishes for its own networks, but"
            f" {NAME} is {cfg.MODEL.BOTTOM_UP.NAME!r}: give a file, or take {weights}/<model>"
        )
    is_adapted = bool(slash) and library in LIBRARIES
    checkpoint = read_shapes(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS") if weights else {}
    if weights in LIBRARIES and not checkpoint:
        return _adapted(cfg, input_shape, pretrained=True)
    random_state = torch.get_rng_state()
    bottom_up = _adapted(cfg, input_shape) if is_adapted else _registered(cfg, input_shape)
    if checkpoint and holds_network(bottom_up, checkpoint, _prefixes(cfg)):
        logger.info("%s %s is not read: MODEL.WEIGHTS %s has them", KEY, weights, cfg.MODEL.WEIGHTS)
    elif weights in LIBRARIES:
        torch.set_rng_state(random_state)
        return _adapted(cfg, input_shape, pretrained=True)
    elif weights:
        # no file has the adapter beside a ViT
        tuned = isinstance(bottom_up, SpatialTuningBackbone)
        load_weights(bottom_up.network if tuned else bottom_up, weights)
    return bottom_up


def accept_small_maps(network: nn.Module) -> None:
    """Let the norms of a network take maps of 1x1 pixels of a single image, in place."""
    more: dict[type[nn.Module], type[nn.Module]] = {}
    if "timm.layers" in sys.modules:
        from fpn_plugin.bottom_up.timm_norms import CLASSES

        more = CLASSES
    accept_single_values(network, more)


def probe_maps(cfg: CfgNode, bottom_up: Backbone) -> int:
    """What an image's sides must be divisible by for a network's maps to have the sizes that their
    strides say, in pixels; 0 for no more than it says itself.

    It is tried out on a registered network that is neither Detectron2's nor this plugin's: the
    adapters have tried theirs.

    Raises:
        ValueError: naming the network and a map, if no divisor is known to help.
    """
    if isinstance(bottom_up, AdaptedBackbone) or type(bottom_up).__module__.startswith(_TRUSTED):
        return 0
    unit, name = max(bottom_up.size_divisibility, 1), cfg.MODEL.BOTTOM_UP.NAME
    strides = {
        key: shape.stride
        for key, shape in bottom_up.output_shape().items()
        if shape.stride and (key in cfg.MODEL.FPN.IN_FEATURES or not cfg.MODEL.FPN.IN_FEATURES)
    }
    error: ValueError | None = None

    def map_sizes(height: int, width: int) -> list[torch.Size]:
        nonlocal error
        if height % unit or width % unit:
            raise ValueError("no image of such a size is given to it")
        device = next((p.device for p in bottom_up.parameters()), None)
        x = torch.zeros(1, len(cfg.MODEL.PIXEL_MEAN), height, width, device=device)
        try:
            maps = run_in_evaluation(bottom_up, x)
        except Exception as refused:  # whatever a user's network raises: it is no fault of its maps
            raise ValueError("it does not run here") from refused
        sizes = {key: maps[key].shape[2:] for key in strides}
        for key, stride in strides.items():
            if not error and not fits([sizes[key]], [stride], (height, width)):
                error = wrong_size(name, key, stride, sizes[key], (height, width))
        return list(sizes.values())

    divisor = find_divisor(map_sizes, list(strides.values()))
    if error and not divisor:
        raise error
    return divisor if divisor > unit else 0


def wrong_size(
    network: str, name: str, stride: int, size: Sequence[int], image: Sequence[int]
) -> ValueError:
    """The error for a map of another size than its stride says."""
    right = [-(-side // stride) for side in image]
    return ValueError(
        f"MODEL.BOTTOM_UP.NAME: {network} gives {name!r} of {size[0]} x {size[1]} for an image of"
        f" {image[0]} x {image[1]} pixels, but its stride of {stride} says {right[0]} x {right[1]}:"
        " anchors and boxes would be at other places than the objects. Let the network pad and crop"
        " or resize its maps, or have a larger size_divisibility"
    )


def _prefixes(cfg: CfgNode) -> list[str]:
    """What comes before the network's names in `MODEL.WEIGHTS`, where they are loaded from it.

    A warm start also takes a detector without a pyramid, whose heads have the network's last stage.
    """
    prefix = "backbone." if cfg.MODEL.BACKBONE.NAME == ALONE else "backbone.bottom_up."
    return [prefix, "backbone.", "roi_heads."] if cfg.MODEL.FPN.WARM_START else [prefix]


def _adapted(cfg: CfgNode, input_shape: ShapeSpec, pretrained: bool = False) -> Backbone:
    """A network of another library."""
    library, _, model = cfg.MODEL.BOTTOM_UP.NAME.partition("/")
    args, names = dict(cfg.MODEL.BOTTOM_UP.ARGS), cfg.MODEL.FPN.IN_FEATURES
    sta = args.pop("sta", None)

    def build(out_features: Sequence[str]) -> Backbone:
        return LIBRARIES[library](
            model,
            out_features=out_features,
            freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
            norm=cfg.MODEL.BOTTOM_UP.NORM,
            in_channels=input_shape.channels,
            args=args,
            pretrained=pretrained,
        )

    return build(names) if sta is None else build_tuned(build, sta, names, input_shape.channels)


def _registered(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """A network of Detectron2's registry, built from its own keys."""
    name, norm, args = (cfg.MODEL.BOTTOM_UP[key] for key in ("NAME", "NORM", "ARGS"))
    builder = _builder(name)
    if args and builder.__module__.startswith("detectron2."):
        raise ValueError(
            f"MODEL.BOTTOM_UP.ARGS: {dict(args)}: {name} is Detectron2's own and takes none; its"
            f" keys are MODEL.RESNETS' ({', '.join(sorted(cfg.MODEL.RESNETS))})"
        )
    if name == "build_resnet_backbone" and deformable_stages(cfg):
        builder = build_deformable_resnet
    bottom_up = builder(cfg, input_shape)
    if norm:
        convert_norms(bottom_up, norm, name)
        freeze_norm_statistics(bottom_up)
    return bottom_up


def _builder(name: str) -> Callable[[CfgNode, ShapeSpec], Backbone]:
    register_builders()  # only now, after those of the user
    if name in HOLDERS:
        raise ValueError(
            f"{NAME}: {name!r} is a value of MODEL.BACKBONE.NAME: it holds the network that"
            f" {NAME} names (build_resnet_backbone, timm/<model>, ...)"
        )
    check_network_name(name)
    return BACKBONE_REGISTRY.get(name)


@BACKBONE_REGISTRY.register()
def build_bottom_up_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The bottom-up network alone, for heads without a pyramid: `MODEL.BACKBONE.NAME:
    build_bottom_up_backbone` with IN_FEATURES such as `[res4]`.

    It gives the maps that the heads read; `MODEL.FPN` and `MODEL.RESNETS.OUT_FEATURES` do not
    count.

    Args:
        input_shape: of the image; its channels are the first convolution's.

    Raises:
        ValueError: also if a head wants maps that the network does not give.
    """
    cfg = plugin_config(cfg)
    require_resolved_heads(cfg)
    require_pixels(cfg)
    read = {name for features in head_features(cfg).values() for name in features}
    names = sorted(name for name in read if name.startswith("res"))  # validate_heads has the others
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FPN.IN_FEATURES = names
    cfg.MODEL.RESNETS.OUT_FEATURES = names or cfg.MODEL.RESNETS.OUT_FEATURES
    bottom_up = build_bottom_up(cfg, input_shape)
    accept_small_maps(bottom_up)
    if divisor := probe_maps(cfg, bottom_up):
        raise ValueError(
            f"{NAME}: {cfg.MODEL.BOTTOM_UP.NAME} gives maps of the sizes that their strides say"
            f" for images of multiples of {divisor} pixels alone: give it size_divisibility"
            f" {divisor}"
        )
    validate_heads(cfg, {name: x.stride or 1 for name, x in bottom_up.output_shape().items()})
    return bottom_up
