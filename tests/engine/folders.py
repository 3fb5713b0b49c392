"""Output folders of runs, filled and compared, and the command line that claims them."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any, Iterable

from detectron2.config import CfgNode
from tiny import TRAIN, VAL

from fpn_plugin.engine.setup import argument_parser, setup

RUN_FILES = (
    "model_0000001.pth",
    "last_checkpoint",
    "metrics.json",
    "events.out.tfevents.1",
    "inference/a.json",
)
MINE = ("notes.txt", "pretrained.pth", "eval-1/a.json", "sub/model_final.pth", "model_mine.pth")
DATA = ("DATASETS.TRAIN", f"('{TRAIN}',)", "DATASETS.TEST", f"('{VAL}',)")


def fill(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def digest(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def run_setup(*args: str) -> CfgNode:
    """What a command line gives; flags first, and config overrides last."""
    return setup(argument_parser().parse_args(list(args)))


def load_tool(name: str) -> Any:
    path = Path(__file__).parents[2] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool
