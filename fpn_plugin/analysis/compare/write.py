"""A comparison on disk and in the terminal."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any, Mapping, Sequence

from fpn_plugin.analysis.compare.page import page, title
from fpn_plugin.analysis.compare.plots import draw_all
from fpn_plugin.analysis.compare.tables import tables
from fpn_plugin.analysis.report.figures import page_style, save

JSON, MARKDOWN, HTML = "compare.json", "compare.md", "compare.html"
RUNS, GROUPS = "runs.csv", "configs.csv"
_PICTURES = ("difference_*.png", "sizes_*.png", "ap_*.png", "loss.png", "cost.png")


def write_comparison(report: Mapping[str, Any], folder: str) -> Path:
    """Write JSON, CSV, Markdown, the page and the pictures; returns the page's path."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for pattern in _PICTURES:
        for old in root.glob(pattern):
            old.unlink()
    text = json.dumps(_without_nan(report), indent=1, allow_nan=False)
    (root / JSON).write_text(text + "\n", encoding="utf-8")
    _write_csv(root / RUNS, [_run_row(run) for run in report["runs"]])
    _write_csv(root / GROUPS, [_group_row(group) for group in report["groups"]])
    found = tables(report)
    lines = [f"# {title(report)}", "", report["summary"], "", *_messages(report)]
    for table in found:
        lines += [f"## {table.title}", "", table.text("github"), "", table.note, ""]
    with page_style():
        pictures = draw_all(report)
        (root / HTML).write_text(page(report, found, pictures), encoding="utf-8")
        for name, (heading, figure) in pictures.items():
            lines += [f"![{heading}]({save(figure, root / f'{name}.png').name})", ""]
    (root / MARKDOWN).write_text("\n".join(lines), encoding="utf-8")
    return root / HTML


def terminal_text(report: Mapping[str, Any]) -> str:
    """All tables, the notes, and at the end what it comes to."""
    parts = [f"{table.title}\n\n{table.text()}\n" for table in tables(report)]
    return "\n".join([*parts, *_messages(report), report["summary"]])


def _messages(report: Mapping[str, Any]) -> list[str]:
    lines = [f"Unfinished, left out: {folder}" for folder in report["unfinished"]]
    lines += [f"Note: {text}" for text in report["notes"]]
    return [line for text in lines for line in (text, "")]


def _run_row(run: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: run[key] for key in run if key != "metrics"}, **run["metrics"]}


def _group_row(group: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": group["name"], "runs": len(group["runs"])}
    row.update({key: group.get(key) for key in ("parameters", "gflops", "seconds")})
    for key, of in group["metrics"].items():
        row.update({key: of["mean"], f"{key} spread": of["spread"]})
    return row


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """With every column that a row has; empty where there is no number."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(_without_nan(list(rows)))


def _without_nan(value: Any) -> Any:
    """JSON has no nan: null in its place."""
    if isinstance(value, Mapping):
        return {key: _without_nan(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(of) for of in value]
    return None if isinstance(value, float) and math.isnan(value) else value
