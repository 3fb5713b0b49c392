"""Pixel mean, deviation and channel order of a config: those of the weights that it starts from."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import NamedTuple, Sequence

from detectron2.config import CfgNode, get_cfg

from fpn_plugin.checkpoint.files import KEY, is_remote, read_shapes, read_weights
from fpn_plugin.checkpoint.run_folder import config_of_checkpoint
from fpn_plugin.config.defaults import OWN_BUILDERS
from fpn_plugin.paths import find_file
from fpn_plugin.registry import unknown_name

logger = logging.getLogger(__name__)

CHOICES = ("auto", "config")
_NOTES = "_fpn_plugin_pixel_notes"
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

    def as_gray(self) -> Pixels:
        """Those of images of one channel, as timm has them."""
        mean, std = (round(sum(values) / len(values), 3) for values in (self.mean, self.std))
        return Pixels((mean,), (std,), "L")

    def is_like(self, other: Pixels) -> bool:
        """Whether both are one convention, rounding aside."""
        values, others = (*self.mean, *self.std), (*other.mean, *other.std)
        return (
            self.order == other.order
            and len(values) == len(others)
            and all(abs(a - b) <= _TOLERANCE for a, b in zip(values, others))
        )


class Finding(NamedTuple):
    """What is known of a config's weights.

    Attributes:
        pixels: what they were trained with, or None if that is not known.
        source: what says so, or why it is not known.
        is_given: whether there are weights at all.
        warnings: what else the user has to know.
    """

    pixels: Pixels | None
    source: str
    is_given: bool = True
    warnings: tuple[str, ...] = ()


_MSRA = Pixels((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "BGR")  # the deviation is in conv1
_FAIR = Pixels((103.53, 116.28, 123.675), (57.375, 57.12, 58.395), "BGR")
_TORCHVISION = Pixels((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "RGB")

_ZOO = r"(^detectron2:/|/detectron2)/(COCO-|LVISv|Cityscapes/|PascalVOC-|Detectron1-)[^?]*_"
# Weights that are known by their address, the first that is found in it counts; and the networks
# whose tensors have the names in them
_ADDRESSES = (
    # says Detectron2's ModelCatalog, of all of them
    (r"^catalog://ImageNetPretrained/", _MSRA, ("resnet",)),
    (r"(^|/)MSRA/R-\d+", _MSRA, ("resnet",)),
    (r"(^|/)FAIR/(R-\d+-GN|X-152)", _MSRA, ("resnet",)),
    (r"(^|/)FAIR/X-101", _FAIR, ("resnet",)),
    (r"/pycls/", _FAIR, ("regnet",)),
    (_ZOO + r"R_(50|101)_", _MSRA, ("resnet",)),
    (_ZOO + r"X_101_", _FAIR, ("resnet",)),
    (
        r"(^|/)torchvision/R-\d+|^torchvision://|//download\.pytorch\.org/models/",
        _TORCHVISION,
        ("resnet",),
    ),
    (
        r"ImageNetPretrained/(MAE|swin|mvitv2)/|/SwinTransformer/storage/",
        _TORCHVISION,
        ("vit", "swin", "mvit"),
    ),
)
_AUTHORS = {"torchvision": _TORCHVISION, "Caffe2": _MSRA}  # of files in Detectron2's format
# Others of the registry may be anything
_KNOWN_BUILDER = re.compile(r"build_(resnet|regnet|swin|mvit|vit)_backbone")
_SKIPPED = "its pixels do not count"


def resolve_pixels(cfg: CfgNode, checkpoint: str = "") -> None:
    """Set `MODEL.PIXEL_MEAN`, `PIXEL_STD` and `INPUT.FORMAT` to what the weights were trained with.

    Only where all three stand at Detectron2's defaults, `MODEL.BOTTOM_UP.PIXELS` is "auto" and the
    weights are known; where one differs, the config has set them, and weights that want others are
    a warning. The log says which were taken, and from where; the config keeps these lines:
    :func:`pixel_notes`. A second call changes nothing.

    Args:
        checkpoint: of the whole model, in the place of `MODEL.WEIGHTS`; a resumed run's.

    Raises:
        KeyError: for an unknown `MODEL.BOTTOM_UP.PIXELS`.
        ValueError: if a file that has to tell is no weight file.
    """
    if cfg.MODEL.BACKBONE.NAME not in OWN_BUILDERS:
        return
    stated = read_pixels(cfg)
    if not _follows(cfg):
        lines = [(logging.INFO, f"{stated}: the config's (MODEL.BOTTOM_UP.PIXELS: config)")]
    else:
        finding = find_pixels(cfg, checkpoint)
        lines = [(logging.WARNING, text) for text in finding.warnings]
        lines.append(_outcome(stated, finding))
        if finding.pixels and _is_default(stated):
            write_pixels(cfg, finding.pixels)
    vars(cfg)[_NOTES] = tuple(lines)
    log_pixels(lines)


def require_pixels(cfg: CfgNode) -> None:
    """Refuse to build a model from a config whose pixels :func:`resolve_pixels` would change.

    Raises:
        ValueError: naming the keys and what to call.
    """
    stated = read_pixels(cfg)
    if cfg.MODEL.BACKBONE.NAME not in OWN_BUILDERS or not _follows(cfg) or not _is_default(stated):
        return
    wanted, source, *_ = find_pixels(cfg)
    if wanted and wanted != stated:
        raise ValueError(
            f"MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, INPUT.FORMAT: they stand at Detectron2's defaults,"
            f" but according to {source} the weights were trained with {wanted}: call"
            " fpn_plugin.resolve_config(cfg) when the config is complete, before the model and the"
            " data are built, or say MODEL.BOTTOM_UP.PIXELS: config if the defaults are right"
        )


def read_pixels(cfg: CfgNode) -> Pixels:
    """What the config says."""
    return Pixels(tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD), cfg.INPUT.FORMAT)


def write_pixels(cfg: CfgNode, pixels: Pixels) -> None:
    """Let the config say them."""
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(pixels.mean), list(pixels.std)
    cfg.INPUT.FORMAT = pixels.order


def pixel_notes(cfg: CfgNode) -> tuple[tuple[int, str], ...]:
    """What the log says of a resolved config's pixels: lines with their levels.

    They are kept beside the config's keys: its copies have them, its dump does not.
    """
    return vars(cfg).get(_NOTES, ())


# An attribute of records in a log that are on the terminal already
FILE_ONLY = "only_in_file"


def log_pixels(lines: Sequence[tuple[int, str]], again: bool = False) -> None:
    """Log :func:`pixel_notes`.

    Args:
        again: for a log's file alone.
    """
    for level, text in lines:
        logger.log(level, "%s", text, extra={FILE_ONLY: again})


def _follows(cfg: CfgNode) -> bool:
    choice = cfg.MODEL.BOTTOM_UP.PIXELS
    if choice not in CHOICES:
        raise unknown_name("MODEL.BOTTOM_UP.PIXELS", choice, CHOICES)
    return choice == "auto"


def _is_default(stated: Pixels) -> bool:
    return stated == read_pixels(get_cfg())


def _outcome(stated: Pixels, finding: Finding) -> tuple[int, str]:
    """The line for the log that says which pixels count."""
    wanted, source = finding.pixels, finding.source
    if wanted and len(stated.mean) == 1:
        wanted = wanted.as_gray()
    if wanted is None:
        # nobody chose them, and nothing says that they fit
        is_risk = finding.is_given and _is_default(stated)
        text = f"{stated}: the config's; {source}"
        if not is_risk:
            return logging.INFO, text
        return logging.WARNING, (
            f"{text}. Set MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT, or say"
            " MODEL.BOTTOM_UP.PIXELS: config if these are right"
        )
    if _is_default(stated):
        return logging.INFO, f"{wanted}: taken from {source}"
    if stated.is_like(wanted):
        return logging.INFO, f"{stated}: the config's, which agree with {source}"
    return logging.WARNING, (
        f"{stated}: the config's, but according to {source} the weights were trained with {wanted}."
        " Take those, or say MODEL.BOTTOM_UP.PIXELS: config if the config is right"
    )


def find_pixels(cfg: CfgNode, checkpoint: str = "") -> Finding:
    """What the weights of a config were trained with; nothing is logged.

    A checkpoint beside the config.yaml of its run comes first: it fills the whole model, and that
    file says what the run took. Then `MODEL.WEIGHTS`, which are loaded last, then the bottom-up
    network's own.

    Args:
        checkpoint: of the whole model, in the place of `MODEL.WEIGHTS`; a resumed run's.

    Raises:
        ValueError: if a file that has to tell is no weight file.
    """
    name, weights, final = cfg.MODEL.BOTTOM_UP.NAME, cfg.MODEL.BOTTOM_UP.WEIGHTS, cfg.MODEL.WEIGHTS
    whole = checkpoint or final
    label = f"MODEL.WEIGHTS {whole}" if whole == final else f"checkpoint {whole}"
    recorded = _recorded(whole)
    if recorded and _network(recorded[1]) == _network(name):
        return Finding(recorded[0], f"the run's config of {label}")
    warnings = []
    pixels, fits = _of_final(final, cfg)
    if recorded:
        warnings.append(f"{label} is of a run with {recorded[1]}, not with {name}: {_SKIPPED}")
    elif not fits:
        warnings.append(f"MODEL.WEIGHTS {final} has no tensor of the network {name}: {_SKIPPED}")
    elif pixels:
        finding = Finding(pixels, f"MODEL.WEIGHTS {final}")
        if weights:
            warnings.append(
                f"{finding.source} is loaded after {KEY} {weights} and replaces it: set one of them"
                " to ''"
            )
        return _warned(finding, cfg, warnings)
    if weights:
        return _warned(_of_bottom_up(name, weights, cfg), cfg, warnings)
    if whole and not recorded and (fits or whole != final):
        unknown = f"what {label} was trained with is not known (no run's config.yaml is beside it)"
        return Finding(None, unknown, True, tuple(warnings))
    none = f"{KEY} is empty, there are none to follow"
    return Finding(None, none, False, tuple(warnings))


def _warned(finding: Finding, cfg: CfgNode, warnings: Sequence[str]) -> Finding:
    """With these warnings, and of the other convention in which torchvision's weights differ."""
    settings = cfg.MODEL.RESNETS
    is_resnet = cfg.MODEL.BOTTOM_UP.NAME == "build_resnet_backbone" and settings.DEPTH >= 50
    stride = (
        "MODEL.RESNETS.STRIDE_IN_1X1 is True, but according to"
        f" {finding.source} the weights were trained with False"
    )
    is_wrong = finding.pixels == _TORCHVISION and is_resnet and settings.STRIDE_IN_1X1
    return finding._replace(warnings=(*warnings, *finding.warnings, *([stride] * is_wrong)))


