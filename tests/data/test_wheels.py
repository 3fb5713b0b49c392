"""Downloads are pinned by hash, kept, and fail with a reason."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wheels
from wheels import fetch_wheel, member_names, read_members


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "some_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg/a.txt", "A")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_cached_wheel_needs_no_pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.sys, "executable", "/nowhere/python")
    assert fetch_wheel("some-thing==1.0", sha256(wheel), wheel.parent) == wheel


def test_damaged_cache_is_replaced(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, content = sha256(wheel), wheel.read_bytes()
    wheel.write_bytes(content[:-1])

    def download(requirement: str, expected: str, scratch: Path, suffix: str) -> Path:
        assert (requirement, expected, suffix) == ("some-thing==1.0", good, "-*.whl")
        (scratch / wheel.name).write_bytes(content)
        return scratch / wheel.name

    monkeypatch.setattr(wheels, "_download", download)
    assert fetch_wheel("some-thing==1.0", good, wheel.parent) == wheel
    assert sha256(wheel) == good
    assert list(wheel.parent.iterdir()) == [wheel]


def test_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"not download some-thing==1.0 (.|\n)*pip said:\n.+"):
        fetch_wheel("some-thing==1.0", "0" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_environment_without_pip_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="by pip, which .* does not have.*ensurepip"):
        fetch_wheel("some-thing==1.0", "0" * 64, tmp_path)


def fetch(folder: Path) -> None:
    fetch_wheel("some-thing==1.0", "0" * 64, folder)


def fetch_detectron2(folder: Path) -> None:
    file = Path(__file__).resolve().parents[2] / "tools/detectron2_wheel/backend.py"
    spec = importlib.util.spec_from_file_location("backend", file)
    assert spec and spec.loader
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    backend._download(str(folder))


@pytest.mark.parametrize("download", [fetch, fetch_detectron2])
def test_nothing_is_cached_in_the_home_folder(
    download: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / "some_thing-1.0-py3-none-any.whl").write_bytes(b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    download(tmp_path)
    assert len(commands) == 1
    assert "download" in commands[0] and "--no-cache-dir" in commands[0]


@pytest.mark.parametrize("requirement", ["thing", "thing>=1", "thing==1 --pre", "-r x==1"])
def test_only_pins(requirement: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not of the form 'name==version'"):
        fetch_wheel(requirement, "0" * 64, tmp_path)


def test_members_of_a_source_distribution(tmp_path: Path) -> None:
    path = tmp_path / "some_thing-1.0.tar.gz"
    (tmp_path / "a.txt").write_text("A")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "a.txt", "some_thing-1.0/pkg/a.txt")
    assert fetch_wheel("some-thing==1.0", sha256(path), tmp_path, source=True) == path
    assert member_names(path) == ["some_thing-1.0/pkg/a.txt"]
    assert read_members(path, member_names(path)) == {"some_thing-1.0/pkg/a.txt": b"A"}
    with pytest.raises(KeyError, match="no member 'some_thing-1.0/pkg/b'.*pkg/a.txt"):
        read_members(path, ["some_thing-1.0/pkg/b"])


def test_members(wheel: Path) -> None:
    assert read_members(wheel, ["pkg/a.txt"]) == {"pkg/a.txt": b"A"}
    with pytest.raises(KeyError, match="no member 'pkg/b.txt'.*pkg/a.txt"):
        read_members(wheel, ["pkg/b.txt"])
    assert list(wheel.parent.iterdir()) == [wheel]
