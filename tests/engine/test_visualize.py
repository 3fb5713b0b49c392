"""TEST.VIS_PERIOD: what TensorBoard gets, and that training does not notice."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from helpers import small_maps, small_pyramid
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import assert_same
from tiny import VAL, tiny_config
from torch import nn

from fpn_plugin.engine.rng import seed_all
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.engine.visualize_hook import (
    VisualizeHook,
    _AfterBackward,
    gradient_norms,
    named_weights,
)
from fpn_plugin.visualize.fusion_weights import FusionWeights, fusion_weights

MakeConfig = Callable[..., CfgNode]
RUN: dict[str, Any] = {
    "MODEL__BACKBONE__NAME": "build_pyramid_backbone",
    "MODEL__FPN__FUSE_TYPE": "fast_normalized",
    "SOLVER__MAX_ITER": 4,
    "SOLVER__CHECKPOINT_PERIOD": 100,
    "TEST__EVAL_PERIOD": 0,
    "DATASETS__TEST": (VAL,),
}


class Norms(HookBase):
    """The norms by the parameters' names, noted in the trainer of single steps."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.found: list[dict[str, float]] = []

    def after_backward(self) -> None:
        backbone = self.model.backbone
        names = [step.node.name for step in backbone.steps]
        norms = {}
        for name in names:
            heads = (f"{name}.", f"{name}_fuse.", f"{name}_edge")
            grads = [p.grad for key, p in backbone.named_parameters() if key.startswith(heads)]
            total = sum(float(grad.double().square().sum()) for grad in grads)
            norms.update({name: total**0.5} if grads else {})
        self.found.append(norms)


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two runs, with the hook and without."""
    found: dict[str, Any] = {}
    for name, period in (("off", 0), ("on", 3)):
        cfg = tiny_config(tmp_path_factory.mktemp(name), **RUN, TEST__VIS_PERIOD=period)
        seed_all(0)  # as train_net.py does before the model is built
        trainer = Trainer(cfg)
        norms = Norms(trainer.checkpointer.model)
        trainer._trainer.register_hooks([norms])
        trainer.train()
        events = EventAccumulator(cfg.OUTPUT_DIR, size_guidance={"images": 0})
        events.Reload()
        found[name] = SimpleNamespace(trainer=trainer, events=events, norms=norms.found, cfg=cfg)
    return found


def test_training_does_not_notice(runs: dict[str, Any]) -> None:
    states = [torch.load(Path(run.cfg.OUTPUT_DIR, "model_final.pth")) for run in runs.values()]
    for state in states:
        config = state["fpn_plugin"]["config"]
        del config["OUTPUT_DIR"], config["TEST"]["VIS_PERIOD"]
    assert_same(*states)


def test_pictures(runs: dict[str, Any]) -> None:
    events = runs["on"].events
    names = events.Tags()["images"]
    assert len(names) == 2 and all(name.startswith("visualize/") for name in names)
    for name in names:
        assert [event.step for event in events.Images(name)] == [2]
        assert all(event.width > 600 and event.height > 600 for event in events.Images(name))
    assert runs["off"].events.Tags()["images"] == []


def scalars(run: Any, prefix: str) -> dict[str, tuple[int, float]]:
    names = [name for name in run.events.Tags()["scalars"] if name.startswith(prefix)]
    last = {name.removeprefix(prefix): run.events.Scalars(name)[-1] for name in names}
    return {name: (event.step, event.value) for name, event in last.items()}


def test_gradient_norms(runs: dict[str, Any]) -> None:
    found = scalars(runs["on"], "grad_norm/")
    expected = runs["on"].norms[2]
    assert "fpn_output2" in expected and "fpn_merge3" in expected
    assert found == {name: (2, pytest.approx(norm, rel=1e-4)) for name, norm in expected.items()}
    assert len(runs["on"].norms) == 4 and not scalars(runs["off"], "grad_norm/")


def test_fusion_weights(runs: dict[str, Any]) -> None:
    found = scalars(runs["on"], "fusion/")
    weights = fusion_weights(runs["on"].trainer.checkpointer.model.backbone)
    expected = {
        f"{node}/{name}": (3, pytest.approx(float(value), abs=1e-6))
        for node, item in weights.items()
        for name, value in zip(item.inputs, item.weights)
    }
    assert found == expected and "fpn_merge2/fpn_lateral2" in found
    assert not scalars(runs["off"], "fusion/")


def hook_of(period: int = 1) -> VisualizeHook:
    model = nn.Module()
    model.backbone = nn.Linear(1, 1)
    hook = VisualizeHook(model, lambda item: item, [], period)
    hook.trainer = SimpleNamespace(iter=0, max_iter=9)
    return hook


@pytest.mark.parametrize("scale, expected", [(None, 5.0), (1024.0, 5 / 1024)])
def test_the_scale_of_mixed_precision(
    scale: float | None, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fpn_plugin.engine.visualize_hook.gradient_norms", lambda _: {"a": 5.0, "b": float("inf")}
    )
    hook, told = hook_of(), _AfterBackward(hook_of())
    told.hook = hook
    told.trainer = SimpleNamespace()
    if scale is not None:
        told.trainer.grad_scaler = SimpleNamespace(get_scale=lambda: scale)
    with EventStorage() as storage:
        hook.trainer.storage = storage
        told.after_backward()
        assert {name: value for name, (value, _) in storage.latest().items()} == {
            "grad_norm/a": expected
        }


def test_norms_are_worked_out_at_the_period_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(
        "fpn_plugin.engine.visualize_hook.gradient_norms", lambda x: called.append(x) or {}
    )
    hook = hook_of(period=3)
    for hook.trainer.iter in range(7):
        hook.put_gradients(1.0)
    assert len(called) == 2


def test_named_weights() -> None:
    each = torch.tensor([[0.0, 1.0], [1.0, 2.0], [3.0, 3.0]])
    item = FusionWeights("weighted", ("a", "b", "a"), each, "")
    assert named_weights(item) == {"a_0": 0.5, "b": 1.5, "a_2": 3.0}
    assert named_weights(FusionWeights("sum", ("a",), None, "nothing is learned")) == {}


def test_a_backbone_without_a_graph_and_no_dataset(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = make_config(TEST__VIS_PERIOD=1, SOLVER__MAX_ITER=1, TEST__EVAL_PERIOD=0)
    with caplog.at_level(logging.WARNING):
        Trainer(cfg).train()
    assert "TEST.VIS_PERIOD: no pictures, as DATASETS.TEST is empty" in caplog.text


def test_frozen_nodes_have_no_norm() -> None:
    pyramid = small_pyramid()
    pyramid.fpn_output2.requires_grad_(False)
    sum(x.sum() for x in pyramid(small_maps()).values()).backward()
    assert set(gradient_norms(pyramid)) == {
        *(f"fpn_lateral{level}" for level in (2, 3, 4, 5)),
        *(f"fpn_output{level}" for level in (3, 4, 5)),
    }
