"""A run goes on with a changed config, or is refused before anything of its checkpoint is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from folders import digest
from tiny import VAL, tiny_config

from fpn_plugin.checkpoint.checkpointer import Checkpointer
from fpn_plugin.checkpoint.record import make_record
from fpn_plugin.checkpoint.run_folder import metric_lines, recorded_config
from fpn_plugin.engine.resume import ResumeError, resume_run
from fpn_plugin.engine.setup import argument_parser, begin
from fpn_plugin.engine.step import ScaledTrainer
from fpn_plugin.engine.trainer import Trainer

SMALL: dict[str, Any] = {
    "MODEL__BACKBONE__NAME": "build_pyramid_backbone",
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 16,
    "MODEL__RESNETS__WIDTH_PER_GROUP": 8,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 32,
    "SOLVER__MAX_ITER": 2,
    "SOLVER__CHECKPOINT_PERIOD": 1,
    "SOLVER__IMS_PER_BATCH": 1,
}
THREE, SWAPPED = "engine_three_classes", "engine_swapped_classes"


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two iterations."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    Trainer(tiny_config(folder, **SMALL, DATASETS__TEST=(VAL,))).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def other_classes(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tiny dataset with a class more, and with the names of its classes swapped."""
    content = json.loads(dataset.read_text())
    names = {THREE: ("a", "b", "c"), SWAPPED: ("b", "a")}
    for dataset_name, classes in names.items():
        path = tmp_path_factory.mktemp("data") / f"{dataset_name}.json"
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
        path.write_text(json.dumps({**content, "categories": categories}))
        register_coco_instances(dataset_name, {}, str(path), str(dataset.parent))
    yield
    for dataset_name in names:
        DatasetCatalog.remove(dataset_name)
        MetadataCatalog.remove(dataset_name)


def changed(run: Path, **overrides: Any) -> CfgNode:
    return tiny_config(run, **{**SMALL, "DATASETS__TEST": (VAL,), **overrides})


def begun(cfg: CfgNode) -> CfgNode:
    """What the command line's `--resume` trains with."""
    cfg.SEED = 7
    return begin(cfg, argument_parser().parse_args(["--resume"]))


def resumed(cfg: CfgNode) -> Trainer:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


def forget_record(run: Path) -> None:
    """Let the run be one of an older version."""
    for path in run.glob("model_*.pth"):
        state = torch.load(path)
        del state["fpn_plugin"]
        torch.save(state, path)


# what is changed, and what the error says
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "classes": (
        {"MODEL__ROI_HEADS__NUM_CLASSES": 3, "DATASETS__TRAIN": (THREE,), "DATASETS__TEST": ()},
        r"cls_score.weight is \(3, 32\) in the checkpoint and \(4, 32\).* 2 -> 3",
    ),
    "names": (
        {"DATASETS__TRAIN": (SWAPPED,), "DATASETS__TEST": ()},
        r"classes were \[a, b\] and are now \[b, a\].*DATASETS.CLASSES.NAMES \['a', 'b'\] -> ",
    ),
    "width": ({"MODEL__FPN__OUT_CHANNELS": 16}, "MODEL.FPN.OUT_CHANNELS 32 -> 16.*WARM_START"),
    "topology": ({"MODEL__FPN__TOPOLOGY": "pafpn"}, "TOPOLOGY 'fpn' -> 'pafpn'.*WARM_START"),
    "head": ({"MODEL__ROI_BOX_HEAD__FC_DIM": 16}, "MODEL.ROI_BOX_HEAD.FC_DIM 32 -> 16"),
    "norm": ({"MODEL__RESNETS__NORM": "FrozenBN"}, "MODEL.RESNETS.NORM 'BN' -> 'FrozenBN'"),
    "frozen": ({"MODEL__BACKBONE__FREEZE_AT": 2}, "MODEL.BACKBONE.FREEZE_AT 0 -> 2"),
    "optimizer": ({"SOLVER__OPTIMIZER": "AdamW"}, "now AdamW.*SOLVER.OPTIMIZER 'SGD' -> 'AdamW'"),
    "groups": ({"SOLVER__BIAS_LR_FACTOR": 2.0}, "SOLVER.BIAS_LR_FACTOR 1.0 -> 2.0"),
}
OLD = ("names", "frozen", "optimizer", "groups")  # older checkpoints show less of it


@pytest.mark.parametrize("name, old", [*((n, False) for n in REFUSED), *((n, True) for n in OLD)])
def test_refused(name: str, old: bool, run: Path, other_classes: None) -> None:
    change, message = REFUSED[name]
    if old:
        forget_record(run)
    before = digest(run)
    trainer = Trainer(changed(run, SOLVER__MAX_ITER=4, **change))
    weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(ResumeError, match=message) as caught:
        trainer.resume_or_load(resume=True)
    for text in ("model_final.pth cannot be resumed", "OUTPUT_DIR", "MODEL.WEIGHTS"):
        assert text in str(caught.value)
    assert all(torch.equal(weights[key], x) for key, x in trainer.model.state_dict().items())
    assert digest(run) == before