def _recorded(checkpoint: str) -> tuple[Pixels, str] | None:
    """The pixels and the bottom-up network of the run that wrote a checkpoint, if it is known."""
    try:
        config = config_of_checkpoint(checkpoint)
        model = config["MODEL"]
        mean, std = model["PIXEL_MEAN"], model["PIXEL_STD"]
        pixels = Pixels(tuple(map(float, mean)), tuple(map(float, std)), config["INPUT"]["FORMAT"])
    except (OSError, ValueError, LookupError, TypeError):  # not a run's
        return None
    network = model["BOTTOM_UP"].get("NAME") if "BOTTOM_UP" in model else None
    return pixels, str(network or "build_resnet_backbone")


def _network(name: str) -> str:
    """Without the tag of timm's weights."""
    return name.partition(".")[0]


def _of_final(weights: str, cfg: CfgNode) -> tuple[Pixels | None, bool]:
    """What `MODEL.WEIGHTS` were trained with, and whether they may have the network's tensors."""
    name = cfg.MODEL.BOTTOM_UP.NAME
    # Detectron2 loads them by the names of its own networks
    network = name if "/" in name else (m[1] if (m := _KNOWN_BUILDER.fullmatch(name)) else "")
    if known := _by_address(weights):
        is_librarys = known[0] == _TORCHVISION and "/resne" in network
        return known[0], not network or network in known[1] or is_librarys
    local = weights.partition("?")[0]
    if is_remote(local) or not Path(local).is_file():
        return None, True
    if local.endswith(".pkl"):
        if pixels := _by_author(read_weights(local, "MODEL.WEIGHTS").author, cfg):
            return pixels, network in ("", "resnet")
    elif any(name.startswith("backbone.fpn.") for name in read_shapes(local, "MODEL.WEIGHTS")):
        return _TORCHVISION, True  # the names of its detectors
    return None, True


