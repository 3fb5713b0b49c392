"""From the command line to a config and an output folder that may be written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from folders import DATA, digest, run_setup

from fpn_plugin.checkpoint.checkpointer import find_checkpoint
from fpn_plugin.checkpoint.run_folder import recorded_config
from fpn_plugin.cli import train as train_command
from fpn_plugin.engine import launch
from fpn_plugin.engine.run_folder import warn_of_changes
from fpn_plugin.engine.setup import argument_parser, begin, check_data, load_config, setup
from fpn_plugin.engine.trainer import Trainer

ARGS = "MODEL.BOTTOM_UP.ARGS"
NETWORK = "BACKBONE: {NAME: build_bottom_up_backbone}"  # which reads them


def test_resume(
    make_config: Callable[..., CfgNode], tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    cfg = make_config()
    warn_of_changes(cfg)
    assert "no checkpoint" in log.text
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir()
    torch.save({}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    before, shown = digest(folder), len(log.text)
    cfg.MODEL.DEVICE = "cuda"
    warn_of_changes(cfg)
    assert "differs" not in log.text[shown:]
    cfg.SOLVER.BASE_LR = 0.5
    warn_of_changes(cfg)
    assert "SOLVER.BASE_LR 0.01 -> 0.5" in log.text and digest(folder) == before


@pytest.mark.parametrize("flags", [["--resume"], ["--eval-only", "--resume"]])
def test_what_goes_on_does_not_need_the_bottom_up_weights_but_records_them(
    flags: list[str], make_config: Any, log: pytest.LogCaptureFixture
) -> None:
    cfg = make_config(MODEL__BOTTOM_UP__WEIGHTS="gone.pth", MODEL__WEIGHTS="model.pth")
    args = argument_parser().parse_args(flags)
    if not args.eval_only:
        assert begin(cfg, args).MODEL.BOTTOM_UP.WEIGHTS == "gone.pth", "no checkpoint yet"
        torch.save({}, Path(cfg.OUTPUT_DIR, "model_final.pth"))
    assert begin(cfg, args).MODEL.BOTTOM_UP.WEIGHTS == ""
    assert "gone.pth is not read" in log.text
    assert recorded_config(cfg.OUTPUT_DIR)["MODEL"]["BOTTOM_UP"]["WEIGHTS"] == "gone.pth"


def test_evaluation_leaves_the_run_as_it_is(
    dataset: Path, make_config: Callable[..., CfgNode], tmp_path: Path, log: Any
) -> None:
    cfg = make_config(SOLVER__MAX_ITER=1)
    Trainer(cfg).train()
    run = Path(cfg.OUTPUT_DIR)
    before = digest(run)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    common = ("--config-file", str(tmp_path / "config.yaml"), "--eval-only")
    data = ("--val-json", str(dataset), "--val-images", str(dataset.parent))
    args = argument_parser().parse_args([*common, "--resume", *data])
    for number in (1, 2):
        evaluated = setup(args)
        assert evaluated.OUTPUT_DIR == str(run / f"eval-{number}")
        assert evaluated.MODEL.WEIGHTS == find_checkpoint(str(run))
    evaluated.defrost()
    evaluated.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    with pytest.raises(ValueError, match="MODEL.WEIGHTS .*box_head.fc1.weight is .*--allow-parti"):
        train_command.train(evaluated, args)
    evaluated.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    results = train_command.train(evaluated, args)
    assert "AP" in results["bbox"] and (run / "eval-2" / "inference").is_dir()
    after = digest(run)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("eval-2/") for name in set(after) - set(before))


def test_evaluation_without_weights(tmp_path: Path, log: Any) -> None:
    with pytest.raises(ValueError, match="--allow-partial is for --eval-only"):
        run_setup("--allow-partial", "OUTPUT_DIR", str(tmp_path), *DATA)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        run_setup("--eval-only", "OUTPUT_DIR", str(tmp_path), *DATA)
    with pytest.raises(ValueError, match="no checkpoint in OUTPUT_DIR"):
        run_setup("--eval-only", "--resume", "OUTPUT_DIR", str(tmp_path), *DATA)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--eval-only"]])
def test_weights_that_do_not_exist(
    flags: list[str], tmp_path: Path, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PathManager, "get_local_path", lambda path: str(tmp_path / "model.pth"))

    def weights(path: str) -> CfgNode:
        return run_setup(*flags, "OUTPUT_DIR", str(tmp_path / "run"), "MODEL.WEIGHTS", path, *DATA)

    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS 'typo.pth'.*no such file"):
        weights("typo.pth")
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.pth").touch()
    for path in ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", f"{tmp_path}/model.pth"):
        assert weights(path).MODEL.WEIGHTS == path
    weights(f"{tmp_path}/model.pth?matching_heuristics=True")


def test_a_resumed_run_does_not_need_its_first_weights(tmp_path: Path, log: Any) -> None:
    torch.save({}, tmp_path / "model_0000001.pth")
    run_setup("--resume", "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", "gone.pth", *DATA)


def test_no_data(dataset: Path, tmp_path: Path, log: Any) -> None:
    (tmp_path / "model.pth").touch()
    opts = ("OUTPUT_DIR", str(tmp_path / "run"), "MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    for half, other, flags in (("train", "val", []), ("val", "train", ["--eval-only"])):
        own = [f"--{other}-json", str(dataset), f"--{other}-images", str(dataset.parent)]
        key = "TRAIN" if half == "train" else "TEST"
        text = f"DATASETS.{key} is empty.*--{half}-json and --{half}-images"
        for given in (flags, [*flags, *own]):
            with pytest.raises(ValueError, match=text):
                run_setup(*given, *opts)
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_found_before_training(
    dataset: Path, make_config: Any, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lvis", None)  # importing it fails
    if "engine_lvis" not in DatasetCatalog:
        DatasetCatalog.register("engine_lvis", list)
    MetadataCatalog.get("engine_lvis").set(
        json_file=str(dataset), image_root=str(dataset.parent), evaluator_type="lvis"
    )
    cfg = make_config(DATASETS__TEST=("engine_lvis",), DATASETS__CHECK="off")
    with pytest.raises(ImportError, match="engine_lvis.*pip install"):
        begin(cfg, argument_parser().parse_args([]))
    assert not Path(cfg.OUTPUT_DIR, "config.yaml").exists()


def test_arguments_of_the_bottom_up_network_need_not_be_known(tmp_path: Path, log: Any) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"MODEL: {{{NETWORK}, BOTTOM_UP: {{ARGS: {{drop_path_rate: 0.1, kept: 7}}}}}}")
    arguments = {"drop_path_rate": "0", "grad_checkpointing": "True", "img_size": "[64,96]"}
    opts = [item for name, value in arguments.items() for item in (f"{ARGS}.{name}", value)]
    cfg = run_setup("--config-file", str(file), "OUTPUT_DIR", str(tmp_path / "run"), *opts, *DATA)
    assert dict(cfg.MODEL.BOTTOM_UP.ARGS) == {
        "drop_path_rate": 0,  # of another type than the file's
        "kept": 7,
        "grad_checkpointing": True,
        "img_size": [64, 96],
    }
    for key in (f"{ARGS}.a.b", f"{ARGS}.", "MODEL.BOTTOM_UP.ARG.a"):
        with pytest.raises(KeyError, match=key):
            run_setup(key, "1", *DATA)


def test_arguments_of_the_bottom_up_network_all_at_once(tmp_path: Path, log: Any) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"MODEL: {{{NETWORK}, BOTTOM_UP: {{ARGS: {{drop_path_rate: 0.1}}}}}}")
    args = ("--config-file", str(file), "OUTPUT_DIR", str(tmp_path / "run"), *DATA)
    for opts, expected in (
        ([ARGS, "{}"], {}),
        ([ARGS, "{'a': [1, 2], 'b': '7'}"], {"a": [1, 2], "b": "7"}),
        ([f"{ARGS}.b", "1", ARGS, "{'a': 0}", f"{ARGS}.a", "x"], {"a": "x"}),  # the last counts
    ):
        assert dict(run_setup(*args, *opts).MODEL.BOTTOM_UP.ARGS) == expected
    for value in ("0.1", "drop=1", "{1: 2}", "[1]"):
        with pytest.raises(ValueError, match="MODEL.BOTTOM_UP.ARGS: .*no dict"):
            run_setup(*args, ARGS, value)


@pytest.mark.parametrize("gpu", [True, False])
def test_device(
    gpu: bool, tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    cfg = run_setup("OUTPUT_DIR", str(tmp_path), *DATA)
    assert cfg.MODEL.DEVICE == ("cuda" if gpu else "cpu")
    assert ("no GPU is available: using 'cpu'" in log.text) is not gpu
    opts = ("MODEL.DEVICE", "cpu", *DATA)
    assert run_setup("OUTPUT_DIR", str(tmp_path), *opts).MODEL.DEVICE == "cpu"


def test_gpus_are_hidden_from_processes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(launch, "launch", lambda *args, **options: None)
    for processes, device, expected in ((1, "cpu", "0,1"), (2, "cuda", "0,1"), (2, "cpu", "")):
        args = argument_parser().parse_args(["--num-gpus", str(processes)])
        launch.launch_ranks(print, args, (), device)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize(
    "args, error, text",
    [
        (["MODEL.FPN.TOPOLGY", "fpn"], KeyError, "MODEL.FPN.TOPOLGY.*'MODEL.FPN.TOPOLOGY'"),
        (["MODLE.FPN.NORM", "GN"], KeyError, "MODLE.FPN.NORM.*DATASETS.*MODEL"),
        (["SEED"], ValueError, "'SEED' at their end has no partner"),
        (["SEED", "many"], ValueError, "SEED"),
        (["SEED", "1", "--resume"], ValueError, "--resume stands after"),
        (["--config-file", "gone.yaml"], FileNotFoundError, "--config-file 'gone.yaml'"),
        (["--train-json", "gone.json"], ValueError, "DATASETS.OWN.TRAIN_IMAGES"),
    ],
)
def test_command_line_errors(args: list[str], error: type[Exception], text: str, log: Any) -> None:
    with pytest.raises(error, match=text):
        run_setup(*args)


def test_own_data_flags() -> None:
    args = argument_parser().parse_args(
        ["--train-json", "a.json", "--train-images", "a", "--val-json", "b.json"]
    )
    own = load_config(args).DATASETS.OWN
    paths = (own.TRAIN_JSON, own.TRAIN_IMAGES, own.VAL_JSON, own.VAL_IMAGES)
    assert paths == (*(os.path.abspath(name) for name in ("a.json", "a", "b.json")), "")


@pytest.mark.parametrize(
    "given, recorded, expected", [(-1, 5, 5), (3, 5, 3), (-1, -1, None), (0, 5, 0)]
)
def test_seed_of_a_run(
    given: int, recorded: int, expected: int | None, make_config: Any, log: Any
) -> None:
    cfg = make_config(SEED=given)
    os.makedirs(cfg.OUTPUT_DIR)
    Path(cfg.OUTPUT_DIR, "config.yaml").write_text(f"SEED: {recorded}\n")
    seed = begin(cfg, argument_parser().parse_args(["--resume"])).SEED
    assert seed >= 0 and (expected is None or seed == expected)
    assert f"SEED: {seed}" in Path(cfg.OUTPUT_DIR, "config.yaml").read_text()


@pytest.mark.parametrize(
    "keys, warned",
    [
        ({"MODEL__BACKBONE__FREEZE_AT": 2}, True),
        ({"MODEL__BOTTOM_UP__NORM": "FrozenBN"}, True),
        ({"MODEL__BACKBONE__FREEZE_AT": 2, "MODEL__WEIGHTS": "model.pth"}, False),
        ({}, False),
    ],
)
def test_frozen_layers_without_weights_are_a_warning(
    keys: dict[str, Any], warned: bool, make_config: Any, log: Any
) -> None:
    begin(make_config(**keys), argument_parser().parse_args([]))
    assert ("there are no weights to keep" in log.text) is warned


def test_the_federated_loss_has_its_frequencies_at_an_evaluation_too(make_config: Any) -> None:
    cfg = make_config(MODEL__ROI_BOX_HEAD__USE_FED_LOSS=True)
    MetadataCatalog.pop("fed_train", None)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("fed_train",), ()
    with pytest.raises(ValueError, match="USE_FED_LOSS is True, but .*'fed_train'.*class_image_co"):
        check_data(cfg, eval_only=True)
    MetadataCatalog.get("fed_train").class_image_count = [{"id": 1, "image_count": 2}]
    check_data(cfg, eval_only=True)  # the dataset itself is not there
    assert cfg.DATASETS.TRAIN == ("fed_train",)
    cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = False
    check_data(cfg, eval_only=True)
    assert cfg.DATASETS.TRAIN == ()