def test_a_refused_command_leaves_the_runs_config(run: Path) -> None:
    before = digest(run)
    cfg = begun(changed(run, MODEL__FPN__OUT_CHANNELS=16, SOLVER__MAX_ITER=4))
    with pytest.raises(ResumeError, match="OUT_CHANNELS 32 -> 16"):
        Trainer(cfg).resume_or_load(resume=True)
    after = digest(run)
    assert {name: after[name] for name in before} == before
    resumed(begun(changed(run, SOLVER__MAX_ITER=4)))
    assert recorded_config(str(run))["SOLVER"]["MAX_ITER"] == 4


def test_a_moment_of_another_shape(run: Path) -> None:
    """The state of an old checkpoint, though the model and the groups are the same."""
    forget_record(run)
    state = torch.load(run / "model_final.pth")
    moment = next(iter(state["trainer"]["_trainer"]["optimizer"]["state"].values()))
    moment["momentum_buffer"] = torch.zeros(7, 7)
    torch.save(state, run / "model_final.pth")
    with pytest.raises(ResumeError, match=r"a state of \(7, 7\) for a parameter of \("):
        resumed(changed(run, SOLVER__MAX_ITER=4))


def test_a_file_of_weights_alone(run: Path) -> None:
    state = torch.load(run / "model_final.pth")
    trained_by = state["trainer"]
    for trainer, message in (
        (None, "no state of a trainer"),
        (trained_by["_trainer"], "has no _trainer"),  # as a Python config's run writes it
    ):
        torch.save(
            {"model": state["model"], **({"trainer": trainer} if trainer else {})},
            run / "model_final.pth",
        )
        with pytest.raises(ResumeError, match=message):
            resumed(changed(run, SOLVER__MAX_ITER=4))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_fused_and_channels_last_together(name: str, tmp_path: Path) -> None:
    """A fused kernel reads memory as it lies, whatever the layouts of parameter and moment are."""

    def train(folder: str, fused: bool, layout: torch.memory_format, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = torch.nn.Conv2d(3, 4, 3)
        model.to(memory_format=layout)  # type: ignore[call-overload]
        options = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, fused=fused, **options)
        checkpointer = Checkpointer(model, str(tmp_path / folder), optimizer=optimizer)
        checkpointer.record = make_record({}, model, optimizer)
        if checkpointer.has_checkpoint():
            resume_run(checkpointer, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 9, 9)).square().mean().backward()
            optimizer.step()
        checkpointer.save("model_final")
        return model.weight.detach()

    plain, last = torch.contiguous_format, torch.channels_last
    for folder in ("unchanged", "changed"):
        (tmp_path / folder).mkdir()
        train(folder, False, plain, seed=0)
    expected = train("unchanged", False, plain, seed=1)
    assert torch.allclose(train("changed", True, last, seed=1), expected, atol=1e-5)


def test_options_of_the_optimizer_are_the_configs(run: Path) -> None:
    group = resumed(changed(run))._trainer.optimizer.param_groups[0]
    assert not group["fused"] and group["momentum"] == 0.9
    trainer = resumed(
        changed(
            run,
            SOLVER__MAX_ITER=4,
            SOLVER__BASE_LR=0.02,
            SOLVER__MOMENTUM=0.8,
            SOLVER__FUSED=True,
            SOLVER__CLIP_GRADIENTS__ENABLED=True,
            MODEL__CHANNELS_LAST=True,
        )
    )
    optimizer: Any = trainer._trainer.optimizer
    changed_group = optimizer.param_groups[0]
    assert changed_group["fused"] and changed_group["momentum"] == 0.8
    assert changed_group["lr"] == pytest.approx(2 * group["lr"]) and group["lr"] > 0
    assert trainer.scheduler.base_lrs == [0.02, 0.02]
    for parameter, state in optimizer.state.items():
        assert state["momentum_buffer"].stride() == parameter.stride()
    trainer.train()
    assert optimizer.param_groups[0]["fused"]


def test_a_scale_of_gradients_starts_anew() -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer = ScaledTrainer(model, [], optimizer, grad_scaler=scaler)
    state = trainer.state_dict()
    assert state["grad_scaler"]["scale"] == 8.0
    for unscaled in ({}, {"grad_scaler": {}}):
        trainer.load_state_dict({**{k: state[k] for k in ("iteration", "optimizer")}, **unscaled})
        assert scaler.get_scale() == 8.0
    state["grad_scaler"]["scale"] = 4.0
    trainer.load_state_dict(state)
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("max_iter", [2, 1])
def test_a_finished_run(max_iter: int, run: Path, log: pytest.LogCaptureFixture) -> None:
    before = digest(run)
    trainer = resumed(begun(changed(run, SOLVER__MAX_ITER=max_iter)))
    trainer.train()
    text = f"model_final.pth has seen 2 iterations and SOLVER.MAX_ITER is {max_iter}. Raise SOLVER"
    assert "the run is finished" in log.text and text in log.text
    assert "--eval-only --resume evaluates again" in log.text
    after = digest(run)
    assert {name: after[name] for name in before} == before

    kept = [line for line in metric_lines(str(run)) if "bbox/AP" not in line]
    (run / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in kept))
    resumed(begun(changed(run, SOLVER__MAX_ITER=max_iter))).train()
    assert [x["iteration"] for x in metric_lines(str(run)) if "bbox/AP" in x] == [2], "was missed"
