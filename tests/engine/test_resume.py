"""A run that is killed and resumed gives what an unbroken one gives, bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from child import train, train_together
from detectron2.config import CfgNode
from detectron2.engine import launch

from fpn_plugin.engine.trainer import Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw-ungrouped-two-workers": {
        "SOLVER__OPTIMIZER": "AdamW",
        "SOLVER__BASE_LR": 1e-3,
        "DATALOADER__ASPECT_RATIO_GROUPING": False,
        "DATALOADER__NUM_WORKERS": 2,
    },
    "bf16-repeat-factor-two-workers": {
        "SOLVER__AMP__ENABLED": True,
        "MODEL__CHANNELS_LAST": True,
        "DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
        "DATALOADER__NUM_WORKERS": 2,
        "SEED": -1,
    },
    # SGD without workers; its focal loss is TorchScript, and its loss has a running normaliser
    "retinanet": {
        "MODEL__META_ARCHITECTURE": "RetinaNet",
        "MODEL__BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone",
        "MODEL__RESNETS__OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL__FPN__IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL__RETINANET__NUM_CLASSES": 2,
        "SOLVER__BASE_LR": 1e-3,
    },
}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Two nested states are equal to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{number}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def final_state(folder: Path) -> dict[str, Any]:
    state = torch.load(folder / "model_final.pth")
    assert set(state) == {"model", "trainer", "iteration"}
    assert {"SeedHook", "LRScheduler"} <= set(state["trainer"]["hooks"])
    assert state["trainer"]["_trainer"]["optimizer"]["state"]
    return state


@pytest.mark.parametrize("name", VARIANTS)
def test_killed_and_resumed(name: str, dataset: Path, tmp_path: Path) -> None:
    overrides = VARIANTS[name]
    script = str(Path(__file__).with_name("child.py"))
    command = [sys.executable, script, str(dataset), str(tmp_path / "killed"), repr(overrides)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (tmp_path / "killed" / "last_checkpoint").read_text() == "model_0000002.pth"
    # With a negative SEED the killed run drew one, and the resumed run draws another until it
    # finds the first.
    seed = torch.load(tmp_path / "killed" / "model_0000002.pth")["trainer"]["hooks"]["SeedHook"][
        "seed"
    ]

    trainer = train(tmp_path / "killed", overrides, resume=True)
    assert trainer.start_iter == 3 and trainer.cfg.SEED == seed
    train(tmp_path / "unbroken", {**overrides, "SEED": seed})
    assert_same(final_state(tmp_path / "killed"), final_state(tmp_path / "unbroken"))


def test_two_processes_on_the_cpu(dataset: Path, tmp_path: Path) -> None:
    overrides = {"SOLVER__MAX_ITER": 3, "SOLVER__CHECKPOINT_PERIOD": 2}
    for output, resume in ((tmp_path / "whole", False), (tmp_path / "broken", True)):
        if resume:  # as if killed after the checkpoint of the second iteration
            output.mkdir()
            (output / "model_0000001.pth").write_bytes(
                (tmp_path / "whole" / "model_0000001.pth").read_bytes()
            )
        launch(
            train_together, 2, dist_url="auto", args=(str(dataset), str(output), overrides, resume)
        )
    # Each process keeps its own running statistics of BN (Detectron2's broadcast_buffers=False);
    # rank 0's are saved.
    ends = [
        torch.load(tmp_path / run / f"rank{rank}.pth")
        for run in ("whole", "broken")
        for rank in (0, 1)
    ]
    assert_same(ends[0], ends[2])
    trained = [key for key in ends[0] if not key.endswith(("running_mean", "running_var"))]
    for rank1 in (ends[1], ends[3]):
        assert_same({key: ends[0][key] for key in trained}, {key: rank1[key] for key in trained})


def test_seed_of_the_run_wins(
    make_config: Callable[..., CfgNode], caplog: pytest.LogCaptureFixture
) -> None:
    def one_step(**overrides: Any) -> Trainer:
        return Trainer(make_config(SOLVER__CHECKPOINT_PERIOD=1, **overrides))

    first = one_step(SOLVER__MAX_ITER=1)
    first.train()
    second = one_step(SOLVER__MAX_ITER=2, SEED=8)
    second.resume_or_load(resume=True)
    assert second.cfg.SEED == 7 and second.start_iter == 1
    assert second.data_loader.dataset.sampler.start_batch == 1
    assert "SEED is 7" in caplog.text
