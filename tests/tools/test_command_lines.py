"""The command `fpn`, and the files in tools/, which are the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fpn_plugin
from fpn_plugin.cli.arguments import split_overrides
from fpn_plugin.cli.main import COMMANDS, main
from fpn_plugin.version import __version__

ROOT = Path(__file__).parents[2]
TOOLS = [
    path
    for path in sorted((ROOT / "tools").glob("*.py"))
    if "import run_command" in path.read_text()
]


def test_the_help_of_each_command(capsys: pytest.CaptureFixture) -> None:
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and f"usage: fpn {name}" in text, name
        assert (command.__doc__ or "-").split("\n")[0] in text


def test_the_list_of_commands(capsys: pytest.CaptureFixture) -> None:
    for words, code, expected in (
        (["--help"], 0, "usage: fpn"),
        ([], 0, "usage: fpn"),
        (["tarin"], 2, "no command 'tarin'; did you mean 'train'?"),
        (["nothing"], 2, "no command 'nothing' (there are: train"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == code
        text = "".join(capsys.readouterr())
        assert expected in text and all(name in text for name in COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    text = capsys.readouterr().out
    assert text.startswith(f"fpn_plugin {__version__}, {Path(fpn_plugin.__file__).parent} (Detec")


@pytest.mark.parametrize(
    "words, others, pairs",
    [
        ("MODEL.DEVICE cpu --size 8 8", "--size 8 8", "MODEL.DEVICE cpu"),
        ("--input a.jpg IMG_1.JPG SEED -1 --quiet", "--input a.jpg IMG_1.JPG --quiet", "SEED -1"),
        ("SOLVER.BASE_LR -1e-3 --quiet", "--quiet", "SOLVER.BASE_LR -1e-3"),
        ("MODEL.BOTTOM_UP.ARGS.rate 1 a", "a", "MODEL.BOTTOM_UP.ARGS.rate 1"),
        ("MODEL.FPM.X 1 --quiet", "--quiet", "MODEL.FPM.X 1"),
        ("MODLE.X 1 train.seed=3 MODEL.pth", "MODLE.X 1 train.seed=3 MODEL.pth", ""),
        ("SEED --quiet OUTPUT_DIR o", "--quiet", "OUTPUT_DIR o SEED"),
        ("--weights TEST.PTH", "--weights TEST.PTH", ""),  # a file
    ],
)
def test_overrides_may_stand_anywhere(
    words: str, others: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("TEST.PTH").touch()
    assert split_overrides(words.split()) == (others.split(), pairs.split())


def test_a_reader_that_has_enough() -> None:
    """As of `fpn show … | head`: an exit code as after SIGPIPE, no traceback, nothing at the end."""
    code = "import sys; from fpn_plugin.cli.main import main; sys.stdin.read(); sys.exit(main())"
    command = [sys.executable, "-W", "ignore", "-c", code, "convert", "--help"]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    env = {**os.environ, "PYTHONUNBUFFERED": ""}  # argparse would swallow the error of its help
    with subprocess.Popen(command, **pipes, text=True, env=env) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_each_tool_is_a_command() -> None:
    called = {re.findall(r'run_command\("(.+)"\)', path.read_text())[0] for path in TOOLS}
    assert called == set(COMMANDS)


@pytest.mark.parametrize("version", ["0.0.9", ""])
def test_a_checkouts_tools_refuse_a_package_of_another_version(
    version: str, tmp_path: Path
) -> None:
    package = tmp_path / "fpn_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it was imported')")
    if version:
        (package / "version.py").write_text(f"__version__ = {version!r}\n")
    for path in TOOLS[:1] + [ROOT / "tools" / "export_table.py"]:
        done = run_tool(path, str(tmp_path))
        assert done.returncode == 2
        for text in (__version__, str(ROOT), version or "without a version", str(package)):
            assert text in done.stderr
    (package / "version.py").write_text(f"__version__ = {__version__!r}\n")
    done = run_tool(TOOLS[0], str(tmp_path))
    assert f"running fpn_plugin {__version__} of {package}, not of {ROOT}" in done.stderr
    assert "it was imported" in done.stderr


def test_a_checkouts_tools_run_its_package_where_none_is_installed(tmp_path: Path) -> None:
    """Without site-packages there is no Detectron2 either, which the package says."""
    done = run_tool(TOOLS[0], "", "-S")
    assert "fpn_plugin needs Detectron2" in done.stderr and str(ROOT) in done.stderr


def run_tool(path: Path, python_path: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *flags, str(path), "--help"]
    env = {**os.environ, "PYTHONPATH": python_path}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_nothing_is_said_of_announced_removals() -> None:
    """Also not in a process that this one starts, which imports Detectron2 first."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    code = (
        "import subprocess, sys; import fpn_plugin\n"
        "subprocess.run([sys.executable, '-c', 'import detectron2.modeling, detectron2.model_zoo'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr


def test_threads_are_told_to_sleep_before_torch_is_imported() -> None:
    """By the package itself, unless the user has chosen otherwise."""
    code = "import os, fpn_plugin; print(os.environ['OMP_WAIT_POLICY'])"
    for chosen, expected in ((None, "passive"), ("active", "active")):
        env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        env |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout.strip() == expected, done.stderr
