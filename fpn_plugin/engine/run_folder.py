"""What a run leaves in its OUTPUT_DIR, and who may write there."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, Mapping, Sequence

import yaml
from detectron2.config import CfgNode

from fpn_plugin.config_files import read_yaml
from fpn_plugin.engine.checkpoint import TAG, find_checkpoint, list_checkpoints

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
METRICS = "metrics.json"
DEMO = "demo.txt"
# a result of Detectron2's evaluators among the metrics, after a dataset's name if there are several
RESULT_KEY = re.compile(r"(?:^|/)(?:bbox|segm|keypoints|sem_seg|panoptic_seg|box_proposals)/")
# A resumed run that differs in one of these sections will not be the run that was interrupted …
_COMPARED = ("MODEL", "DATASETS", "DATALOADER", "INPUT", "SOLVER")
# … except for where it runs, what it no longer reads, and what its batches do not depend on.
_FREE = (
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.BOTTOM_UP.WEIGHTS",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.CHECK",
    "DATASETS.OUTSIDE_FILES",
)
# where a run runs, and what is looked at and kept on the way: its numbers do not depend on them
OUTER_KEYS = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "DATALOADER.CACHE_IMAGES",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.PERSISTENT_WORKERS",
    "DATALOADER.PIN_MEMORY",
    "DATALOADER.PREFETCH_FACTOR",
    "DATASETS.CHECK",
    "DATASETS.OUTSIDE_FILES",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.SIZE_BINS",
    "TEST.VIS_PERIOD",
    "VIS_PERIOD",
)


def run_results(folder: str) -> list[Path]:
    """What would be lost if another run wrote into this folder.

    A config and a log alone are no results: a run that failed before its first step leaves them.
    """
    root = Path(folder)
    tag, metrics = root / TAG, root / METRICS
    found = [*list_checkpoints(folder), *root.glob("events.out.tfevents.*")]
    found += [tag] if tag.is_file() else []
    found += [metrics] if metrics.is_file() and metrics.stat().st_size else []
    found += [root / "inference"] if (root / "inference").is_dir() else []
    return sorted(found)


def claim_output_dir(
    folder: str, key: str, weights: Mapping[str, str], resume: bool, overwrite: bool
) -> None:
    """Check that a training run may write to its folder; nothing in it is changed.

    Args:
        key: the config key of the folder, for messages: OUTPUT_DIR, for instance.
        weights: paths that the run reads weights from, by their config keys.
        resume: go on with the run that is there.
        overwrite: replace the run that is there. :func:`remove_old_run` does so later, once the new
            run can start.

    Raises:
        FileExistsError: if it holds another run's results and neither flag is given.
        ValueError: if both flags are given, or `overwrite` would remove the run's own weights.
    """
    if resume and overwrite:
        raise ValueError(f"--resume keeps the run in {key} and --overwrite removes it: choose one")
    if resume:
        return
    results = run_results(folder)
    if overwrite:
        files = {file.resolve() for file in results}
        for name, path in weights.items():
            if path and Path(path).resolve() in files:
                raise ValueError(
                    f"{name} {path!r} would be removed by --overwrite: choose another {key}"
                )
    elif results:
        names = ", ".join(file.name for file in results[:5]) + (", …" if len(results) > 5 else "")
        raise FileExistsError(
            f"{key} {folder!r} holds another run's results ({names}). Give --resume to go on with"
            f" that run, --overwrite to replace it, or another {key}"
        )


def warn_of_changes(cfg: CfgNode) -> None:
    """Log what `--resume` cannot keep: there is no checkpoint, or the config has changed.

    Raises:
        ValueError: if `OUTPUT_DIR` holds checkpoints of which none is whole.
    """
    if not find_checkpoint(cfg.OUTPUT_DIR):
        logger.warning(
            "--resume: no checkpoint in OUTPUT_DIR %s; starting at iteration 0", cfg.OUTPUT_DIR
        )
        return
    if changes := config_changes(cfg.OUTPUT_DIR, cfg, _FREE, _COMPARED):
        logger.warning("--resume: the config differs from the run's: %s", "; ".join(changes))


def claim_eval_dir(folder: str) -> str:
    """Create the next free `eval-N` in a folder: an evaluation never touches the run itself."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    number = next(n for n in itertools.count(1) if not Path(folder, f"eval-{n}").exists())
    path = os.path.join(folder, f"eval-{number}")
    os.mkdir(path)
    return path


