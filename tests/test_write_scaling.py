"""docs/scaling.md says what docs/data and the model of a step's time say now."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_page_and_its_figure_are_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    import scaling_page
    import write_scaling

    data = json.loads(write_scaling.DATA.read_text())
    command = "is out of date: python docs/write_scaling.py"
    assert scaling_page.page(data) == write_scaling.PAGE.read_text(), command
    scaling_page.draw(data, tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").read_bytes() == write_scaling.FIGURE.read_bytes(), command
