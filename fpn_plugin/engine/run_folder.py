"""Which run may write into an OUTPUT_DIR, and what of an older run is removed from it."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from pathlib import Path

from detectron2.config import CfgNode

from fpn_plugin.engine.checkpoint import find_checkpoint
from fpn_plugin.engine.run_record import METRICS, config_changes, run_results

logger = logging.getLogger(__name__)

DEMO = "demo.txt"
# A resumed run that differs in one of these sections will not be the run that was interrupted …
_COMPARED = ("MODEL", "DATASETS", "DATALOADER", "INPUT", "SOLVER")
# … except for where it runs, what it no longer reads, and what its batches do not depend on.
_UNCOMPARED = (
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.BOTTOM_UP.WEIGHTS",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.CHECK",
    "DATASETS.OUTSIDE_FILES",
)


def claim_output_dir(cfg: CfgNode, resume: bool, overwrite: bool) -> None:
    """Check that a training run may use `OUTPUT_DIR`; nothing in it is changed.

    Args:
        resume: continue the run that is there; without a checkpoint, from the beginning.
        overwrite: replace the run that is there: :func:`remove_old_run` removes it once the new one
            can start.

    Raises:
        FileExistsError: if it holds another run's results and neither flag is given.
        ValueError: if both are given, if `overwrite` would remove `MODEL.WEIGHTS`, or if no
            checkpoint is whole.
    """
    folder = cfg.OUTPUT_DIR
    if resume and overwrite:
        raise ValueError(
            "--resume keeps the run in OUTPUT_DIR and --overwrite removes it: choose one"
        )
    if resume:
        _check_resumed(cfg)
    elif overwrite:
        _check_removable(cfg)
    elif results := run_results(folder):
        names = ", ".join(file.name for file in results[:5]) + (", …" if len(results) > 5 else "")
        raise FileExistsError(
            f"OUTPUT_DIR {folder!r} holds another run's results ({names}). Give --resume to go on "
            "with that run, --overwrite to replace it, or another OUTPUT_DIR"
        )


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
        the flags of tools/train_net.py: none for a new demo, --resume for one that was interrupted
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
            f"the demo {demo!r} does not replace: choose another folder (make demo DEMO=…)"
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


def _check_removable(cfg: CfgNode) -> None:
    files = {file.resolve() for file in run_results(cfg.OUTPUT_DIR)}
    for key, value in (
        ("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS),
        ("MODEL.BOTTOM_UP.WEIGHTS", cfg.MODEL.BOTTOM_UP.WEIGHTS),
    ):
        if value and Path(value).resolve() in files:
            raise ValueError(
                f"{key} {value!r} would be removed by --overwrite: choose another OUTPUT_DIR"
            )


def _check_resumed(cfg: CfgNode) -> None:
    if not find_checkpoint(cfg.OUTPUT_DIR):
        logger.warning(
            "--resume: no checkpoint in OUTPUT_DIR %s; starting at iteration 0", cfg.OUTPUT_DIR
        )
        return
    changed = config_changes(cfg.OUTPUT_DIR, cfg, _UNCOMPARED, _COMPARED)
    if changed:
        logger.warning("--resume: the config differs from the run's: %s", "; ".join(changed))