def recorded_config(folder: str) -> dict[str, Any]:
    """The config that the run in a folder was started with, or {} if there is none.

    Raises:
        ValueError: naming the file, if it is no plain YAML.
    """
    path = Path(folder, CONFIG)
    return read_yaml(str(path)) if path.is_file() else {}


def metric_lines(folder: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.json, as far as they are whole: a run may be at work, or killed.

    A run that goes on after it was killed writes its first line behind what was left of the last.
    """
    path = Path(folder, METRICS)
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        start = line.rfind("{")  # the objects are flat
        with contextlib.suppress(json.JSONDecodeError):
            found += [json.loads(line[start:])] if start >= 0 else []
    return found


def config_changes(
    folder: str, cfg: CfgNode, free: Sequence[str], sections: Sequence[str] = ()
) -> list[str]:
    """What a config has otherwise than that of the run in a folder, as texts "KEY old -> new".

    Args:
        free: keys that do not count.
        sections: the first parts of the keys that count; none: all.
    """
    before, now = flatten(recorded_config(folder)), flatten(yaml.safe_load(cfg.dump()))
    keys = [key for key in now if key not in free]
    keys = [key for key in keys if not sections or key.split(".")[0] in sections]
    # a key that the record lacks is newer than the run
    changed = [key for key in keys if before.get(key, now[key]) != now[key]]
    return [f"{key} {before[key]!r} -> {now[key]!r}" for key in changed]


def remove_old_run(folder: str) -> None:
    """Remove the results of the run that a folder holds, and nothing else that lies there.

    For a trainer that is about to train. What its start has written already stays: config.yaml,
    the log, which goes on below the old run's, and metrics.json, which its writer holds open.
    """
    removed = run_results(folder)
    for file in removed:
        if file.name == METRICS:
            os.truncate(file, 0)
        elif file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()
    if removed:
        logger.info("--overwrite: removed %s from %s", ", ".join(f.name for f in removed), folder)


def claim_demo_dir(folder: str, demo: str) -> list[str]:
    """Mark a folder as a demo's, or refuse.

    Args:
        demo: the demo's name.

    Returns:
        the flags of tools/train_net.py: none for a new demo, --resume for one that was interrupted
        before its last evaluation ended, --overwrite for one that is finished.

    Raises:
        FileExistsError: if the folder holds the results of a run that this demo did not start.
    """
    root = Path(folder)
    marker, found = root / DEMO, run_results(folder)
    owner = marker.read_text().strip() if marker.is_file() else ""
    if found and owner != demo:
        whose = f"the demo {owner!r}" if owner else "a run that no demo started"
        raise FileExistsError(
            f"--output {str(folder)!r} holds the results of {whose} ({found[0].name}, …), which "
            f"the demo {demo!r} does not replace: choose another folder (make demo DEMO=…)"
        )
    root.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{demo}\n")
    if not found:
        return []
    return ["--overwrite"] if _is_evaluated(root) else ["--resume"]


def _is_evaluated(root: Path) -> bool:
    """Whether a run ended, and with an evaluation: earlier ones leave their results as well."""
    final, results = root / "model_final.pth", root / "inference" / "coco_instances_results.json"
    if not final.is_file() or not results.is_file():
        return False
    return results.stat().st_mtime_ns >= final.stat().st_mtime_ns


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config by their keys, with dots."""
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        leaves.update(
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return leaves
