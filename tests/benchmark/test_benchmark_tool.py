"""The command line, and the floor under this repository's operation counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fpn_plugin.cli.main import main

ROOT = Path(__file__).parents[2]
FLOOR = Path(__file__).parent / "floor.json"


def call(*args: object) -> int:
    """The tool in this process; its exit code."""
    return main(["benchmark", *map(str, args)])


def test_counts_do_not_grow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Made anew, when a count may grow, by the command in floor.json with --report."""
    monkeypatch.chdir(ROOT)
    command = json.loads(FLOOR.read_text())["command"]
    code = call(*command, "--compare", FLOOR, "--quiet")
    assert code == 0, capsys.readouterr().err


def test_a_doctored_floor_fails(
    configs: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    args = ["--config-file", configs["fpn"], "--baseline", "none", "--what", "counts", "--quiet"]
    args += ["--image-size", 64, 64]
    assert call(*args, "--report", tmp_path / "one") == 0
    old = tmp_path / "one" / "report.json"
    assert call(*args, "--compare", old) == 0
    report = json.loads(old.read_text())
    report["counts"]["fpn"]["neck_parameters"] -= 1000
    old.write_text(json.dumps(report))
    capsys.readouterr()
    assert call(*args, "--compare", old) == 1
    assert "REGRESSION fpn: neck_parameters grew from" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="holds a report"):
        call(*args, "--report", tmp_path / "one")
    report["schema"] = 0
    old.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="is of schema 0; this version reads 1 and 2"):
        call(*args, "--compare", old)


def test_an_inconclusive_ratio_is_refused(
    configs: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    args = ["--config-file", configs["fpn"], "--baseline", configs["base"], "--what", "neck"]
    args += ["--image-size", 64, 64, "--rounds", 2, "--max-spread", 0, "--min-sample", 0, "--quiet"]
    assert call(*args, "--report", tmp_path) == 3
    report = json.loads((tmp_path / "report.json").read_text())
    (row,) = report["timings"]["neck"]["ratios"]
    assert row["value"] is row["low"] is row["high"] is None and row["verdict"] == "too wide"
    text = "neck: fpn against baseline base is too wide after 8 rounds"
    assert any(text in failure for failure in report["failures"])
    assert "REFUSED neck: fpn against baseline base is too wide" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, error, text",
    [
        (["--what", "neck,nose"], KeyError, "--what: unknown name 'nose'"),
        (["--max-spread", "-1"], ValueError, "--max-spread -1.0"),
        (["--compare", "nothing.json"], FileNotFoundError, "--compare 'nothing.json'"),
        (["--weights", "nothing.pth"], FileNotFoundError, "--weights: .*'nothing.pth'"),
        (["--runs", "nowhere"], FileNotFoundError, "--runs 'nowhere' has no metrics.json"),
        (["--device", "cuda"], ValueError, "--device cuda: torch sees no GPU"),
    ],
)
def test_mistakes(
    configs: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    error: type[Exception],
    text: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(error, match=text):
        call("--config-file", configs["fpn"], "--baseline", "none", *args)


def test_no_config(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--config-file"):
        call("--what", "counts")


def test_as_a_user_runs_it(configs: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fpn_plugin", "benchmark", "--config-file", configs["fpn"]]
    command += ["--baseline", configs["base"], "--image-size", "64", "96", "--what", "neck"]
    command += ["--rounds", "2", "--max-spread", "100", "--report", str(tmp_path / "out")]
    command += ["MODEL.FPN.OUT_CHANNELS", "8"]
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "baseline base" in done.stdout and "not compared: other weights" in done.stdout
    assert "neck …" in done.stderr  # plain lines: it is no terminal
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["contestants"]["fpn"]["overrides"] == ["MODEL.FPN.OUT_CHANNELS", "8"]
    assert report["contestants"]["baseline base"]["overrides"] == []
    assert (tmp_path / "out" / "report.html").is_file()
