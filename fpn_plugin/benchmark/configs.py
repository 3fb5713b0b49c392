"""The configs of a benchmark: as given, variants of them, and the baseline of each."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from detectron2.config import CfgNode

from fpn_plugin.checkpoint.run_folder import (
    CONFIG,
    is_python_record,
    metric_lines,
    recorded_config,
)
from fpn_plugin.config.files import find_config_file
from fpn_plugin.engine.run_folder import METRICS
from fpn_plugin.modeling.described import changed_values, load_model_config, run_keys
from fpn_plugin.modeling.python_config import (
    attached,
    is_override,
    is_python_config,
    pretrained_networks,
)

BASELINE = "--baseline"
RUNS = "--runs"
_BY_FLAG = {
    "KEYPOINT_ON": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "MASK_ON": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
}
_BY_ARCHITECTURE = {
    "FCOS": "COCO-Detection/fcos_R_50_FPN_1x.py",
    "GeneralizedRCNN": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "PanopticFPN": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "ProposalNetwork": "COCO-Detection/rpn_R_50_FPN_1x.yaml",
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "SemanticSegmentor": "Misc/semantic_R_50_FPN_1x.yaml",
}
_CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
# keys of MODEL that leave the model the same: where it runs and what it starts from
_NOT_THE_MODEL = ("DEVICE", "WEIGHTS", "BOTTOM_UP.WEIGHTS")


@dataclass(frozen=True)
class BenchmarkConfig:
    """A config that is measured.

    Attributes:
        name: unique in the report.
        cfg: what is built, for the device that was asked for and without weight files.
        source: the file, or the zoo's name.
        overrides: `KEY VALUE …` on top of it.
        references: the names of the configs it is compared with, the baseline first.
        role: "baseline", "config" or "variant".
    """

    name: str
    cfg: CfgNode
    source: str
    overrides: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    role: str = "config"


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


def gather_configs(
    files: Sequence[str],
    opts: Sequence[str] = (),
    variants: Sequence[str] = (),
    baseline: str = "auto",
    baseline_opts: Sequence[str] = (),
    device: str = "cpu",
) -> list[BenchmarkConfig]:
    """Everything that is measured, baselines first.

    Args:
        files: configs.
        opts: `KEY VALUE …` for the configs and their variants, not for the baseline; for Python
            configs `path.key=value …`.
        variants: "NAME: KEY VALUE …" each, measured beside every config.
        baseline: a file, a name of Detectron2's zoo, "none", or "auto" for :func:`zoo_name`.
        baseline_opts: `KEY VALUE …` for the baseline.

    Raises:
        FileNotFoundError: for a config or a baseline that does not exist.
        ValueError: for a variant without a name or two configs of one name, and what
            :func:`load_model_config` raises.
    """
    baselines: dict[str, BenchmarkConfig] = {}
    configs: list[BenchmarkConfig] = []
    files = [find_config_file(file) for file in files]
    kinds = {file: is_python_config(file) for file in files}
    all_opts = opts
    for file, name in zip(files, short_names(files)):
        if len(set(kinds.values())) > 1:  # of files of both kinds each takes its own
            opts = [text for text in all_opts if is_override(text) == kinds[file]]
        cfg = load(file, opts, device)
        references: tuple[str, ...] = ()
        if baseline != "none":
            path = find_baseline(baseline if baseline != "auto" else zoo_name(cfg))
            label = f"baseline {Path(path).stem}"
            references = (label,)
            if label not in baselines:
                source = path if baseline == path else "/".join(Path(path).parts[-2:])
                overrides = tuple(baseline_opts)
                baselines[label] = BenchmarkConfig(
                    label, load(path, overrides, device), source, overrides, role="baseline"
                )
        configs.append(BenchmarkConfig(name, cfg, file, tuple(opts), references))
        for text in variants:
            label, extra = _parse_variant(text)
            overrides = (*opts, *extra)
            configs.append(
                BenchmarkConfig(
                    f"{name} [{label}]",
                    load(file, overrides, device),
                    file,
                    overrides,
                    (*references, name),
                    "variant",
                )
            )
    configs = [*baselines.values(), *configs]
    names = [config.name for config in configs]
    if repeated := sorted(name for name in set(names) if names.count(name) > 1):
        raise ValueError(f"two configs are called {repeated[0]!r}: give them other names")
    return configs


def load(file: str, opts: Sequence[str], device: str) -> CfgNode:
    """A config for `device`, without weight files.

    Raises:
        FileNotFoundError, KeyError, ValueError: what :func:`load_model_config` raises.
    """
    cfg = load_model_config(file, opts)
    cfg.MODEL.DEVICE = device
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BOTTOM_UP.WEIGHTS = ""
    return cfg


def find_baseline(name: str) -> str:
    """The path of a config file, or of a config by its name: first Detectron2's, then ours.

    Raises:
        FileNotFoundError: if it is neither.
    """
    try:
        return find_config_file(name, BASELINE, zoo_first=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} (or say {BASELINE} none)") from None


def short_names(files: Sequence[str]) -> list[str]:
    """The files' names without folders and suffix, with as many folders as tells them apart."""
    all_parts = [Path(file).with_suffix("").parts for file in files]
    names = []
    for parts in all_parts:
        depth = 1
        while depth < len(parts) and sum(p[-depth:] == parts[-depth:] for p in all_parts) > 1:
            depth += 1
        names.append("/".join(parts[-depth:]))
    return names


