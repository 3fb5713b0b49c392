"""Which run may write into an OUTPUT_DIR, and what of an older run is removed from it."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from pathlib import Path
from typing import Mapping, Sequence

from detectron2.config import CfgNode

from fpn_plugin.checkpoint.checkpointer import find_checkpoint
from fpn_plugin.checkpoint.run_folder import (
    LEARNED_KEYS,
    METRICS,
    config_changes,
    run_results,
)

logger = logging.getLogger(__name__)

DEMO = "demo.txt"
# A resumed run that differs in one of these sections will not be the run that was interrupted …
_COMPARED = ("MODEL", "DATASETS", "DATALOADER", "INPUT", "SOLVER")
# … except for where it runs, what it no longer reads, and what its batches do not depend on.
_UNCOMPARED = (
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.BOTTOM_UP.WEIGHTS",
    "MODEL.BOTTOM_UP.PIXELS",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.CHECK",
    "DATASETS.OUTSIDE_FILES",
    *LEARNED_KEYS,
)


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
        refuse_results(
            folder,
            results,
            f"Give --resume to go on with that run, --overwrite to replace it, or another {key}",
            key,
        )


def refuse_results(
    folder: str, results: Sequence[Path], advice: str, key: str = "OUTPUT_DIR"
) -> None:
    """Refuse a folder for what it holds.

    Args:
        results: of :func:`run_results`.
        key: the config key of the folder.

    Raises:
        FileExistsError: always.
    """
    names = ", ".join(file.name for file in results[:5]) + (", …" if len(results) > 5 else "")
    raise FileExistsError(f"{key} {folder!r} holds another run's results ({names}). {advice}")


def warn_of_changes(cfg: CfgNode) -> None:
    """Log what `--resume` cannot keep: there is no checkpoint, or the config has changed.

    Raises:
        ValueError: if `OUTPUT_DIR` holds checkpoints of which none is whole.
    """
    checkpoint = find_checkpoint(cfg.OUTPUT_DIR)
    if not checkpoint:
        logger.warning(
            "--resume: no checkpoint in OUTPUT_DIR %s; starting at iteration 0", cfg.OUTPUT_DIR
        )
        return
    if changes := config_changes(cfg.OUTPUT_DIR, cfg, _UNCOMPARED, _COMPARED, checkpoint):
        logger.warning("--resume: the config differs from the run's: %s", "; ".join(changes))


def claim_eval_dir(folder: str) -> str:
    """Create the next free `eval-N` in a folder: an evaluation never touches the run itself."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    number = next(n for n in itertools.count(1) if not Path(folder, f"eval-{n}").exists())
    path = os.path.join(folder, f"eval-{number}")
    os.mkdir(path)
    return path


def remove_old_run(folder: str) -> None:
    """Remove the results of the run in a folder, and nothing else.

    Called right before training, so what the new run has written already stays: config.yaml, the
    log, which is appended to the old run's, and metrics.json, which its writer holds open.
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

    Returns:
        the flags of `fpn train`: none for a new demo, --resume for one that was interrupted
        before its last evaluation ended, --overwrite for one that is finished.

    Raises:
        FileExistsError: if the folder holds the results of a run that this demo did not start.
    """
    root = Path(folder)
    marker, results = root / DEMO, run_results(folder)
    owner = marker.read_text().strip() if marker.is_file() else ""
    if results and owner != demo:
        whose = f"the demo {owner!r}" if owner else "a run that no demo started"
        raise FileExistsError(
            f"--output {str(folder)!r} holds the results of {whose} ({results[0].name}, …), which "
            f"the demo {demo!r} does not replace: choose another folder"
        )
    root.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{demo}\n")
    if not results:
        return []
    return ["--overwrite"] if _is_evaluated(root) else ["--resume"]


def _is_evaluated(root: Path) -> bool:
    """Whether a run was evaluated after its last step: earlier evaluations leave results too."""
    final, results = root / "model_final.pth", root / "inference" / "coco_instances_results.json"
    if not final.is_file() or not results.is_file():
        return False
    return results.stat().st_mtime_ns >= final.stat().st_mtime_ns
