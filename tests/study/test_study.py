"""A study of tiny runs: skipped, resumed, refused, failed, interrupted, locked."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Iterator

import pytest
import torch
import yaml
from helpers import own_datasets
from tiny import tiny_config, write_dataset

from fpn_plugin.cli import study as study_command
from fpn_plugin.compare import costs
from fpn_plugin.compare.runs import read_record
from fpn_plugin.report.progress import RunsProgress
from fpn_plugin.study.config import Study, StudyError, read_study
from fpn_plugin.study.execute import (
    compare_runs,
    lock,
    run_study,
    status_text,
)
from fpn_plugin.study.launchers import LocalLauncher
from fpn_plugin.study.plan import (
    DONE,
    INTERRUPTED,
    OTHER,
    PENDING,
    PlannedRun,
    check_folders,
    plan_runs,
)

RUNS = {"a": {}, "avg": {"MODEL.RPN.NMS_THRESH": 0.6}}
# trains; a run called avg is killed when it is first started
KILLED_ONCE = """
import os, signal, sys
from pathlib import Path
marker = Path(sys.argv[0]).with_name("killed")
if "avg" in str(sys.argv) and not marker.exists():
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL)
from fpn_plugin.cli.main import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def write_config(folder: Path) -> None:
    """The tiny detector on its dataset, which needs no registration: it is one's own data."""
    data = write_dataset(folder, images=4)
    own = {"DATASETS__OWN__" + key: str(data) for key in ("TRAIN_JSON", "VAL_JSON")}
    own |= {"DATASETS__OWN__" + key: str(data.parent) for key in ("TRAIN_IMAGES", "VAL_IMAGES")}
    cfg = tiny_config(folder, DATASETS__TRAIN=(), TEST__EVAL_PERIOD=0, SEED=-1, **own)
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.DETECTIONS_PER_IMAGE = 2, 5
    (folder / "tiny.yaml").write_text(cfg.dump())


