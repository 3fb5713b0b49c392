"""A comparison on disk and in the terminal: JSON, CSV, Markdown, pictures and one HTML page."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
from pathlib import Path
from typing import Any, Mapping, Sequence

from jinja2 import Template
from matplotlib.figure import Figure

from fpn_plugin.benchmark.report import without_nan
from fpn_plugin.compare.plots import colour, draw_all
from fpn_plugin.compare.tables import TASK_NAMES, all_tables, number, verdict_text
from fpn_plugin.report.figures import page_style, save
from fpn_plugin.report.page import html_page, html_svg, html_table, paragraph
from fpn_plugin.report.tables import Table

JSON, MARKDOWN, HTML = "compare.json", "compare.md", "compare.html"
RUNS, GROUPS = "runs.csv", "configs.csv"
_PICTURES = [
    f"{name}.{suffix}"
    for name in ("difference_*", "sizes_*", "ap_*", "loss", "cost")
    for suffix in ("svg", "png")  # earlier versions wrote PNGs, and the losses
]
_STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(12.8rem, 1fr));
  gap: .8rem; margin: 1.4rem 0 }
.card { border: 1px solid var(--line); border-top: 4px solid; border-radius: 8px;
  padding: .6rem .9rem }
.card b { display: block; font-size: 1.7rem; line-height: 1.3; font-variant-numeric: tabular-nums }
.card span { display: block; color: var(--soft); font-size: .85rem }
.card .name { color: var(--text); font-weight: 600; font-size: .95rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr));
  gap: 1rem 2rem; margin-top: 1.5rem }
.plots figure { margin: 0; min-width: 0 } .plots figcaption { font-weight: 600; color: var(--text) }
.tables { display: flex; flex-wrap: wrap; gap: 0 3.5rem }
section { min-width: min(20rem, 100%); max-width: 100% }
section p { contain: inline-size }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back) }
th:first-child { background: var(--head) }
tbody tr:hover td { background: var(--head) }
"""
_CARDS = Template(
    """\
<div class="cards">{% for card in cards %}
<div class="card" style="border-top-color: {{ card.colour }}">
{#- #}<span class="name">{{ card.name }}</span>
{%- for value, label in card.aps %}<b>{{ value }}</b><span>{{ label }}</span>{% endfor %}
{%- for line in card.lines %}<span>{{ line }}</span>{% endfor %}</div>
{%- endfor %}</div>""",
    autoescape=True,
)


def write_comparison(report: Mapping[str, Any], folder: str) -> Path:
    """Write JSON, CSV, Markdown, the page and the pictures; returns the page's path."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for pattern in _PICTURES:
        for old in root.glob(pattern):
            old.unlink()
    text = json.dumps(without_nan(report), indent=1, allow_nan=False)
    (root / JSON).write_text(text + "\n", encoding="utf-8")
    _write_csv(root / RUNS, [_run_row(run) for run in report["runs"]])
    _write_csv(root / GROUPS, [_group_row(group, report) for group in report["groups"]])
    tables = all_tables(report)
    lines = [f"# {_title(report)}", "", report["summary"], "", *_messages(report)]
    for table in tables:
        lines += [f"## {table.title}", "", table.text("github"), "", table.note, ""]
    with page_style():
        pictures = draw_all(report)
        (root / HTML).write_text(_page(report, tables, pictures), encoding="utf-8")
        for name, (heading, figure) in pictures.items():
            lines += [f"![{heading}]({save(figure, root / f'{name}.svg').name})", ""]
    lines += [_on_losses(report), ""]
    (root / MARKDOWN).write_text("\n".join(lines), encoding="utf-8")
    return root / HTML


def terminal_text(report: Mapping[str, Any]) -> str:
    """All tables, the notes, and at the end the summary."""
    parts = [f"{table.title}\n\n{table.text()}\n" for table in all_tables(report)]
    return "\n".join([*parts, *_messages(report), report["summary"]])


def _page(
    report: Mapping[str, Any], tables: Sequence[Table], pictures: Mapping[str, tuple[str, Figure]]
) -> str:
    images = f", {report['images']} images" if report["images"] else ""
    runs = _count(report["runs"], "run")
    parts = [
        paragraph(f"{report['dataset']}{images} · {runs} · {report['date'][:10]}"),
        paragraph(report["summary"], "lead"),
        _cards(report),
        *(paragraph(f"Unfinished, left out: {folder}", "bad") for folder in report["unfinished"]),
        *(paragraph(f"Note: {note}") for note in report["notes"]),
        '<div class="plots">',
        *(html_svg(title, figure) for title, figure in pictures.values()),
        "</div>",
        paragraph(_on_losses(report)),
        '<div class="tables">',
        *(f"<section>{html_table(table)}</section>" for table in tables),
        "</div>",
    ]
    return html_page(_title(report), parts, _STYLE)


def _title(report: Mapping[str, Any]) -> str:
    """The names of the configs if they are few, else their number."""
    names = [group["name"] for group in report["groups"]]
    return " · ".join(names) if len(names) < 5 else f"{len(names)} configs compared"


def _on_losses(report: Mapping[str, Any]) -> str:
    """Say where to see the losses, which TensorBoard shows better than a page could."""
    folders = [os.path.abspath(run["folder"]) for run in report["runs"]]
    return f"Losses while training: tensorboard --logdir {shlex.quote(os.path.commonpath(folders))}"


def _cards(report: Mapping[str, Any]) -> str:
    """Each config at a glance, in its colour."""
    cards = []
    for i, group in enumerate(report["groups"]):
        aps = []
        for task in report["tasks"]:
            metric = group["metrics"].get(f"{task}/AP", {})
            spread = metric.get("spread", math.nan)
            beside = "" if math.isnan(spread) else f" ± {number(spread)}"
            aps.append((number(metric.get("mean")), f"{TASK_NAMES[task]} AP{beside}"))
        lines = [_count(group["runs"], "run")]
        if group.get("parameters"):
            lines.append(f"{group['parameters'] / 1e6:.1f} M parameters")
        cards.append({"colour": colour(i), "name": group["name"], "aps": aps, "lines": lines})
    return _CARDS.render(cards=cards)


def _count(things: Sequence[Any], noun: str) -> str:
    return f"{len(things)} {noun}{'s' if len(things) > 1 else ''}"


def _messages(report: Mapping[str, Any]) -> list[str]:
    lines = [f"Unfinished, left out: {folder}" for folder in report["unfinished"]]
    lines += [f"Note: {text}" for text in report["notes"]]
    return [line for text in lines for line in (text, "")]


def _run_row(run: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: run[key] for key in run if key != "metrics"}, **run["metrics"]}


def _group_row(group: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": group["name"], "runs": len(group["runs"])}
    row.update({key: group.get(key) for key in ("parameters", "gflops", "seconds")})
    for key, metric in group["metrics"].items():
        row.update({key: metric["mean"], f"{key} spread": metric["spread"]})
    baseline = report["baseline"]
    for task, pairs in report["pairs"].items():
        if pair := pairs.get(group["name"], {}).get(baseline):
            fields = {key: pair[key] for key in ("value", "low", "high", "images")}
            fields["verdict"] = verdict_text(report, task, group["name"], baseline)
            row.update({f"{task}/AP against {baseline} {key}": fields[key] for key in fields})
    return row


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a column for each key of the rows; nan becomes an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(without_nan(list(rows)))
