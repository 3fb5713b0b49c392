"""A comparison as one HTML page."""

from __future__ import annotations

import html
from typing import Any, Mapping, Sequence

from matplotlib.figure import Figure

from fpn_plugin.analysis.compare.plots import colour
from fpn_plugin.analysis.compare.summary import WHAT
from fpn_plugin.analysis.compare.tables import number
from fpn_plugin.analysis.report.page import html_page, html_svg, html_table, paragraph
from fpn_plugin.analysis.report.tables import Table

_STYLE = """
.lead { font-size: 1.2rem; line-height: 1.45; color: var(--text); max-width: 58rem }
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
svg { width: 100%; height: auto }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back) }
th:first-child { background: var(--head) }
tbody tr:hover td { background: var(--head) }
"""


def page(
    report: Mapping[str, Any], tables: Sequence[Table], pictures: Mapping[str, tuple[str, Figure]]
) -> str:
    """The whole comparison."""
    images = f", {report['images']} images" if report["images"] else ""
    count = len(report["runs"])
    runs = f"{count} run{'s' if count > 1 else ''}"
    parts = [
        paragraph(f"{report['dataset']}{images} · {runs} · {report['date'][:10]}"),
        paragraph(report["summary"], "lead"),
        _cards(report),
        *(paragraph(f"Unfinished, left out: {folder}", "bad") for folder in report["unfinished"]),
        *(paragraph(f"Note: {note}") for note in report["notes"]),
        '<div class="plots">',
        *(html_svg(title, figure) for title, figure in pictures.values()),
        "</div>",
        '<div class="tables">',
        *(f"<section>{html_table(table)}</section>" for table in tables),
        "</div>",
    ]
    return html_page(title(report), parts, _STYLE)


def title(report: Mapping[str, Any]) -> str:
    """The names of the configs, where they are few."""
    names = [group["name"] for group in report["groups"]]
    return " · ".join(names) if len(names) < 5 else f"{len(names)} configs compared"


def _cards(report: Mapping[str, Any]) -> str:
    """Each config at a glance, in its colour."""
    made = []
    for i, group in enumerate(report["groups"]):
        lines = []
        for task in report["tasks"]:
            found = group["metrics"].get(f"{task}/AP", {})
            spread = found.get("spread")
            text = number(found.get("mean"))
            beside = "" if number(spread) == number(None) else f" ± {number(spread)}"
            lines.append(f"<b>{text}</b><span>{WHAT[task]} AP{beside}</span>")
        runs = len(group["runs"])
        lines.append(f"<span>{runs} run{'s' if runs > 1 else ''}</span>")
        if group.get("parameters"):
            lines.append(f"<span>{group['parameters'] / 1e6:.1f} M parameters</span>")
        made.append(
            f'<div class="card" style="border-top-color: {colour(i)}">'
            f'<span class="name">{html.escape(group["name"])}</span>{"".join(lines)}</div>'
        )
    return f'<div class="cards">{"".join(made)}</div>'
