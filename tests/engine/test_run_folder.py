"""Whose results a folder holds, and when they may be replaced."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
from detectron2.config import CfgNode
from detectron2.data.datasets import register_coco_instances
from folders import DATA, MINE, RUN_FILES, digest, fill, run_setup
from tiny import VAL

from fpn_plugin.checkpoint.run_folder import metric_lines, run_results
from fpn_plugin.cli import demo
from fpn_plugin.cli import train as train_command
from fpn_plugin.data import DatasetError
from fpn_plugin.engine.run_folder import claim_demo_dir, remove_old_run
from fpn_plugin.engine.setup import argument_parser, setup
from fpn_plugin.engine.trainer import Trainer

MakeConfig = Callable[..., CfgNode]
FINISHED = ("model_final.pth", "inference/coco_instances_results.json", "metrics.json")


@pytest.mark.parametrize("name", RUN_FILES)
def test_results_of_another_run_are_refused(name: str, tmp_path: Path, log: Any) -> None:
    fill(tmp_path, (name, "config.yaml", "log.txt"))
    shown = name.split("/")[0]
    with pytest.raises(FileExistsError, match=f"OUTPUT_DIR.*{shown}.*--resume.*--overwrite"):
        run_setup("OUTPUT_DIR", str(tmp_path), *DATA)


def test_folders_without_results_are_taken(tmp_path: Path, log: Any) -> None:
    fill(tmp_path, (*MINE, "config.yaml", "log.txt"))
    (tmp_path / "metrics.json").touch()  # a run that failed before its first step
    before = digest(tmp_path)
    run_setup("OUTPUT_DIR", str(tmp_path), *DATA)
    run_setup("OUTPUT_DIR", str(tmp_path / "new"), *DATA)
    assert digest(tmp_path) == before


def test_the_command_line_alone_removes_nothing(tmp_path: Path, log: Any) -> None:
    fill(tmp_path, RUN_FILES)
    before = digest(tmp_path)
    run_setup("--overwrite", "OUTPUT_DIR", str(tmp_path), *DATA)
    assert digest(tmp_path) == before
    with pytest.raises(ValueError, match="--resume.*--overwrite"):
        run_setup("--overwrite", "--resume", "OUTPUT_DIR", str(tmp_path), *DATA)


def test_an_old_run_is_removed_and_nothing_else(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    started = ("config.yaml", "log.txt", "log.txt.rank1")
    fill(tmp_path, (*MINE, *RUN_FILES, *started))
    with open(tmp_path / "metrics.json", "a") as writer:  # as Detectron2's is, before it trains
        remove_old_run(str(tmp_path))
        writer.write("new\n")
    assert set(digest(tmp_path)) == {*MINE, *started, "metrics.json"}
    assert (tmp_path / "metrics.json").read_text() == "new\n"
    assert "removed" in log.text and "model_0000001.pth" in log.text


def test_overwrite_spares_the_weights_it_starts_from(tmp_path: Path, log: Any) -> None:
    fill(tmp_path, ("model_final.pth", "last_checkpoint"))
    weights = ("MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    with pytest.raises(ValueError, match="MODEL.WEIGHTS.*model_final.pth"):
        run_setup("--overwrite", "OUTPUT_DIR", str(tmp_path), *weights, *DATA)
    assert len(run_results(str(tmp_path))) == 2


def test_overwrite_replaces_the_old_run_only_when_it_trains(
    make_config: MakeConfig, tmp_path: Path, log: Any
) -> None:
    cfg = make_config(SOLVER__MAX_ITER=1)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    Trainer(cfg).train()
    run = Path(cfg.OUTPUT_DIR)
    fill(run, ("config.yaml", "notes.txt", "inference/a.json", "model_0000099.pth"))
    register_coco_instances("engine_gone", {}, "gone.json", "gone")
    (tmp_path / "broken.pth").write_text("no checkpoint")

    def overwrite(*opts: str) -> None:
        config = str(tmp_path / "config.yaml")
        args = argument_parser().parse_args(["--config-file", config, "--overwrite", *opts])
        train_command.train(setup(args), args)

    before = digest(run)
    with pytest.raises(DatasetError, match="gone.json"):
        overwrite("DATASETS.TRAIN", "('engine_gone',)")
    assert before.items() <= digest(run).items(), "bad data"
    with pytest.raises(KeyError, match="p9"):
        overwrite("MODEL.ROI_HEADS.IN_FEATURES", "['p9']")
    with pytest.raises(Exception, match="(?i)pickle|unpickl|invalid|broken"):
        overwrite("MODEL.WEIGHTS", str(tmp_path / "broken.pth"))
    # The config is that of the last start, whatever became of it.
    before.pop("config.yaml")
    assert before.items() <= digest(run).items(), "bad model or weights"

    overwrite("SOLVER.MAX_ITER", "2")
    left = set(digest(run))
    assert {"notes.txt", "config.yaml", "model_final.pth", "last_checkpoint"} <= left
    events = {name for name in before if name.startswith("events.")}
    assert events and not {"inference/a.json", "model_0000099.pth", *events} & left
    assert "MAX_ITER: 2" in (run / "config.yaml").read_text()
    assert [line["iteration"] for line in metric_lines(str(run))] == [1]


@pytest.mark.parametrize("names", [(), ("notes.txt", "config.yaml", "log.txt")])
def test_a_new_demo(names: tuple[str, ...], tmp_path: Path) -> None:
    fill(tmp_path, names)
    for _ in range(2):  # interrupted before its first step
        assert claim_demo_dir(str(tmp_path / "new"), "trees") == []
        assert claim_demo_dir(str(tmp_path), "trees") == []


def test_a_demo_goes_on_until_it_was_evaluated_at_its_end(tmp_path: Path) -> None:
    claim_demo_dir(str(tmp_path), "trees")
    fill(tmp_path, RUN_FILES)
    assert claim_demo_dir(str(tmp_path), "trees") == ["--resume"]
    fill(tmp_path, FINISHED[:1])
    assert claim_demo_dir(str(tmp_path), "trees") == ["--resume"], "not evaluated"
    fill(tmp_path, FINISHED)
    os.utime(tmp_path / FINISHED[1], (0, 0))
    assert claim_demo_dir(str(tmp_path), "trees") == ["--resume"], "evaluated before its end"
    fill(tmp_path, FINISHED)
    assert claim_demo_dir(str(tmp_path), "trees") == ["--overwrite"]
    remove_old_run(str(tmp_path))
    fill(tmp_path, RUN_FILES)
    assert claim_demo_dir(str(tmp_path), "trees") == ["--resume"], "interrupted the second time"


def test_a_demo_killed_in_its_last_evaluation_is_evaluated(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    cfg = make_config(SOLVER__MAX_ITER=1, DATASETS__TEST=(VAL,))
    folder = Path(cfg.OUTPUT_DIR)
    assert claim_demo_dir(cfg.OUTPUT_DIR, "trees") == []
    Trainer(cfg).train()
    shutil.rmtree(folder / "inference")
    (folder / "metrics.json").write_text("")
    assert claim_demo_dir(cfg.OUTPUT_DIR, "trees") == ["--resume"]
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert "bbox/AP" in (folder / "metrics.json").read_text()
    assert claim_demo_dir(cfg.OUTPUT_DIR, "trees") == ["--overwrite"]


@pytest.mark.parametrize("names", [FINISHED, RUN_FILES], ids=["finished", "interrupted"])
def test_a_demo_takes_nobody_elses_run(names: tuple[str, ...], tmp_path: Path) -> None:
    fill(tmp_path / "run", names)
    claim_demo_dir(str(tmp_path / "scenes"), "scenes")
    fill(tmp_path / "scenes", names)
    before = digest(tmp_path)
    for folder, whose in (("run", "a run that no demo started"), ("scenes", "the demo 'scenes'")):
        with pytest.raises(
            FileExistsError, match=f"--output.*{folder}.*{whose}.*'trees'.*choose another folder"
        ):
            claim_demo_dir(str(tmp_path / folder), "trees")
    assert digest(tmp_path) == before


def test_the_demo_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for args, opts in ((("SEED", "-1"), ["SEED", "-1"]), ((), [])):
        parsed = demo.parse_args(["trees", "--output", str(tmp_path), *args])
        assert (parsed.demo, parsed.output, parsed.opts) == ("trees", tmp_path, opts)
    fill(tmp_path, FINISHED)
    monkeypatch.setattr(demo, "dataset_root", lambda: pytest.fail("it went on"))
    with pytest.raises(FileExistsError, match="a run that no demo started"):
        demo.run(parsed)


def test_lines_of_metrics_that_are_whole(tmp_path: Path) -> None:
    """A killed run left half of a line; the run that went on wrote its first behind it."""
    text = '{"iteration": 1}\n{"iterat{"iteration": 2, "AP": NaN}\n7\n{"iteration": 3}\n{"it'
    (tmp_path / "metrics.json").write_text(text)
    assert [line["iteration"] for line in metric_lines(str(tmp_path))] == [1, 2, 3]
    assert metric_lines(str(tmp_path / "none")) == []
