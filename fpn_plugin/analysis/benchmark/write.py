"""A report on disk and in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

from fpn_plugin.analysis.benchmark.page import page
from fpn_plugin.analysis.benchmark.plots import draw_all
from fpn_plugin.analysis.benchmark.tables import tables

JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"


def check_folder(folder: str, overwrite: bool, file: str = JSON, what: str = "a report") -> None:
    """Refuse a folder that holds a report; before anything is measured.

    Args:
        file: that tells a report.
        what: the error calls it.

    Raises:
        FileExistsError: naming the folder, unless `overwrite`.
        NotADirectoryError: if it is a file.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise NotADirectoryError(f"--report {folder!r} is a file, not a folder")
    if not overwrite and (Path(folder) / file).exists():
        raise FileExistsError(
            f"--report {folder!r} holds {what}; give --overwrite, or another folder"
        )


def write_report(report: Mapping[str, Any], folder: str) -> Path:
    """Write report.json, report.md, report.html and the pictures; returns the HTML page's path."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for old in [*root.glob("sweep_*.png"), root / "share.png", root / "latency_ap.png"]:
        old.unlink(missing_ok=True)
    (root / JSON).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    pictures = draw_all(report, root)
    found = tables(report)
    lines = [f"# Benchmark of {', '.join(report['contestants'])}", "", *_messages(report)]
    for table in found:
        lines += [f"## {table.title}", "", table.text("github"), "", table.note, ""]
    for title, path in pictures.items():
        lines += [f"![{title}]({path.name})", ""]
    (root / MARKDOWN).write_text("\n".join(lines), encoding="utf-8")
    (root / HTML).write_text(page(report, found, pictures), encoding="utf-8")
    return root / HTML


def terminal_text(report: Mapping[str, Any]) -> str:
    """All tables, and what was refused."""
    parts = [f"{table.title}\n\n{table.text()}\n" for table in tables(report)]
    return "\n".join([*parts, *_messages(report)]).rstrip()


def _messages(report: Mapping[str, Any]) -> list[str]:
    lines = [f"REFUSED {text}" for text in report["failures"]]
    lines += [f"Note: {text}" for text in report["notes"]]
    return [line for text in lines for line in (text, "")]