def _by_address(path: str) -> tuple[Pixels, Sequence[str]] | None:
    return next((row[1:] for row in _ADDRESSES if re.search(row[0], path)), None)


def _by_author(author: str, cfg: CfgNode) -> Pixels | None:
    # Caffe2's ResNeXts come with either deviation
    if author == "Caffe2" and cfg.MODEL.RESNETS.NUM_GROUPS > 1:
        return None
    return _AUTHORS.get(author)


def _of_bottom_up(name: str, weights: str, cfg: CfgNode) -> Finding:
    title = f"{KEY} {weights}"
    if known := _by_address(weights):
        return Finding(known[0], title)
    unknown = Finding(None, f"what {title} was trained with is not known")
    library, slash, model = name.partition("/")
    if not slash and "resnet" not in name:
        return unknown
    style, author = _style(weights)
    if pixels := _by_author(author, cfg):
        return Finding(pixels, f"{title}, whose __author__ is {author}")
    if slash:
        if style == "detectron2":
            return Finding(None, f"{title} has Detectron2's names, which do not say its own")
        finding = _of_timm(model, weights) if library == "timm" else _of_torchvision(model)
        return finding or unknown
    if style == "absent":  # an error where it is loaded; an evaluation need not load it
        return Finding(None, f"{title} is not there to tell how its pixels are scaled")
    if style == "torchvision":
        return Finding(_TORCHVISION, f"torchvision, whose names {title} has")
    return unknown


