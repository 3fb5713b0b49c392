"""A report as one HTML page that needs nothing beside it: no script, no request."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any, Mapping, Sequence

from fpn_plugin.analysis.benchmark.tables import Table

_STYLE = """
:root { color-scheme: light dark; --text: #1d2733; --soft: #5b6875; --line: #d9dfe6;
  --back: #fff; --head: #f3f6f9; --bad: #b3261e; --good: #1f7a43 }
@media (prefers-color-scheme: dark) { :root { --text: #e3e8ee; --soft: #9aa7b4; --line: #36414d;
  --back: #14191f; --head: #1d252e; --bad: #ff8a80; --good: #6fd39a } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
p, figcaption { color: var(--soft); max-width: 50rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right }
th { background: var(--head); font-weight: 600 }
th:first-child, td:first-child { text-align: left; white-space: pre }
.bad { color: var(--bad) } .good { color: var(--good) }
figure { margin: 1rem 0 } img { max-width: 100%; border-radius: 6px; background: #fff }
"""


def page(report: Mapping[str, Any], tables: Sequence[Table], pictures: Mapping[str, Path]) -> str:
    """The whole report."""
    machine = report["machine"]
    commit = machine["commit"][:12] + ("+dirty" if machine["commit"].endswith("+dirty") else "")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Benchmark</title><style>{_STYLE}</style></head><body>",
        f"<h1>Benchmark of {html.escape(', '.join(report['contestants']))}</h1>",
        f"<p>{html.escape(machine['date'])}, commit {html.escape(commit or 'unknown')},"
        f" {html.escape(machine.get('gpu', machine['cpu']))}</p>",
        *_messages(report),
        *(_table(table) for table in tables),
        *(_figure(title, path) for title, path in pictures.items()),
        "</body></html>",
    ]
    return "\n".join(parts)


def _messages(report: Mapping[str, Any]) -> list[str]:
    lines = [f'<p class="bad">Refused: {html.escape(text)}</p>' for text in report["failures"]]
    if report["timings"] and not lines:
        lines.append('<p class="good">Every ratio is told, and all outputs agree.</p>')
    return lines + [f"<p>Note: {html.escape(text)}</p>" for text in report["notes"]]


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2><div class="scroll"><table>'
        f"<thead>{row(table.header, 'th')}</thead><tbody>{body}</tbody></table></div>{note}"
    )


def _figure(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(title)
    return (
        f"<figure><figcaption>{text}</figcaption>"
        f'<img alt="{text}" src="data:image/png;base64,{data}"></figure>'
    )
