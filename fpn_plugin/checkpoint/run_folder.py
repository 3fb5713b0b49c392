"""What a run left in its folder: its config, its metrics, and whether it has results."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any, Mapping, Sequence

from detectron2.config import CfgNode

from fpn_plugin.checkpoint.checkpointer import TAG, list_checkpoints
from fpn_plugin.checkpoint.record import plain_config, read_record
from fpn_plugin.paths import from_folder
from fpn_plugin.yaml_files import read_yaml

CONFIG = "config.yaml"
METRICS = "metrics.json"
# a result of Detectron2's evaluators among the metrics; a dataset's name may come before it
RESULT_KEY = re.compile(r"(?:^|/)(?:bbox|segm|keypoints|sem_seg|panoptic_seg|box_proposals)/")
# what a run fills in from its training data
LEARNED_KEYS = (
    "DATASETS.CLASSES.NAMES",
    "DATASETS.CLASSES.IDS",
    "DATASETS.KEYPOINTS.NAMES",
    "DATASETS.KEYPOINTS.FLIP_MAP",
    "DATASETS.KEYPOINTS.SKELETON",
)
# where a run and its user's code are, and what it checks, draws and saves on the way: nothing that
# changes its numbers
OUTER_KEYS = (
    "OUTPUT_DIR",
    "IMPORTS",
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.PERSISTENT_WORKERS",
    "DATALOADER.PIN_MEMORY",
    "DATALOADER.PREFETCH_FACTOR",
    "DATASETS.CHECK",
    "DATASETS.OUTSIDE_FILES",
    *LEARNED_KEYS,
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.SIZE_BINS",
    "TEST.VIS_PERIOD",
    "VIS_PERIOD",
)


def run_results(folder: str) -> list[Path]:
    """The results in a folder, which another run would replace.

    A config and a log alone are no results: a run that failed before its first step leaves them.
    """
    root = Path(folder)
    metrics = root / METRICS
    results = [*list_checkpoints(folder), *root.glob("events.out.tfevents.*")]
    results += [root / TAG] if (root / TAG).is_file() else []
    results += [metrics] if metrics.is_file() and metrics.stat().st_size else []
    folders = (root / "inference", root / "inference_TTA")
    results += [results_folder for results_folder in folders if results_folder.is_dir()]
    return sorted(results)


def recorded_config(folder: str) -> dict[str, Any]:
    """The config that the run in a folder was started with, or {} if there is none.

    Raises:
        ValueError: naming the file, if it is no plain YAML.
    """
    path = Path(folder, CONFIG)
    return read_yaml(str(path), objects=True) if path.is_file() else {}


def is_python_record(config: Mapping[str, Any]) -> bool:
    """Whether a run's config, as nested dicts, is what it wrote down of a Python config."""
    model = config.get("model")
    return isinstance(model, Mapping) and "_target_" in model


def config_of_checkpoint(path: str) -> dict[str, Any]:
    """The config of the run that wrote a checkpoint, from its record or else from the config.yaml
    beside it; {} if there is neither, and for a path with a scheme.

    Raises:
        ValueError: naming the config.yaml, if it is no plain YAML.
    """
    if not path or "://" in path:
        return {}
    folder = str(Path(path.partition("?")[0]).parent)
    return read_record(path).get("config") or recorded_config(folder)


def metric_lines(folder: str) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.json; a run that writes or was killed may have cut one.

    A run that resumes after a kill writes its first line behind the rest of the last one.
    """
    path = Path(folder, METRICS)
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        start = text.rfind("{")  # the objects are flat
        with contextlib.suppress(json.JSONDecodeError):
            lines += [json.loads(text[start:])] if start >= 0 else []
    return lines


def config_changes(
    folder: str,
    cfg: CfgNode,
    ignore: Sequence[str],
    sections: Sequence[str] = (),
    checkpoint: str = "",
) -> list[str]:
    """The differences of a config from that of the run in a folder, as texts "KEY old -> new".

    Args:
        ignore: keys that are not compared.
        sections: the first parts of the keys that are compared; empty for all.
        checkpoint: a file whose record goes before the folder's config.yaml, if it has one.
    """
    recorded = read_record(checkpoint).get("config") or recorded_config(folder)
    before, now = flatten(recorded), flatten(plain_config(cfg))
    for key in before:
        if key.startswith("DATASETS.OWN."):  # of a version that did not write them as absolute
            before[key] = from_folder(before[key])
    keys = [key for key in now if key not in ignore]
    keys = [key for key in keys if not sections or key.split(".")[0] in sections]
    # a key that the record lacks is newer than the run
    changed = [key for key in keys if before.get(key, now[key]) != now[key]]
    return [f"{key} {before[key]!r} -> {now[key]!r}" for key in changed]


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config by their full keys, with dots."""
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        leaves.update(
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return leaves
