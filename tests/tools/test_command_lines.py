"""The command `fpn`, and the files in tools/, which are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fpn_plugin.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
TOOLS = [path for path in sorted((ROOT / "tools").glob("*.py")) if "cli.main" in path.read_text()]


def test_the_help_of_each_command(capsys: pytest.CaptureFixture) -> None:
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and f"usage: fpn {name}" in text, name
        assert (command.__doc__ or "-").split("\n")[0] in text


def test_the_list_of_commands(capsys: pytest.CaptureFixture) -> None:
    for words, code in ((["--help"], 0), ([], 0), (["tarin"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == code
        text = "".join(capsys.readouterr())
        assert all(name in text for name in COMMANDS)


def test_each_tool_is_a_command() -> None:
    assert len(TOOLS) == len(COMMANDS)
    for path in TOOLS:
        assert any(f'main(["{name}", ' in path.read_text() for name in COMMANDS), path


def test_threads_are_told_to_sleep_before_torch_is_imported() -> None:
    """By the package itself, unless the user has chosen otherwise."""
    code = "import os, fpn_plugin; print(os.environ['OMP_WAIT_POLICY'])"
    for chosen, expected in ((None, "passive"), ("active", "active")):
        env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        env |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout.strip() == expected, done.stderr
