"""The trainer on the CPU: precision, memory format, optimizers and evaluators."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import SimpleTrainer
from detectron2.evaluation import DatasetEvaluators
from detectron2.solver import build_optimizer as detectron2_optimizer
from tiny import VAL
from torch import nn

from fpn_plugin.engine.step import build_optimizer
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.evaluation import build as evaluation
from fpn_plugin.evaluation.build import EVALUATORS, build_evaluator, check_evaluators
from fpn_plugin.modeling.precision import Autocast, amp_dtype

MakeConfig = Callable[..., CfgNode]


def test_bf16_on_the_cpu_in_training_and_evaluation(make_config: MakeConfig) -> None:
    cfg = make_config(
        SOLVER__AMP__ENABLED=True,
        SOLVER__MAX_ITER=1,
        MODEL__CHANNELS_LAST=True,
        DATASETS__TEST=(VAL,),
    )
    trainer = Trainer(cfg)
    types: set[tuple[bool, torch.dtype]] = set()
    conv = next(module for module in trainer.model.modules() if isinstance(module, nn.Conv2d))
    conv.register_forward_hook(lambda module, args, out: types.add((module.training, out.dtype)))
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    assert types == {(True, torch.bfloat16), (False, torch.bfloat16)}
    for key, value in trainer.model.named_parameters():
        assert value.dtype == torch.float32 and torch.isfinite(value).all()
        if value.ndim == 4:
            assert value.is_contiguous(memory_format=torch.channels_last)
    assert any((before[key] != value).any() for key, value in trainer.model.named_parameters())
    assert not any(key.startswith("model.") for key in trainer.model.state_dict())
    assert "AP" in json.dumps(trainer._last_eval_results)
    assert Path(cfg.OUTPUT_DIR, "inference", "coco_instances_results.json").is_file()


def test_progress_line_has_an_eta(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        Trainer(make_config()).train()
    assert "eta: 0:00:00" in caplog.text and "total_loss" in caplog.text


def test_full_precision_is_detectron2s_step(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config())
    assert type(trainer._trainer) is SimpleTrainer
    assert trainer._trainer.model.model is trainer.model


@pytest.mark.parametrize(
    "device, precision, expected",
    [
        ("cuda", "auto", "float16"),
        ("cuda", "bf16", "bfloat16"),
        ("cpu", "auto", "bfloat16"),
        ("cpu", "bf16", "bfloat16"),
    ],
)
def test_precision(device: str, precision: str, expected: str, make_config: MakeConfig) -> None:
    cfg = make_config(SOLVER__AMP__PRECISION=precision, MODEL__DEVICE=device)
    assert amp_dtype(cfg) is None
    cfg.SOLVER.AMP.ENABLED = True
    assert amp_dtype(cfg) is getattr(torch, expected)


def test_precision_errors(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="SOLVER.AMP.PRECISION 'fp16' needs CUDA.*'cpu'.*bf16"):
        Trainer(make_config(SOLVER__AMP__ENABLED=True, SOLVER__AMP__PRECISION="fp16"))
    with pytest.raises(KeyError, match="SOLVER.AMP.PRECISION.*'half'.*auto, bf16, fp16"):
        amp_dtype(make_config(SOLVER__AMP__PRECISION="half"))


def test_autocast_covers_the_forward_only() -> None:
    model = Autocast(nn.Linear(4, 4), "cpu", torch.bfloat16)
    out = model(torch.ones(1, 4))
    assert out.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
    out.sum().backward()
    assert model.model.weight.grad is not None and model.model.weight.grad.dtype == torch.float32


def test_evaluation_with_amp_leaves_the_models_mode(make_config: MakeConfig) -> None:
    cfg = make_config(SOLVER__AMP__ENABLED=True, DATASETS__TEST=(VAL,))
    model = Trainer.build_model(cfg)
    for training in (True, False):
        Trainer.test(cfg, model.train(training))
        assert {module.training for module in model.modules()} == {training}


def test_autocast_leaves_parts_of_the_model_in_their_own_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1).eval(), nn.Linear(1, 1))
    assert Autocast(model, "cpu", torch.bfloat16).training and not model[0].training


def groups(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]


def test_optimizers(make_config: MakeConfig) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3))
    cfg = make_config(SOLVER__BIAS_LR_FACTOR=2.0, SOLVER__WEIGHT_DECAY_BIAS=0.5)
    sgd = build_optimizer(cfg, model)
    assert type(sgd) is torch.optim.SGD and groups(sgd) == groups(detectron2_optimizer(cfg, model))
    cfg.SOLVER.OPTIMIZER = "AdamW"
    adamw = build_optimizer(cfg, model)
    assert type(adamw) is torch.optim.AdamW and groups(adamw) == groups(sgd)
    with pytest.raises(KeyError, match="SOLVER.OPTIMIZER.*'Adam'.*AdamW, SGD"):
        build_optimizer(make_config(SOLVER__OPTIMIZER="Adam"), model)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_gradient_clipping(name: str, make_config: MakeConfig) -> None:
    cfg = make_config(SOLVER__OPTIMIZER=name, SOLVER__CLIP_GRADIENTS__ENABLED=True)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.25
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(cfg, model)
    model(torch.full((1, 2), 100.0)).sum().backward()
    optimizer.step()
    assert model.weight.grad is not None and (model.weight.grad == 0.25).all()


EXPECTED = {
    "coco": ["InstanceEvaluator"],
    "sem_seg": ["SemSegEvaluator"],
    "coco_panoptic_seg": ["SemSegEvaluator", "InstanceEvaluator", "COCOPanopticEvaluator"],
    "lvis": ["LVISEvaluator"],
    "cityscapes_instance": ["CityscapesInstanceEvaluator"],
    "cityscapes_sem_seg": ["CityscapesSemSegEvaluator"],
    "pascal_voc": ["PascalVOCDetectionEvaluator"],
}


@pytest.mark.parametrize("kind", EVALUATORS.names())
def test_evaluators(kind: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, Any]] = []
    for module, _ in evaluation._PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    for name in {name for names in EXPECTED.values() for name in names}:

        def make(dataset: str, *args: Any, _name: str = name, **kwargs: Any) -> str:
            made.append((_name, kwargs.get("output_dir", args[0] if args else None)))
            return _name

        monkeypatch.setattr(evaluation, name, make)
    monkeypatch.setattr(evaluation, "DatasetEvaluators", list)
    MetadataCatalog.get("engine_" + kind).set(evaluator_type=kind)
    result = build_evaluator(make_config(), "engine_" + kind)
    assert [name for name, _ in made] == EXPECTED[kind]
    assert result == (EXPECTED[kind][0] if len(made) == 1 else EXPECTED[kind])
    assert all(folder is None or folder.endswith("/run/inference") for _, folder in made)


@pytest.mark.parametrize(
    "kind, text",
    [
        ("lvis", r"needs lvis: pip install 'fpn_plugin\[lvis\]'"),
        ("cityscapes_instance", r"needs cityscapesscripts: pip install 'fpn_plugin\[cityscapes\]'"),
        ("cityscapes_sem_seg", r"needs cityscapesscripts: pip install 'fpn_plugin\[cityscapes\]'"),
        ("coco_panoptic_seg", r"needs panopticapi: pip install git\+https://github.com"),
    ],
)
def test_missing_package(
    kind: str, text: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, _ in evaluation._PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    MetadataCatalog.get("engine_missing_" + kind).set(evaluator_type=kind)
    cfg = make_config(DATASETS__TEST=(VAL, "engine_missing_" + kind))
    with pytest.raises(ImportError, match=f"engine_missing_{kind}.*'{kind}' {text}"):
        check_evaluators(cfg)
    with pytest.raises(ImportError, match=text):
        build_evaluator(cfg, "engine_missing_" + kind)
    check_evaluators(make_config(DATASETS__TEST=(VAL,)))


def test_metadata_that_an_evaluator_reads(make_config: MakeConfig) -> None:
    MetadataCatalog.get("engine_labels").set(evaluator_type="sem_seg", stuff_classes=["a", "b"])
    cfg = make_config(DATASETS__TEST=("engine_labels",))
    with pytest.raises(KeyError, match="'engine_labels'.*'sem_seg' needs 'ignore_label'"):
        check_evaluators(cfg)
    MetadataCatalog.get("engine_labels").set(ignore_label=255)
    check_evaluators(cfg)


def test_coco_evaluator_of_several_datasets(make_config: MakeConfig, tmp_path: Path) -> None:
    evaluator = build_evaluator(make_config(DATASETS__TEST=(VAL, "other")), VAL)
    assert type(evaluator).__name__ == "InstanceEvaluator" and not isinstance(
        evaluator, DatasetEvaluators
    )
    assert evaluator._output_dir == str(tmp_path / "run" / "inference" / VAL)


def test_unknown_evaluator(make_config: MakeConfig) -> None:
    MetadataCatalog.get("engine_odd").set(evaluator_type="odd")
    for name, shown in (("engine_odd", "'odd'"), ("engine_none", "None")):
        with pytest.raises(KeyError, match=f"{name}.*evaluator_type.*{shown}.*sem_seg"):
            build_evaluator(make_config(), name)
        with pytest.raises(KeyError, match=f"{name}.*evaluator_type.*{shown}"):
            check_evaluators(make_config(DATASETS__TEST=(name,)))
