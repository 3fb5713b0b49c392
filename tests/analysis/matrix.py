"""A study of the tiny detector: files that its tests write, and its command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "study.py"


def write_config(folder: Path, json_file: Path) -> Path:
    """The tiny detector on its dataset, which needs no registration: it is one's own data."""
    images = str(json_file.parent)
    cfg = tiny_config(folder, DATASETS__TRAIN=(), DATASETS__TEST=(), TEST__EVAL_PERIOD=0)
    cfg.DATASETS.OWN.TRAIN_JSON = cfg.DATASETS.OWN.VAL_JSON = str(json_file)
    cfg.DATASETS.OWN.TRAIN_IMAGES = cfg.DATASETS.OWN.VAL_IMAGES = images
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SEED = 4, 2, -1
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    path = folder / "tiny.yaml"
    path.write_text(cfg.dump())
    return path


def write_study(folder: Path, **values: Any) -> Path:
    """A study file; a value of None leaves the key out."""
    content = {"output": str(folder / "out"), "base": "tiny.yaml", "runs": {"a": {}}, **values}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


def start(study: Path, *args: str) -> subprocess.Popen[str]:
    """The tool, in a process of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), str(study), *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