def _style(path: str) -> tuple[str, str]:
    """Whose names a local file has for a ResNet, and its author.

    "detectron2", "torchvision" (and timm) or ""; "absent" if it is not there.
    """
    if is_remote(path) or path in ("timm", "torchvision"):
        return "", ""
    try:
        find_file(path, KEY)
    except FileNotFoundError:
        return "absent", ""
    file = read_weights(path)
    names = " " + " ".join(name.replace(".", " ") for name in file.tensors)
    if " res2 0 conv1 " in names:
        return "detectron2", file.author
    return "torchvision" if " layer1 0 conv1 " in names else "", file.author


def _of_timm(model: str, weights: str) -> Finding | None:
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
    warnings = []
    if model == name and weights != "timm":
        tagged = {tag: get_pretrained_cfg(tag) for tag in list_models(f"{name}.*", pretrained=True)}
        others = [t for t, c in tagged.items() if not _scaled(c.mean, c.std).is_like(pixels)]
        if others:
            warnings.append(
                f"timm has weights of {name} that were trained with other pixel statistics than its"
                f" {config.tag}: if {weights} is of {' or '.join(others[:6])}, name it so in"
                f" MODEL.BOTTOM_UP.NAME (timm/{others[0]})"
            )
    source = f"timm's pretrained_cfg of {name}.{config.tag}"
    return Finding(pixels, source, warnings=tuple(warnings))


def _of_torchvision(model: str) -> Finding | None:
    from torchvision.models import get_model_weights

    try:
        transforms = get_model_weights(model).DEFAULT.transforms()
    except (ValueError, AttributeError):  # no such model, or none of its weights are published
        return None
    mean, std = getattr(transforms, "mean", None), getattr(transforms, "std", None)
    if not mean or not std:
        return None
    return Finding(_scaled(mean, std), f"torchvision's transforms of {model}")


def _scaled(mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """From 0...1 to grey levels, without the binary noise of the product."""
    return Pixels(
        tuple(round(255 * value, 3) for value in mean),
        tuple(round(255 * value, 3) for value in std),
        "RGB",
    )
