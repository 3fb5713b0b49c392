"""`learning.py`: what is trained, and its table of means, spreads and differences with the same seed."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from learning import JITTER, TRAININGS, options, rows, training_keys

from fpn_plugin.config.resolve import load_config


def test_only_what_a_training_names_is_on() -> None:
    """The quick start has copy-paste by itself."""
    for name, given in TRAININGS.items():
        opts = options(training_keys(name, 1, 384))
        cfg = load_config(Namespace(config_file="quickstart/mask_rcnn_cells_FPN.yaml", opts=opts))
        assert cfg.INPUT.COPY_PASTE.ENABLED == ("INPUT.COPY_PASTE.ENABLED" in given)
        assert cfg.INPUT.LSJ.ENABLED == (JITTER.keys() <= given.keys())
        assert cfg.SOLVER.LR_SCHEDULER_NAME.startswith("WarmupMulti") == ("cosine" not in name)
        assert cfg.SEED == 1


def test_table(tmp_path: Path) -> None:
    found = {("steps", 0): (10.0, 12.0), ("steps", 1): (14.0, 15.0), ("lsj", 1): (11.0, 11.5)}
    for (name, seed), (plain, augmented) in found.items():
        results = {"bbox": {"AP": plain, "AP50": 50.0}, "bbox_TTA": {"AP": augmented}}
        folder = tmp_path / name / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"as trained": results}))
    (tmp_path / "lsj" / "seed0").mkdir()  # not yet done
    assert list(rows(tmp_path))[2:] == [
        "| steps | as trained | plain | 2 | 12.0 ± 2.8 | +0.0 | +0.0, +0.0 |",
        "| steps | as trained | TTA | 2 | 13.5 ± 2.1 | +1.5 | +2.0, +1.0 |",
        "| lsj | as trained | plain | 1 | 11.0 | -3.0 | -3.0 |",
        "| lsj | as trained | TTA | 1 | 11.5 | -2.5 | -2.5 |",
    ]
