"""tools/setup_env.py: which Detectron2 an environment gets, and that a user's own is left alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from folders import load_tool


@pytest.fixture
def tool() -> ModuleType:
    return load_tool("setup_env")


@pytest.fixture
def commands(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been run; nothing is."""
    lines: list[str] = []

    def run(*words: object) -> None:
        lines.append(" ".join(map(str, words)))
        if "-m venv" in lines[-1]:
            make_environment(Path(str(words[-1])))

    monkeypatch.setattr(tool, "run", run)
    monkeypatch.setattr(tool, "installer", lambda python: ["INSTALL"])
    return lines


def make_environment(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    return folder


def call(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, venv: Path, detectron2: str = "", *flags: str
) -> None:
    words = ["setup_env.py", "--venv", str(venv), "--detectron2", detectron2, *flags]
    monkeypatch.setattr(sys, "argv", words)
    tool.main()


def test_a_new_environment_gets_the_lock_and_the_republication_once(
    tool: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tool, "has_detectron2", lambda python: False)
    call(tool, monkeypatch, tmp_path / "env")
    assert any("--require-hashes" in line and "requirements.txt" in line for line in commands)
    assert any(line.endswith("tools/detectron2_wheel") for line in commands)
    assert any("pip check" in line for line in commands)
    commands.clear()
    call(tool, monkeypatch, tmp_path / "env")
    assert commands == []


def test_a_users_own_detectron2_is_kept_also_when_the_lock_changes(
    tool: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    env = make_environment(tmp_path / "env")
    monkeypatch.setattr(tool, "has_detectron2", lambda python: True)
    for fingerprint in ("before", "after a git pull"):
        monkeypatch.setattr(
            tool, "fingerprint", lambda *choices, value=fingerprint: value.replace(" ", "")
        )
        commands.clear()
        call(tool, monkeypatch, env)
        (only,) = commands
        assert "--editable" in only and "requirements.txt" not in only
    with pytest.raises(SystemExit, match="DETECTRON2=git.*of its own, which is kept"):
        call(tool, monkeypatch, env, "git")


def test_a_detectron2_from_git_stays_until_another_is_asked_for(
    tool: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tool, "has_detectron2", lambda python: python.exists())
    call(tool, monkeypatch, tmp_path / "env", "git")
    assert any("git+https" in line for line in commands)
    commands.clear()
    call(tool, monkeypatch, tmp_path / "env")
    assert commands == []
    call(tool, monkeypatch, tmp_path / "env", "pinned")
    assert any(line.endswith("tools/detectron2_wheel") for line in commands)


def test_an_interrupted_set_up_goes_on_as_our_own(
    tool: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tool, "has_detectron2", lambda python: python.exists())
    monkeypatch.setattr(tool, "install", lambda *args: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        call(tool, monkeypatch, tmp_path / "env", "", "--torch", "cpu")
    chosen: list[str] = []
    monkeypatch.setattr(
        tool, "install", lambda args, python, detectron2: chosen.extend([detectron2, args.torch])
    )
    call(tool, monkeypatch, tmp_path / "env")
    assert chosen == ["pinned", "cpu"]


def test_the_cpu_builds_of_torch_are_chosen_once(
    tool: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tool, "has_detectron2", lambda python: False)
    call(tool, monkeypatch, tmp_path / "env", "", "--torch", "cpu")
    (backend,) = [line for line in commands if "--torch-backend cpu" in line]
    builds = Path(backend.split()[-1]).read_text()
    assert "torch==" in builds and "torchvision==" in builds and "--hash" not in builds
    (hashed,) = [line for line in commands if "--require-hashes" in line]
    others = Path(hashed.split()[-1]).read_text()
    assert "\nnumpy==" in others
    assert not any(f"\n{name}" in others for name in ("torch==", "nvidia-", "triton==", "cuda-"))
    commands.clear()
    call(tool, monkeypatch, tmp_path / "env")  # as before
    assert commands == []
    call(tool, monkeypatch, tmp_path / "env", "", "--torch", "default")
    assert not any("--torch-backend" in line for line in commands)


def test_the_oldest_versions_are_those_of_setup_py(
    tool: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tool, "has_detectron2", lambda python: False)
    call(tool, monkeypatch, tmp_path / "env", "", "--oldest")
    assert any("--resolution lowest-direct" in line and "[dev]" in line for line in commands)
    assert not any("requirements.txt" in line for line in commands)
