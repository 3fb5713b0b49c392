"""Prepared folders appear whole or not at all, and nobody else's files are touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from storage import STAMP, atomic_path, prepare_folder

from fpn_plugin.paths import dataset_root


def build(folder: Path) -> None:
    (folder / "x").write_text("content")


def test_made_once_and_again_for_other_parameters(tmp_path: Path) -> None:
    target = tmp_path / "set"
    assert prepare_folder(target, {"seed": 1}, build)
    assert not prepare_folder(target, {"seed": 1}, build)
    assert prepare_folder(target, {"seed": 2}, build)
    assert json.loads((target / STAMP).read_text())["parameters"] == {"seed": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_set_is_made_again(damage: str, tmp_path: Path) -> None:
    prepare_folder(tmp_path / "set", {}, build)
    file = tmp_path / "set" / "x"
    file.unlink() if damage == "missing" else file.write_text("c")
    assert prepare_folder(tmp_path / "set", {}, build)
    assert file.read_text() == "content"


def test_interrupted_build_leaves_what_was_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise KeyboardInterrupt

    prepare_folder(tmp_path / "set", {"seed": 1}, build)
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(tmp_path / "set", {"seed": 2}, fail)
    assert not prepare_folder(tmp_path / "set", {"seed": 1}, build)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("made_by_us", [False, True])
def test_foreign_files_are_never_removed(made_by_us: bool, tmp_path: Path) -> None:
    target = tmp_path / "set"
    if made_by_us:
        prepare_folder(target, {"seed": 1}, build)
    (target / "mine").mkdir(parents=True)
    (target / "mine" / "photo.jpg").write_text("precious")
    with pytest.raises(ValueError, match="1 file.* such as 'mine/photo.jpg'"):
        prepare_folder(target, {"seed": 2}, build)
    assert (target / "mine" / "photo.jpg").read_text() == "precious"


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("precious")
    with pytest.raises(ValueError, match="set is a file"):
        prepare_folder(tmp_path / "set", {}, build)


def test_atomic_path(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x"
    with pytest.raises(RuntimeError), atomic_path(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with atomic_path(target) as path:
        path.write_text("whole")
    assert target.read_text() == "whole"


def test_root_is_detectron2s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert dataset_root() == Path("datasets")
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/sets")
    assert dataset_root() == Path.home() / "sets"
