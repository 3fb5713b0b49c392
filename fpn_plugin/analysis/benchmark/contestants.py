"""Who takes part, as data: configs, variants of them, and the baseline that each is measured by."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from detectron2 import model_zoo
from detectron2.config import CfgNode

from fpn_plugin.config import load_config

BASELINE = "--baseline"
_BY_FLAG = {
    "KEYPOINT_ON": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "MASK_ON": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
}
_BY_ARCHITECTURE = {
    "GeneralizedRCNN": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "PanopticFPN": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "ProposalNetwork": "COCO-Detection/rpn_R_50_FPN_1x.yaml",
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "SemanticSegmentor": "Misc/semantic_R_50_FPN_1x.yaml",
}
_CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"


@dataclass(frozen=True)
class Contestant:
    """A config that takes part.

    Attributes:
        name: unique in the report.
        cfg: what is built, for the device that was asked for and without weight files.
        source: the file, or the zoo's name.
        overrides: `KEY VALUE …` on top of it.
        references: the names of those that it is compared with, the baseline first.
        kind: "baseline", "config" or "variant".
    """

    name: str
    cfg: CfgNode
    source: str
    overrides: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    kind: str = "config"


def zoo_name(cfg: CfgNode) -> str:
    """The config of Detectron2's zoo with the same head.

    Raises:
        ValueError: naming the key, if the zoo has none.
    """
    model = cfg.MODEL
    if model.META_ARCHITECTURE not in _BY_ARCHITECTURE:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE: {model.META_ARCHITECTURE!r} has no counterpart in"
            f" Detectron2's zoo; name one with {BASELINE}, or say {BASELINE} none"
        )
    if model.META_ARCHITECTURE == "GeneralizedRCNN":
        if model.ROI_HEADS.NAME == "CascadeROIHeads":
            return _CASCADE
        for flag, name in _BY_FLAG.items():
            if model[flag]:
                return name
    return _BY_ARCHITECTURE[model.META_ARCHITECTURE]


def gather(
    files: Sequence[str],
    opts: Sequence[str] = (),
    variants: Sequence[str] = (),
    baseline: str = "auto",
    baseline_opts: Sequence[str] = (),
    device: str = "cpu",
) -> list[Contestant]:
    """Everyone who takes part, baselines first.

    Args:
        files: configs.
        opts: `KEY VALUE …` for the configs and their variants, not for the baseline.
        variants: "NAME: KEY VALUE …" each, a further contestant for every config.
        baseline: a file, a name of Detectron2's zoo, "none", or "auto" for :func:`zoo_name`.
        baseline_opts: `KEY VALUE …` for the baseline.

    Raises:
        FileNotFoundError: for a config or a baseline that does not exist.
        ValueError: for a variant without a name or two contestants of one name, and what
            :func:`load_config` raises.
    """
    baselines: dict[str, Contestant] = {}
    others: list[Contestant] = []
    for file, name in zip(files, short_names(files)):
        cfg = load(file, opts, device)
        first = ""
        if baseline != "none":
            path = find_baseline(baseline if baseline != "auto" else zoo_name(cfg))
            first = f"baseline {Path(path).stem}"
            if first not in baselines:
                made = load(path, baseline_opts, device)
                source = path if baseline == path else "/".join(Path(path).parts[-2:])
                baselines[first] = Contestant(
                    first, made, source, tuple(baseline_opts), kind="baseline"
                )
        references = (first,) if first else ()
        others.append(Contestant(name, cfg, file, tuple(opts), references))
        for text in variants:
            label, extra = _variant(text)
            both = (*opts, *extra)
            cfg = load(file, both, device)
            both_of = (*references, name)
            others.append(Contestant(f"{name} [{label}]", cfg, file, both, both_of, "variant"))
    everyone = [*baselines.values(), *others]
    names = [one.name for one in everyone]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two contestants are called {sorted(twice)[0]!r}: give them other names")
    return everyone


def load(file: str, opts: Sequence[str], device: str) -> CfgNode:
    """A config for `device`, without weight files.

    Raises:
        FileNotFoundError, KeyError, ValueError: what :func:`load_config` raises.
    """
    cfg = load_config(argparse.Namespace(config_file=file, opts=list(opts)))
    cfg.MODEL.DEVICE = device
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BOTTOM_UP.WEIGHTS = ""
    return cfg


def find_baseline(name: str) -> str:
    """The path of a config file, or of a config of Detectron2's zoo with or without `.yaml`.

    Raises:
        FileNotFoundError: if it is neither.
    """
    if os.path.isfile(name):
        return name
    for candidate in (name, f"{name}.yaml"):
        try:
            return model_zoo.get_config_file(candidate)
        except RuntimeError:  # "not available in Model Zoo"
            continue
    raise FileNotFoundError(
        f"{BASELINE} {name!r} is neither a file nor a config of Detectron2's zoo such as"
        f" {_BY_FLAG['MASK_ON'].removesuffix('.yaml')}; or say {BASELINE} none"
    )


def short_names(files: Sequence[str]) -> list[str]:
    """The files' names without folders and suffix, with as many folders as tells them apart."""
    parts = [Path(file).with_suffix("").parts for file in files]
    names = []
    for own in parts:
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        names.append("/".join(own[-depth:]))
    return names


def _variant(text: str) -> tuple[str, list[str]]:
    label, colon, pairs = text.partition(":")
    words = shlex.split(pairs)
    if not colon or not label.strip() or not words:
        raise ValueError(f"--variant {text!r} is not of the form 'NAME: KEY VALUE KEY VALUE'")
    return label.strip(), words
