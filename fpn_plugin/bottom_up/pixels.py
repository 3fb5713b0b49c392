"""Pixel mean, deviation and channel order of the weights that a config starts from."""

from __future__ import annotations

import logging
import re
from typing import NamedTuple, Sequence

from detectron2.config import CfgNode, get_cfg

from fpn_plugin.bottom_up.weight_files import KEY, is_remote, read_state_dict
from fpn_plugin.paths import find_file
from fpn_plugin.registry import unknown_name

logger = logging.getLogger(__name__)

CHOICES = ("auto", "config")
_BUILDERS = ("build_pyramid_backbone", "build_bottom_up_backbone")
_TOLERANCE = 1.0  # grey levels: 127 for 127.5 is rounding, not another convention


class Pixels(NamedTuple):
    """What a network takes: `(pixel - mean) / std` per channel, in grey levels of 0...255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: str

    def __str__(self) -> str:
        return (
            f"PIXEL_MEAN {list(self.mean)}, PIXEL_STD {list(self.std)}, INPUT.FORMAT {self.order}"
        )


_MSRA = Pixels((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "BGR")  # the deviation is in conv1
_FAIR = Pixels((103.53, 116.28, 123.675), (57.375, 57.12, 58.395), "BGR")
_TORCHVISION = Pixels((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "RGB")

# Weights that are known by their address; the first that is found in it counts
_ADDRESSES = (
    (r"^catalog://ImageNetPretrained/", _MSRA),  # says Detectron2's ModelCatalog, of all of them
    (r"(^|/)MSRA/R-\d+", _MSRA),
    (r"(^|/)FAIR/(R-\d+-GN|X-152)", _MSRA),
    (r"(^|/)FAIR/X-101|/pycls/", _FAIR),
    (r"(^|/)torchvision/R-\d+|^torchvision://|//download\.pytorch\.org/models/", _TORCHVISION),
    (r"ImageNetPretrained/(MAE|swin|mvitv2)/|/SwinTransformer/storage/", _TORCHVISION),
)


def resolve_pixels(cfg: CfgNode) -> None:
    """Set `MODEL.PIXEL_MEAN`, `PIXEL_STD` and `INPUT.FORMAT` to what the weights were trained with.

    Only where all three stand at Detectron2's defaults, `MODEL.BOTTOM_UP.PIXELS` is "auto" and the
    weights are known; where one differs, the config has set them, and weights that want others are
    a warning. The log says which were taken, and from where. A second call changes nothing.

    Raises:
        KeyError: for an unknown `MODEL.BOTTOM_UP.PIXELS`.
        ValueError: if a file that has to tell is no weight file.
    """
    if cfg.MODEL.BACKBONE.NAME not in _BUILDERS:
        return
    choice = cfg.MODEL.BOTTOM_UP.PIXELS
    if choice not in CHOICES:
        raise unknown_name("MODEL.BOTTOM_UP.PIXELS", choice, CHOICES)
    stated = _stated(cfg)
    if choice == "config":
        logger.info("%s: the config's (MODEL.BOTTOM_UP.PIXELS: config)", stated)
        return
    is_default = stated == _stated(get_cfg())
    wanted, source = _of_weights(cfg)
    _check_stride(cfg, wanted, source)
    if wanted is None:
        logger.info("%s: the config's; %s", stated, source)
    elif is_default:
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(wanted.mean), list(wanted.std)
        cfg.INPUT.FORMAT = wanted.order
        logger.info("%s: taken from %s", wanted, source)
    elif _alike(stated, wanted):
        logger.info("%s: the config's, which agree with %s", stated, source)
    else:
        logger.warning(
            "%s: the config's, but according to %s the weights were trained with %s. Take those,"
            " or say MODEL.BOTTOM_UP.PIXELS: config if the config is right",
            *(stated, source, wanted),
        )


def _check_stride(cfg: CfgNode, wanted: Pixels | None, source: str) -> None:
    """Warn of the other convention in which torchvision's weights differ from Detectron2's."""
    settings = cfg.MODEL.RESNETS
    is_resnet = cfg.MODEL.BOTTOM_UP.NAME == "build_resnet_backbone" and settings.DEPTH >= 50
    if wanted == _TORCHVISION and is_resnet and settings.STRIDE_IN_1X1:
        logger.warning(
            "MODEL.RESNETS.STRIDE_IN_1X1 is True, but according to %s the weights were trained with"
            " False",
            source,
        )


def _stated(cfg: CfgNode) -> Pixels:
    return Pixels(tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD), cfg.INPUT.FORMAT)


def _alike(one: Pixels, other: Pixels) -> bool:
    values, others = (*one.mean, *one.std), (*other.mean, *other.std)
    return (
        one.order == other.order
        and len(values) == len(others)
        and all(abs(a - b) <= _TOLERANCE for a, b in zip(values, others))
    )


def _of_weights(cfg: CfgNode) -> tuple[Pixels | None, str]:
    """What the weights were trained with, and what says so; or None, and why that is not known."""
    name, weights = cfg.MODEL.BOTTOM_UP.NAME, cfg.MODEL.BOTTOM_UP.WEIGHTS
    library, slash, model = name.partition("/")
    # Detectron2 loads MODEL.WEIGHTS into the whole model, later; its names are its own networks'
    if not slash and (pixels := _by_address(cfg.MODEL.WEIGHTS)):
        if weights:
            logger.warning(
                "MODEL.WEIGHTS %s is loaded after %s %s and replaces it: set one of them to ''",
                *(cfg.MODEL.WEIGHTS, KEY, weights),
            )
        return pixels, f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}"
    if not weights:
        return None, f"{KEY} is empty, there are none to follow"
    if pixels := _by_address(weights):
        return pixels, f"{KEY} {weights}"
    unknown = None, f"what {KEY} {weights} was trained with is not known"
    if slash:
        if _style(weights) == "detectron2":
            return None, f"{KEY} {weights} has Detectron2's names, which do not say its own"
        found = _of_timm(model, weights) if library == "timm" else _of_torchvision(model)
        return found or unknown
    style = _style(weights) if "resnet" in name else ""
    if style == "absent":  # an error where it is loaded; an evaluation need not load it
        logger.warning("%s %s is not there to tell how its pixels are scaled", KEY, weights)
    if style == "torchvision":
        return _TORCHVISION, f"torchvision, whose names {KEY} {weights} has"
    return unknown


def _by_address(path: str) -> Pixels | None:
    return next((pixels for pattern, pixels in _ADDRESSES if re.search(pattern, path)), None)


def _style(path: str) -> str:
    """Whose names a local file has for a ResNet: "detectron2", "torchvision" (and timm) or "".

    "absent" if it is not there.
    """
    if is_remote(path) or path in ("timm", "torchvision"):
        return ""
    try:
        find_file(path, KEY)
    except FileNotFoundError:
        return "absent"
    names = " " + " ".join(name.replace(".", " ") for name in read_state_dict(path))
    if " res2 0 conv1 " in names:
        return "detectron2"
    return "torchvision" if " layer1 0 conv1 " in names else ""


def _of_timm(model: str, weights: str) -> tuple[Pixels, str] | None:
    """None also without timm, or for a model that it lacks: what builds the network says so."""
    try:
        from timm.models import get_pretrained_cfg, list_models
    except ImportError:
        return None
    try:
        config = get_pretrained_cfg(model)
    except RuntimeError:  # no such tag
        return None
    if config is None:
        return None
    pixels, name = _scaled(config.mean, config.std), model.partition(".")[0]
    if model == name and weights != "timm":
        tagged = {tag: get_pretrained_cfg(tag) for tag in list_models(f"{name}.*", pretrained=True)}
        others = [t for t, c in tagged.items() if not _alike(_scaled(c.mean, c.std), pixels)]
        if others:
            logger.warning(
                "timm has weights of %s that were trained with other pixel statistics than its %s:"
                " if %s is of %s, name it so in MODEL.BOTTOM_UP.NAME (timm/%s)",
                *(name, config.tag, weights, " or ".join(others[:6]), others[0]),
            )
    return pixels, f"timm's pretrained_cfg of {name}.{config.tag}"


def _of_torchvision(model: str) -> tuple[Pixels, str] | None:
    from torchvision.models import get_model_weights

    try:
        transforms = get_model_weights(model).DEFAULT.transforms()
    except (ValueError, AttributeError):  # no such model, or none of its weights are published
        return None
    mean, std = getattr(transforms, "mean", None), getattr(transforms, "std", None)
    return (_scaled(mean, std), f"torchvision's transforms of {model}") if mean and std else None


def _scaled(mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """From 0...1 to grey levels, without the binary noise of the product."""
    return Pixels(
        tuple(round(255 * value, 3) for value in mean),
        tuple(round(255 * value, 3) for value in std),
        "RGB",
    )