def write_study(folder: Path) -> Path:
    path, output = folder / "study.yaml", str(folder / "out")
    content = {"output": output, "base": "tiny.yaml", "runs": RUNS, "baseline": "a"}
    path.write_text(yaml.safe_dump({**content, "keep_checkpoints": False}))
    return path


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are counted on these."""
    monkeypatch.setattr(costs, "SIZE", (64, 64))


@pytest.fixture(scope="module", autouse=True)
def _registry() -> Iterator[None]:
    """Forget the own data that a study in this process registers."""
    with own_datasets():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that is done, with the report of its comparison."""
    folder = tmp_path_factory.mktemp("study")
    write_config(folder)
    path = write_study(folder)
    out, err, tool = io.StringIO(), io.StringIO(), study_command
    words = [str(path), "SOLVER.MAX_ITER", "3", "--only", "a,avg"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(costs, "SIZE", (64, 64))
        patch.setenv("OMP_NUM_THREADS", "1")
        # what would outlive this: a handler of signals, and the loggers' levels
        patch.setattr(tool.signal, "signal", lambda *args: None)
        patch.setattr(tool.execute, "quiet_loggers", lambda: None)
        assert tool.run(tool.parse_args(words)) == 0, err.getvalue()
    page = folder / "out" / "report" / "compare.html"
    assert out.getvalue().splitlines()[-1] == f"The report is in {page}"
    (folder / "said.txt").write_text(err.getvalue())
    return folder


def study_of(folder: Path, *opts: str) -> tuple[Study, list[PlannedRun]]:
    study = read_study(folder / "study.yaml", opts or ["SOLVER.MAX_ITER", "3"])
    return study, plan_runs(study)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The study that is done, in a folder of this test's own."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    write_study(copy)
    return copy


def never(*args: object) -> None:
    raise AssertionError("a run was started")


def local(script: Path | None = None, **options: int) -> LocalLauncher:
    """Trains by a script, or must not train at all."""
    return LocalLauncher((sys.executable, str(script)) if script else ("nothing",), **options)


def test_a_study_trains_evaluates_records_and_compares(finished: Path) -> None:
    said = (finished / "said.txt").read_text()
    assert "2 runs in" in said and ", 0 of them done" in said
    assert "run 1 of 2, a seed 0: done in" in said and "run 2 of 2, avg seed 0: done in" in said
    assert "run 1 of 2, a seed 0: iteration 2 of 3, loss " in said  # with a checkpoint
    for name in RUNS:
        folder = finished / "out" / name / "seed-0"
        assert [file.name for file in folder.glob("*.pth")] == ["model_final.pth"]
        record = read_record(folder)
        (session,) = record["sessions"]
        assert (record["name"], record["seed"], session["ended"]) == (name, 0, "done")
        assert record["seconds"] == session["seconds"] > 0
        assert {"versions", "commit", "cpu"} <= set(session["machine"])
        assert ["SOLVER.MAX_ITER", "3"] == record["overrides"][-2:]
    content = json.loads((finished / "out" / "report" / "compare.json").read_text())
    # as the study calls them
    assert [group["name"] for group in content["groups"]] == list(RUNS)
    assert content["baseline"] == "a"


def test_a_study_in_parallel_gives_the_comparison_of_the_serial_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the digit, with one run killed and started again on the way."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = tmp_path / "train.py"
    script.write_text(KILLED_ONCE)
    serial, _ = study_of(finished)
    study = dataclasses.replace(serial, output=tmp_path / "parallel")
    runs, said = plan_runs(study), io.StringIO()
    outcome = run_study(study, runs, RunsProgress(stream=said), local(script, jobs=2))
    assert (outcome.done, outcome.failures) == (runs, {})
    assert "avg seed 0: lost at 0: it was killed by SIGKILL" in said.getvalue()
    sessions = [read_record(run.folder)["sessions"] for run in runs]
    assert [[s["ended"] for s in past] for past in sessions] == [["done"], ["lost", "done"]]
    assert sessions[0][0]["started"] < sessions[1][1]["started"]
    compare_runs(study, outcome.done, quiet=True)
    compared = [json.loads((s.output / "report/compare.json").read_text()) for s in (serial, study)]
    for content in compared:
        del content["date"]
        for run in content["runs"]:
            del run["folder"]
    assert compared[0] == compared[1]
    for run in runs:
        first, second = (
            torch.load(s.output / run.config.name / "seed-0/model_final.pth", weights_only=True)
            for s in (serial, study)
        )
        assert all(torch.equal(first["model"][key], second["model"][key]) for key in first["model"])


def test_a_run_that_is_lost_again_and_again_fails(copied: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import os\nos.kill(os.getpid(), 9)")
    study, runs = study_of(copied)
    shutil.rmtree(runs[0].folder)
    outcome = run_study(study, runs, RunsProgress(quiet=True), local(script))
    assert outcome.done == runs[1:]
    assert "lost 3 times without getting further" in outcome.failures["a seed 0"]
    assert len(read_record(runs[0].folder)["sessions"]) == 3


def test_what_is_done_is_skipped_and_compared_again(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpn_plugin.study.launchers.Session", never)
    monkeypatch.setattr("fpn_plugin.compare.report.draw_all", lambda report: {})
    monkeypatch.setattr("fpn_plugin.compare.comparison.count_costs", lambda group: {})
    study, runs = study_of(copied)
    assert [run.state() for run in runs] == [DONE, DONE]
    outcome = run_study(study, runs, RunsProgress(quiet=True), local())
    assert (outcome.done, outcome.failures) == (runs, {})
    assert list((study.output / "report").glob("*.svg"))
    assert compare_runs(study, outcome.done, quiet=True) == study.output / "report" / "compare.html"
    assert not list((study.output / "report").glob("*.svg"))


def test_report_only_compares_what_is_done_and_starts_nothing(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool, output = study_command, copied / "out"
    monkeypatch.setattr(tool.execute, "quiet_loggers", lambda: None)
    monkeypatch.setattr(tool.execute, "run_study", never)
    for name in ("avg", "report"):
        shutil.rmtree(output / name)
    words = [str(copied / "study.yaml"), "SOLVER.MAX_ITER", "3", "--only", "a,avg", "--report-only"]
    assert tool.run(tool.parse_args(words)) == 0
    page = output / "report" / "compare.html"
    assert page.is_file() and f"The report is in {page}" in capsys.readouterr().out
    shutil.rmtree(output / "a")
    with pytest.raises(StudyError, match="--report-only: no run in .* is done yet"):
        tool.run(tool.parse_args(words))


def test_another_config_is_refused_before_anything_starts(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpn_plugin.study.launchers.Session", never)
    study, runs = study_of(copied, "SOLVER.MAX_ITER", "5", "MODEL.DEVICE", "cpu")
    shutil.rmtree(runs[0].folder)
    assert [run.state() for run in runs] == [PENDING, OTHER]
    with pytest.raises(ValueError, match="avg/seed-0: SOLVER.MAX_ITER 3 -> 5\nNothing was started"):
        run_study(study, runs, RunsProgress(quiet=True), local())
    status = status_text(runs).splitlines()
    assert status[0] == "a seed 0: to do" and "--config-file" in status[1]
    assert status[2:] == ["avg seed 0: another config's", "  SOLVER.MAX_ITER 3 -> 5"]


def test_an_interrupted_run_is_resumed(copied: Path, tmp_path: Path) -> None:
    study, runs = study_of(copied)
    metrics = runs[0].folder / "metrics.json"
    kept = [line for line in metrics.read_text().splitlines() if "bbox/AP" not in line]
    metrics.write_text("".join(f"{line}\n" for line in kept) + '{"half')
    assert runs[0].state() == INTERRUPTED  # killed in its last evaluation
    assert "a seed 0: broken off at 3 of 3" in status_text(runs)
    script = tmp_path / "train.py"
    script.write_text(
        f"open({str(metrics)!r}, 'a').write('{{\"iteration\": 2, \"bbox/AP\": 1}}\\n')"
    )
    outcome = run_study(study, runs, RunsProgress(quiet=True), local(script))
    assert outcome.done == runs
    record = read_record(runs[0].folder)
    first, second = record["sessions"]
    assert "--resume" in second["command"] and "--resume" not in first["command"]
    assert record["seconds"] == pytest.approx(first["seconds"] + second["seconds"], abs=0.11)


def test_failing_runs_are_reported_and_the_others_go_on(copied: Path, tmp_path: Path) -> None:
    """One ends with an error, the other without results."""
    script = tmp_path / "train.py"
    script.write_text("import sys\nif 'out/a/' in str(sys.argv): sys.exit('last words')")
    study, runs = study_of(copied)
    for run in runs:
        shutil.rmtree(run.folder)
    outcome = run_study(study, runs, RunsProgress(quiet=True), local(script))
    assert outcome.done == []
    assert list(outcome.failures) == ["a seed 0", "avg seed 0"]
    assert "exit code 1" in outcome.failures["a seed 0"]
    assert "last words" in outcome.failures["a seed 0"]
    assert "without a final checkpoint" in outcome.failures["avg seed 0"]
    (session,) = read_record(runs[0].folder)["sessions"]
    assert session["ended"] == "failed" and "last words" in session["output"]
    check_folders(runs)  # a run that failed at its start leaves nothing that is in the way


def test_two_studies_do_not_share_a_folder(copied: Path) -> None:
    study, runs = study_of(copied)
    with lock(study.output):
        with pytest.raises(ValueError, match="another study, or a run that a killed one left"):
            run_study(study, runs, RunsProgress(quiet=True), local())


def test_an_interrupt_stops_the_run_with_what_it_started(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, runs = study_of(copied)
    metrics = runs[0].folder / "metrics.json"
    script, pids = tmp_path / "train.py", tmp_path / "pids"
    script.write_text(
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"open({str(metrics)!r}, 'w').write('{{\"iteration\": 1, \"total_loss\": 1}}\\n')\n"
        "time.sleep(60)\n"
    )

    def interrupt(*values: object) -> None:
        raise KeyboardInterrupt

    progress = RunsProgress(quiet=True)
    monkeypatch.setattr(progress, "update", interrupt)
    shutil.rmtree(runs[0].folder)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, runs, progress, local(script))
    assert read_record(runs[0].folder)["sessions"][-1]["ended"] == "interrupted"
    for pid in pids.read_text().split():
        status = Path("/proc", pid, "status")
        for _ in range(50):
            if not status.exists() or "State:\tZ" in status.read_text():
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"process {pid} still runs")


def test_sigterm_ends_the_tool(finished: Path, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "other"), "--only", "a", "--seeds", "5"]
    command = [sys.executable, "-m", "fpn_plugin", "study", str(finished / "study.yaml"), *output]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*command, "SOLVER.MAX_ITER", "100000"], stdout=pipe, stderr=pipe, text=True
    )
    record = tmp_path / "other" / "a" / "seed-5" / "study.json"
    for _ in range(1200):  # on a busy machine its imports take long
        if record.is_file() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    try:
        out, err = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 130 and "Interrupted; run it again to go on" in err
    assert json.loads(record.read_text())["sessions"][-1]["ended"] == "interrupted"