def _parse_variant(text: str) -> tuple[str, list[str]]:
    label, colon, pairs = text.partition(":")
    words = shlex.split(pairs)
    if not colon or not label.strip() or not words:
        raise ValueError(f"--variant {text!r} is not of the form 'NAME: KEY VALUE KEY VALUE'")
    return label.strip(), words


def read_runs(folders: Sequence[str], configs: Sequence[BenchmarkConfig]) -> list[dict[str, Any]]:
    """The last AP of each training run, and the config with the run's `MODEL` section.

    Returns:
        "folder", "contestant" (the config's name), "dataset" (the test sets), and "AP" by task
        ("bbox", "segm", …) of each.

    Raises:
        FileNotFoundError: if a folder has no metrics.json or config.yaml.
        ValueError: if it was never evaluated, or no config has its model.
    """
    return [_read_run(Path(folder), configs) for folder in folders]


def _read_run(folder: Path, configs: Sequence[BenchmarkConfig]) -> dict[str, Any]:
    for name in (METRICS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{RUNS} {str(folder)!r} has no {name}: it is no run's folder")
    ap: dict[str, float] = {}
    for metrics in metric_lines(str(folder)):
        ap.update({key[: -len("/AP")]: metrics[key] for key in metrics if key.endswith("/AP")})
    if not ap:
        raise ValueError(f"{RUNS} {str(folder)!r}: its metrics.json holds no AP")
    recorded = recorded_config(str(folder))
    test_sets = run_keys(recorded).get("DATASETS.TEST") or []
    differences = {config.name: model_differences(recorded, config.cfg) for config in configs}
    nearest = min(differences, key=lambda name: len(differences[name]))
    if differences[nearest]:
        raise ValueError(
            f"{RUNS} {str(folder)!r} was trained with another model than any config's; the nearest"
            f" is {nearest}, which differs in {', '.join(differences[nearest][:5])}"
        )
    return {
        "folder": str(folder),
        "contestant": nearest,
        "dataset": list(test_sets),
        "AP": ap,
    }


def model_differences(recorded: Mapping[str, Any], cfg: CfgNode) -> list[str]:
    """The keys in which a config's model differs from a run's.

    Args:
        recorded: the run's config.yaml.
    """
    python = attached(cfg)
    if is_python_record(recorded) != (python is not None):
        kinds = ("Python", "YAML") if python is None else ("YAML", "Python")
        return ["everything: the run is of a {} config, this is a {} config".format(*kinds)]
    if python is not None:
        weights = [
            f"{network._get_full_key(None)}.weights" for network in pretrained_networks(python)
        ]
        return list(changed_values(recorded, python, ("model",), weights))
    model = _flatten(recorded.get("MODEL", {}))
    return [
        f"MODEL.{key}"
        for key, value in _flatten(cfg.MODEL).items()
        if key not in _NOT_THE_MODEL and model.get(key, value) != value
    ]


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            values.update(_flatten(value, f"{prefix}{key}."))
        else:
            values[prefix + key] = json.dumps(value)  # tuples become lists, as YAML has them
    return values
