"""docs/catalogue.md says what the registries, configs/pyramids and docs/data say now."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    path = ROOT / "docs" / "write_catalogue.py"
    spec = importlib.util.spec_from_file_location("write_catalogue", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules["write_catalogue"] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def entries(writer: ModuleType) -> dict:
    return writer.entries_on(writer.R50)


def test_the_page_and_the_drawings_are_current(
    writer: ModuleType, entries: dict, tmp_path: Path
) -> None:
    command = "is out of date: python docs/write_catalogue.py"
    assert writer.page(entries) == writer.PAGE.read_text(), command
    writer.check_parameters(entries)
    chosen = {name: entries[name] for name in ("fpn", "simple")}
    writer.draw(chosen, tmp_path)
    for name in chosen:
        drawing = writer.DRAWINGS / f"{name}.svg"
        assert drawing.read_bytes() == (tmp_path / f"{name}.svg").read_bytes(), command
    assert {path.stem for path in writer.DRAWINGS.iterdir()} == set(entries)


def test_recorded_numbers_of_another_pyramid_are_refused(
    writer: ModuleType, entries: dict, tmp_path: Path
) -> None:
    data = json.loads(writer.COSTS.read_text())
    data["entries"]["bifpn"]["settings"]["REPEATS"] = 2
    (tmp_path / "costs.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="'bifpn' was otherwise recorded .* --count"):
        writer.read_data(tmp_path / "costs.json", entries, "--count")


@pytest.mark.parametrize(
    "docstring, lacking",
    [
        ("My pyramid.\n\nOne. Two.\n\n::\n\n    P = C\n", "a first line 'Title, Source.'"),
        ("My, 2020.\n\nOne.\n\n::\n\n    P = C\n", "two sentences or more"),
        ("My, 2020.\n\nOne. Two.\n", "a formula: indented lines after '::'"),
    ],
)
def test_a_topology_without_its_text_is_named(
    writer: ModuleType, docstring: str, lacking: str
) -> None:
    with pytest.raises(ValueError, match="topology 'fpn': its docstring") as error:
        writer.text_of("fpn", docstring)
    assert lacking in str(error.value)


def test_published_numbers_are_exact_or_say_what_differs(writer: ModuleType) -> None:
    page = writer.PAGE.read_text()
    rows = list(csv.DictReader(writer.PUBLISHED.open()))
    assert len(rows) > 20
    for row in rows:
        *_, match, remark, source = row.values()
        assert source in page and (match == "exact" or remark in page), row
