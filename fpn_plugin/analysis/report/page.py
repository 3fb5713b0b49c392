"""One HTML page that needs nothing beside it: no script, no request."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Sequence

from fpn_plugin.analysis.report.table import Table

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
th.left, td.left { text-align: left }
.best { font-weight: 700; color: var(--good) }
.bad { color: var(--bad) } .good { color: var(--good) }
figure { margin: 1rem 0 } img { max-width: 100%; border-radius: 6px; background: #fff }
"""


def html_page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A page of HTML `parts` under a heading.

    Args:
        title: plain text.
        style: further CSS.
    """
    text = html.escape(title)
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text}</title><style>{_STYLE}{style}</style></head><body>",
        f"<h1>{text}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>"])


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph; `kind` is "", "bad" (red) or "good" (green)."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def html_table(table: Table) -> str:
    """A table with its title above and its note below."""

    def cell(tag: str, text: str, i: int, j: int) -> str:
        kinds = ["left"] * (0 < j < table.left) + ["best"] * ((i, j) in table.best)
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", text, -1, j) for j, text in enumerate(table.header))
    rows = (
        "".join(cell("td", text, i, j) for j, text in enumerate(row))
        for i, row in enumerate(table.rows)
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    note = paragraph(table.note) if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


def html_figure(title: str, path: Path) -> str:
    """A picture with its title, its bytes in the page; PNG or JPEG by the path's extension."""
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(title)
    return (
        f"<figure><figcaption>{text}</figcaption>"
        f'<img alt="{text}" src="data:image/{kind};base64,{data}"></figure>'
    )
