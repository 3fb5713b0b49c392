"""A benchmark's report as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

from fpn_plugin.analysis.report.page import html_figure, html_page, html_table, paragraph
from fpn_plugin.analysis.report.tables import Table


def page(report: Mapping[str, Any], tables: Sequence[Table], pictures: Mapping[str, Path]) -> str:
    """The whole report."""
    machine = report["machine"]
    commit = machine["commit"][:12] + ("+dirty" if machine["commit"].endswith("+dirty") else "")
    where = machine.get("gpu", machine["cpu"])
    parts = [
        paragraph(f"{machine['date']}, commit {commit or 'unknown'}, {where}"),
        *_messages(report),
        *(html_table(table) for table in tables),
        *(html_figure(title, path) for title, path in pictures.items()),
    ]
    return html_page(f"Benchmark of {', '.join(report['contestants'])}", parts)


def _messages(report: Mapping[str, Any]) -> list[str]:
    lines = [paragraph(f"Refused: {text}", "bad") for text in report["failures"]]
    if report["timings"] and not lines:
        lines.append(paragraph("Every ratio is told, and all outputs agree.", "good"))
    return lines + [paragraph(f"Note: {text}") for text in report["notes"]]
