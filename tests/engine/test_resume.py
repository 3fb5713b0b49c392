"""A run that is killed and resumed gives what an unbroken one gives, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from agents import RETINANET
from crash_child import Child, run_killed, train_together
from detectron2.config import CfgNode
from detectron2.engine import launch

from fpn_plugin.engine.trainer import Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw-ungrouped-two-workers": {
        "SOLVER__OPTIMIZER": "AdamW",
        "SOLVER__LR_SCHEDULER_NAME": "WarmupCosineLR",
        "MODEL__EMA__ENABLED": True,
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
    "retinanet-in-two-parts": {
        "SOLVER__ACCUMULATE": 2,
        **RETINANET,
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
    assert set(state) == {"model", "trainer", "iteration", "fpn_plugin"}
    state["fpn_plugin"]["config"].pop("OUTPUT_DIR")
    assert {"SeedHook", "LRScheduler"} <= set(state["trainer"]["hooks"])
    assert state["trainer"]["_trainer"]["optimizer"]["state"]
    return state


@pytest.mark.parametrize("name", VARIANTS)
def test_killed_and_resumed(name: str, dataset: Path, tmp_path: Path) -> None:
    def args(folder: str, **overrides: Any) -> tuple[Any, ...]:
        return str(dataset), str(tmp_path / folder), {**VARIANTS[name], **overrides}

    child = Child(*args("killed"), target=run_killed)
    assert child.end() == -signal.SIGKILL, child.error
    checkpoint = tmp_path / "killed" / "model_0000002.pth"
    assert checkpoint.with_name("last_checkpoint").read_text() == checkpoint.name
    # With a negative SEED the killed run drew one, and the resumed run draws another until it
    # finds the first.
    seed = torch.load(checkpoint)["trainer"]["hooks"]["SeedHook"]["seed"]
    written = checkpoint.stat().st_mtime_ns
    for run in (args("killed"), args("unbroken", SEED=seed)):
        child = Child(*run)
        assert child.end() == 0, child.error
    assert checkpoint.stat().st_mtime_ns == written, "it began anew"
    assert_same(final_state(tmp_path / "killed"), final_state(tmp_path / "unbroken"))


def test_two_processes_on_the_cpu(dataset: Path, quick_ranks: None, tmp_path: Path) -> None:
    launch(train_together, 2, dist_url="auto", args=(str(dataset), str(tmp_path)))
    whole, broken = (
        [torch.load(tmp_path / run / f"rank{rank}.pth") for rank in (0, 1)]
        for run in ("whole", "broken")
    )
    # Each process keeps its own running statistics of BN (Detectron2's broadcast_buffers=False);
    # rank 0's are saved.
    assert_same(whole[0], broken[0])
    trained = [key for key in whole[0] if not key.endswith(("running_mean", "running_var"))]
    for rank1 in (whole[1], broken[1]):
        assert_same({key: whole[0][key] for key in trained}, {key: rank1[key] for key in trained})


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
