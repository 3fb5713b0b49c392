"""`Trainer(cfg)` without a command line, as in a notebook, and what its folder is enough for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from helpers import own_datasets
from tiny import TRAIN, VAL, write_dataset

from fpn_plugin.checkpoint.record import read_record
from fpn_plugin.checkpoint.run_folder import recorded_config
from fpn_plugin.cli import train as train_command
from fpn_plugin.config import load_config, resolve_config
from fpn_plugin.data import register_coco_format
from fpn_plugin.engine.setup import argument_parser, begin, setup
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.export.model import export_detector
from fpn_plugin.visualize.detector import load_detector, read_config

MakeConfig = Callable[..., CfgNode]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def registry(dataset: Path) -> Iterator[None]:
    with own_datasets():
        yield


def own_data(folder: Path) -> dict[str, str]:
    folder.mkdir()
    json_file = str(write_dataset(folder))
    keys = {"JSON": json_file, "IMAGES": str(folder)}
    return {f"DATASETS__OWN__{s}_{key}": x for s in ("TRAIN", "VAL") for key, x in keys.items()}


def swap(json_file: Path) -> Path:
    """The same data with the names of its two categories swapped."""
    content = json.loads(json_file.read_text())
    content["categories"] = [{"id": 1, "name": "b"}, {"id": 2, "name": "a"}]
    path = json_file.with_name("swapped.json")
    path.write_text(json.dumps(content))
    return path


def test_it_records_what_the_tools_record(
    make_config: MakeConfig, tmp_path: Path, log: Any
) -> None:
    cfg = make_config(MODEL__DEVICE="cuda", SOLVER__MAX_ITER=1, DATASETS__TEST=(VAL,))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    words = ["--config-file", str(tmp_path / "config.yaml"), "OUTPUT_DIR", str(tmp_path / "tool")]
    args = argument_parser().parse_args(words)
    begin(setup(args), args)
    before = cfg.dump()
    Trainer(cfg).train()
    assert cfg.dump() == before
    tool, notebook = (recorded_config(str(tmp_path / name)) for name in ("tool", "run"))
    assert {**tool, "OUTPUT_DIR": cfg.OUTPUT_DIR} == notebook
    assert notebook["MODEL"]["DEVICE"] == "cuda", "the CPU is not the user's choice"
    assert notebook["DATASETS"]["CLASSES"] == {"NAMES": ["a", "b"], "IDS": [1, 2]}
    assert read_record(f"{cfg.OUTPUT_DIR}/model_final.pth")["config"] == notebook


def test_the_second_one_resumes_and_none_replaces_a_run(make_config: MakeConfig) -> None:
    cfg = make_config(SOLVER__MAX_ITER=1, SEED=-1)
    Trainer(cfg).train()
    seed = recorded_config(cfg.OUTPUT_DIR)["SEED"]
    for train in (lambda: Trainer(cfg).resume_or_load(resume=False), lambda: Trainer(cfg).train()):
        with pytest.raises(FileExistsError, match=r"OUTPUT_DIR .*run.* holds .*resume=True"):
            train()
    cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert trainer.start_iter == 1
    recorded = recorded_config(cfg.OUTPUT_DIR)
    assert (recorded["SEED"], recorded["SOLVER"]["MAX_ITER"]) == (seed, 2)


@pytest.mark.parametrize(
    "keys, error, message",
    [
        ({"MODEL__ROI_HEADS__NUM_CLASSES": 3}, ValueError, "ROI_HEADS.NUM_CLASSES is 3"),
        ({"DATASETS__TEST": ("nowhere",)}, KeyError, "'nowhere' is not registered"),
        ({"DATASETS__TEST": (VAL,), "TEST__SIZE_BINS": [9, 3]}, ValueError, "TEST.SIZE_BINS"),
        ({"DATASETS__TRAIN": ()}, ValueError, "DATASETS.TRAIN is empty"),
        ({"MODEL__ROI_HEADS__IN_FEATURES": ["p9"]}, KeyError, "p9"),
    ],
)
def test_it_checks_what_the_tools_check(
    keys: dict[str, Any], error: type[Exception], message: str, make_config: MakeConfig
) -> None:
    cfg = make_config(**keys)
    with pytest.raises(error, match=message):
        Trainer(cfg)
    assert not Path(cfg.OUTPUT_DIR, "config.yaml").exists()


def test_what_has_begun_is_not_checked_again(
    make_config: MakeConfig, log: pytest.LogCaptureFixture
) -> None:
    cfg = begin(make_config(), argument_parser().parse_args([]))
    Trainer(cfg)
    assert log.text.count(f"Dataset {TRAIN} is sound") == 1
    cfg.defrost()
    cfg.DATASETS.TEST = (VAL,)
    Trainer(cfg)
    assert log.text.count(f"Dataset {TRAIN} is sound") == 2


def test_evaluation_on_other_classes(
    dataset: Path, make_config: MakeConfig, registry: None, tmp_path: Path
) -> None:
    register_coco_format("swapped", str(swap(dataset)), str(dataset.parent))
    cfg = make_config(SOLVER__MAX_ITER=1)
    trainer = Trainer(cfg)
    trainer.train()
    cfg.DATASETS.TEST = ("swapped",)  # this config does not know the classes, but the model does
    with pytest.raises(ValueError, match="class 0 is 'a' in the model and 'b' in swapped"):
        Trainer.test(cfg, trainer.model)
    (tmp_path / "shipped.yaml").write_text(cfg.dump())  # nor does this one, but the checkpoint does
    words = ["--config-file", str(tmp_path / "shipped.yaml"), "--eval-only"]
    args = argument_parser().parse_args([*words, "--resume"])
    with pytest.raises(ValueError, match="class 0 is 'a' in the model and 'b' in swapped"):
        train_command.train(setup(args), args)
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = str(tmp_path / "b"), f"{cfg.OUTPUT_DIR}/model_final.pth"
    cfg.DATASETS.TRAIN = ("swapped",)
    finetuned = Trainer(cfg)
    finetuned.resume_or_load(resume=False)
    assert finetuned.cfg.DATASETS.CLASSES.NAMES == ["b", "a"]


def test_a_folder_alone_is_enough(
    make_config: MakeConfig, registry: None, tmp_path: Path, log: Any
) -> None:
    data = own_data(tmp_path / "data")
    cfg = make_config(MODEL__DEVICE="cuda", SOLVER__MAX_ITER=1, SOLVER__BASE_LR=0.0, **data)
    Trainer(cfg).train()
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.yaml", "model_final.pth"):
        shutil.copy(Path(cfg.OUTPUT_DIR, name), moved)
    shutil.rmtree(cfg.OUTPUT_DIR)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    for name in ("own_train", "own_val"):  # as in another process
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    file, weights = str(moved / "config.yaml"), str(moved / "model_final.pth")

    detector = load_detector(read_config(file, weights, []))
    assert export_detector(detector.cfg, detector.model).info["classes"] == ["a", "b"]
    args = argument_parser().parse_args(["--config-file", file, "MODEL.WEIGHTS", weights])
    predictor = DefaultPredictor(resolve_config(load_config(args)))
    assert "instances" in predictor(np.zeros((48, 64, 3), np.uint8))

    for flags in (["--resume"], ["--resume", "--eval-only"]):  # its OUTPUT_DIR is the old one
        args = argument_parser().parse_args([*flags, "--config-file", file])
        with pytest.raises(
            ValueError, match="no checkpoint in OUTPUT_DIR .*give OUTPUT_DIR .*moved"
        ):
            setup(args)
    words = ["--config-file", file, "--eval-only", "--val-images", str(tmp_path / "elsewhere")]
    words += ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path / "out")]
    args = argument_parser().parse_args(words)
    with pytest.raises(ValueError, match="OWN.VAL_JSON is .*not a file"):
        setup(args)
    args.val_json = str(tmp_path / "elsewhere" / "instances.json")
    assert "AP" in train_command.train(setup(args), args)["bbox"]
