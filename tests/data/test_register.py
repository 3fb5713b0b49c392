"""The prepared sets are found by name, and nothing is read before they are used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from prepare_scenes import CLASSES, SceneOptions, prepare_scenes

from fpn_plugin.data import check_dataset, register_all

NAMES = ("trees_train", "trees_val", "scenes_train", "scenes_val")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Register anew below a temporary folder, and as it was afterwards."""
    kept = {n: MetadataCatalog.get(n) for n in NAMES if n in DatasetCatalog.list()}
    forget()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all()
    yield tmp_path
    forget()
    monkeypatch.undo()
    if kept:
        register_all()


def forget() -> None:
    for name in NAMES:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)


def test_registered_without_files(fresh: Path) -> None:
    register_all()
    assert set(NAMES) <= set(DatasetCatalog.list())
    assert MetadataCatalog.get("trees_val").thing_classes == ["tree"]
    assert MetadataCatalog.get("trees_val").json_file == str(fresh / "trees/annotations/val.json")
    assert list(fresh.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_unprepared_set_names_its_command(name: str, fresh: Path) -> None:
    with pytest.raises(ValueError, match=f"python datasets/prepare_{name.split('_')[0]}.py"):
        check_dataset(name)


def test_scenes_load_and_pass_the_checks(fresh: Path) -> None:
    prepare_scenes(fresh, SceneOptions(train=3, val=1, width=96, height=96, max_size=64))
    report = check_dataset("scenes_train", "full", masks=True)
    assert (report.num_images, report.classes, report.warnings) == (3, CLASSES, {})
    records = DatasetCatalog.get("scenes_train")
    assert len(records) == 3 and all(Path(r["file_name"]).is_file() for r in records)
    assert sum(len(r["annotations"]) for r in records) == report.num_annotations
