"""Cells hold any text, such as a user's names of classes."""

from __future__ import annotations

from fpn_plugin.report.tables import Table


def test_markdown_keeps_a_cell_in_its_column_and_line() -> None:
    table = Table("", ["a|b", "n"], [["x|y\nz", "1"]], best={(0, 1)})
    header, _, row = table.text("github").splitlines()
    assert header.split() == ["|", r"a\|b", "|", "n", "|"]
    assert row.split() == ["|", r"x\|y", "z", "|", "**1**", "|"]
    assert "x|y" in table.text()
