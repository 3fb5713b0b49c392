"""From the command line to a config and an output folder that may be written."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from detectron2.config import CfgNode

from fpn_plugin.engine import setup as engine_setup
from fpn_plugin.engine.checkpoint import find_checkpoint
from fpn_plugin.engine.run_folder import claim_output_dir, run_results
from fpn_plugin.engine.setup import argument_parser, begin, load_config, prepare_launch, setup
from fpn_plugin.engine.trainer import Trainer

RUN_FILES = (
    "model_0000001.pth",
    "last_checkpoint",
    "metrics.json",
    "events.out.tfevents.1",
    "inference/a.json",
)
MINE = ("notes.txt", "pretrained.pth", "eval-1/a.json", "sub/model_final.pth", "model_mine.pth")


def fill(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def run_setup(*args: str) -> CfgNode:
    return setup(argument_parser().parse_args(list(args)))


def digest(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


@pytest.fixture
def log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    """What the plugin logs, without the handlers that setup() would leave in this process."""
    monkeypatch.setattr(engine_setup, "setup_logger", lambda *args, **kwargs: None)
    caplog.set_level("INFO")
    return caplog


@pytest.mark.parametrize("name", RUN_FILES)
def test_results_of_another_run_are_refused(name: str, tmp_path: Path, log: Any) -> None:
    fill(tmp_path, (name, "config.yaml", "log.txt"))
    with pytest.raises(
        FileExistsError, match=f"OUTPUT_DIR.*{name.split('/')[0]}.*--resume.*--overwrite"
    ):
        run_setup("OUTPUT_DIR", str(tmp_path))


def test_folders_without_results_are_taken(tmp_path: Path, log: Any) -> None:
    fill(tmp_path, (*MINE, "config.yaml", "log.txt"))
    (tmp_path / "metrics.json").touch()  # a run that failed before its first step
    before = digest(tmp_path)
    run_setup("OUTPUT_DIR", str(tmp_path))
    run_setup("OUTPUT_DIR", str(tmp_path / "new"))
    assert digest(tmp_path) == before


def test_overwrite_removes_the_runs_files_alone(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    fill(
        tmp_path,
        (*MINE, *RUN_FILES, "config.yaml", "log.txt", "log.txt.rank1", "model_0000003.pth.tmp"),
    )
    run_setup("--overwrite", "OUTPUT_DIR", str(tmp_path))
    assert set(digest(tmp_path)) == set(MINE)
    assert "removed" in log.text and "model_0000001.pth" in log.text
    with pytest.raises(ValueError, match="--resume.*--overwrite"):
        run_setup("--overwrite", "--resume", "OUTPUT_DIR", str(tmp_path))


def test_overwrite_spares_the_weights_it_starts_from(tmp_path: Path, log: Any) -> None:
    fill(tmp_path, ("model_final.pth", "last_checkpoint"))
    with pytest.raises(ValueError, match="MODEL.WEIGHTS.*model_final.pth"):
        run_setup(
            "--overwrite",
            "OUTPUT_DIR",
            str(tmp_path),
            "MODEL.WEIGHTS",
            str(tmp_path / "model_final.pth"),
        )
    assert len(run_results(str(tmp_path))) == 2


def test_resume(
    make_config: Callable[..., CfgNode], tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    cfg = make_config()
    claim_output_dir(cfg, resume=True, overwrite=False)
    assert "no checkpoint" in log.text
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir()
    torch.save({}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    before, shown = digest(folder), len(log.text)
    cfg.MODEL.DEVICE = "cuda"
    claim_output_dir(cfg, resume=True, overwrite=False)
    assert "differs" not in log.text[shown:]
    cfg.SOLVER.BASE_LR = 0.5
    claim_output_dir(cfg, resume=True, overwrite=False)
    assert "SOLVER.BASE_LR 0.01 -> 0.5" in log.text and digest(folder) == before


def test_resumed_run_does_not_need_the_bottom_up_weights(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    args = ("OUTPUT_DIR", str(tmp_path), "MODEL.BOTTOM_UP.WEIGHTS", "gone.pth")
    assert run_setup("--resume", *args).MODEL.BOTTOM_UP.WEIGHTS == "gone.pth"
    torch.save({}, tmp_path / "model_final.pth")
    assert run_setup("--resume", *args).MODEL.BOTTOM_UP.WEIGHTS == ""
    assert "gone.pth is not read" in log.text


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
    tool = load_tool()
    for number in (1, 2):
        evaluated = setup(args)
        assert evaluated.OUTPUT_DIR == str(run / f"eval-{number}")
        assert evaluated.MODEL.WEIGHTS == find_checkpoint(str(run))
    results = tool.main(evaluated, args)
    assert "AP" in results["bbox"] and (run / "eval-2" / "inference").is_dir()
    after = digest(run)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("eval-2/") for name in set(after) - set(before))


def load_tool() -> Any:
    path = Path(__file__).parents[2] / "tools" / "train_net.py"
    spec = importlib.util.spec_from_file_location("train_net", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_evaluation_without_weights(tmp_path: Path, log: Any) -> None:
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        run_setup("--eval-only", "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="no checkpoint in OUTPUT_DIR"):
        run_setup("--eval-only", "--resume", "OUTPUT_DIR", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gpu", [True, False])
def test_device(
    gpu: bool, tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    cfg = run_setup("OUTPUT_DIR", str(tmp_path))
    assert cfg.MODEL.DEVICE == ("cuda" if gpu else "cpu")
    assert ("no GPU is available: using 'cpu'" in log.text) is not gpu
    assert run_setup("OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu").MODEL.DEVICE == "cpu"


def test_gpus_are_hidden_from_processes_on_the_cpu(
    make_config: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    prepare_launch(make_config(), 1)
    prepare_launch(make_config(MODEL__DEVICE="cuda"), 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    prepare_launch(make_config(), 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    "args, error, text",
    [
        (
            ["MODEL.FPN.TOPOLGY", "fpn"],
            KeyError,
            "MODEL.FPN.TOPOLGY.*did you mean 'MODEL.FPN.TOPOLOGY'",
        ),
        (["MODLE.FPN.NORM", "GN"], KeyError, "MODLE.FPN.NORM.*DATASETS.*MODEL"),
        (["SEED"], ValueError, "'SEED' at their end has no partner"),
        (["SEED", "many"], ValueError, "SEED"),
        (["SEED", "1", "--resume"], ValueError, "--resume stands after"),
        (
            ["--config-file", "gone.yaml"],
            FileNotFoundError,
            "--config-file 'gone.yaml' does not exist",
        ),
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
    assert (own.TRAIN_JSON, own.TRAIN_IMAGES, own.VAL_JSON, own.VAL_IMAGES) == (
        "a.json",
        "a",
        "b.json",
        "",
    )


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
