"""Pixel mean, deviation and channel order of a config: those of the weights that it starts from."""

from __future__ import annotations

import logging
from typing import Sequence

from detectron2.config import CfgNode, get_cfg

from fpn_plugin.bottom_up import OWN_BUILDERS
from fpn_plugin.bottom_up.pixel_sources import Finding, Pixels, find_pixels
from fpn_plugin.registry import unknown_name

logger = logging.getLogger(__name__)

CHOICES = ("auto", "config")


def resolve_pixels(cfg: CfgNode, checkpoint: str = "") -> list[tuple[int, str]]:
    """Set `MODEL.PIXEL_MEAN`, `PIXEL_STD` and `INPUT.FORMAT` to what the weights were trained with.

    Only where all three stand at Detectron2's defaults, `MODEL.BOTTOM_UP.PIXELS` is "auto" and the
    weights are known; where one differs, the config has set them, and weights that want others are
    a warning. The log says which were taken, and from where. A second call changes nothing.

    Args:
        checkpoint: of the whole model, in the place of `MODEL.WEIGHTS`; a resumed run's.

    Returns:
        what was logged, with its levels.

    Raises:
        KeyError: for an unknown `MODEL.BOTTOM_UP.PIXELS`.
        ValueError: if a file that has to tell is no weight file.
    """
    if cfg.MODEL.BACKBONE.NAME not in OWN_BUILDERS:
        return []
    stated = read_pixels(cfg)
    if not _follows(cfg):
        lines = [(logging.INFO, f"{stated}: the config's (MODEL.BOTTOM_UP.PIXELS: config)")]
    else:
        finding = find_pixels(cfg, checkpoint)
        lines = [(logging.WARNING, text) for text in finding.warnings]
        lines.append(_outcome(stated, finding))
        if finding.pixels and _is_default(stated):
            write_pixels(cfg, finding.pixels)
    log_lines(lines)
    return lines


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


def log_lines(lines: Sequence[tuple[int, str]]) -> None:
    """Log what :func:`resolve_pixels` returned."""
    for level, text in lines:
        logger.log(level, "%s", text)


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
