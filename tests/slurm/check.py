"""What tests/slurm/run trains, and how it compares two runs: `check.py make FOLDER`, `check.py
compare ONE OTHER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from tiny import tiny_config, write_dataset  # noqa: E402

ITERATIONS = 150


def make(folder: Path) -> None:
    """Write a dataset, and a config that saves at the end alone."""
    write_dataset(folder)
    none: dict[str, Any] = {"DATASETS__TRAIN": (), "DATASETS__TEST": (), "TEST__EVAL_PERIOD": 0}
    solver = {"MAX_ITER": ITERATIONS, "STEPS": (100,), "BASE_LR": 0.002, "CHECKPOINT_PERIOD": 10**6}
    keys = {f"SOLVER__{name}": value for name, value in solver.items()}
    cfg = tiny_config(folder / "run", DATALOADER__NUM_WORKERS=1, **keys, **none)
    (folder / "CONFIG.yaml").write_text(cfg.dump())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def compare(folders: list[str]) -> str:
    """What the last checkpoints of two runs differ in, or ""."""
    one, other = (torch.load(Path(x, "model_final.pth"), weights_only=False) for x in folders)
    different = [key for key in ("model", "trainer") if not same(one[key], other[key])]
    saved = sorted(file.name for file in Path(folders[1]).glob("model_*.pth"))
    print(
        f"checkpoints: {', '.join(saved)}; weights and state: {different or 'equal, bit for bit'}"
    )
    return "" if not different and len(saved) == 3 else f"they differ: {different}, {saved}"


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        sys.exit(compare(sys.argv[2:]) or 0)
