"""A benchmark's report: result, tables, plots and one HTML page, on disk and in the terminal; and
what has grown since an older one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Mapping, Sequence

from matplotlib.figure import Figure

from fpn_plugin.benchmark.measure import SCHEMA
from fpn_plugin.benchmark.plots import draw_plots
from fpn_plugin.benchmark.tables import ap_summary, headline, outputs_compared, report_tables
from fpn_plugin.report.figures import page_style, save
from fpn_plugin.report.page import html_figure, html_page, html_svg, html_table, paragraph
from fpn_plugin.report.tables import Table

JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"
COMPARE = "--compare"
SCHEMAS = (1, SCHEMA)
"""Of reports that counts and ratios can be compared with."""
_MOST_NAMED = 4  # in a title
_PLOTS = ("ratios.png", "share.png", "latency_ap.png")
BYTES_ROOM = 0.1
"""Peak bytes may differ by so much at least: layouts are the processor's choice."""


def check_folder(folder: str, overwrite: bool, file: str = JSON, what: str = "a report") -> None:
    """Refuse a folder that holds a report; before anything is measured.

    Args:
        file: by which a report is recognised.
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


def write_report(
    report: Mapping[str, Any],
    folder: str,
    extra_tables: Sequence[Table] = (),
    extra_plots: Mapping[str, Path] | None = None,
) -> Path:
    """Write report.json, report.md, report.html and the plots.

    Args:
        extra_tables: shown after the report's own.
        extra_plots: PNG files in `folder` by title, shown after the report's own.

    Returns:
        the HTML page's path.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for name in _PLOTS:
        (root / name).unlink(missing_ok=True)
    text = json.dumps(without_nan(report), indent=1, allow_nan=False)
    (root / JSON).write_text(text + "\n", encoding="utf-8")
    tables = [*report_tables(report), *extra_tables]
    with page_style():
        plots = draw_plots(report)
        (root / HTML).write_text(_html(report, tables, plots, extra_plots or {}), encoding="utf-8")
        paths = {title: save(plot, root / f"{name}.png") for name, (title, plot) in plots.items()}
    lines = [f"# {_title(report)}", "", headline(report), ""]
    lines += [ap_summary(report), "", outputs_compared(report), "", *_messages(report)]
    for table in tables:
        lines += [f"## {table.title}", "", table.text("github"), "", table.note, ""]
    for title, path in {**paths, **(extra_plots or {})}.items():
        lines += [f"![{title}]({path.name})", ""]
    (root / MARKDOWN).write_text("\n".join(lines), encoding="utf-8")
    return root / HTML


def terminal_text(report: Mapping[str, Any], extra_tables: Sequence[Table] = ()) -> str:
    """All tables, what was refused, and at the end the result."""
    tables = [*report_tables(report), *extra_tables]
    parts = [f"{table.title}\n\n{table.text()}\n" for table in tables]
    ends = [outputs_compared(report), ap_summary(report), headline(report)]
    return "\n".join([*parts, *_messages(report), *ends])


def _title(report: Mapping[str, Any]) -> str:
    names = [name for name, row in report["contestants"].items() if row["role"] != "baseline"]
    if len(names) > _MOST_NAMED:
        return f"Benchmark of {len(names)} configs and variants"
    return f"Benchmark of {', '.join(names) or 'this machine'}"


def _messages(report: Mapping[str, Any]) -> list[str]:
    lines = [f"REFUSED {text}" for text in report["failures"]]
    lines += [f"Note: {text}" for text in report["notes"]]
    return [line for text in lines for line in (text, "")]


def _html(
    report: Mapping[str, Any],
    tables: Sequence[Table],
    plots: Mapping[str, tuple[str, Figure]],
    extra_plots: Mapping[str, Path],
) -> str:
    machine = report["machine"]
    commit = machine["commit"][:12] + ("+dirty" if machine["commit"].endswith("+dirty") else "")
    where = machine.get("gpu", machine["cpu"])
    drawn = {name: html_svg(title, plot) for name, (title, plot) in plots.items()}
    parts = [
        paragraph(f"{machine['date']}, commit {commit or 'unknown'}, {where}"),
        paragraph(headline(report), "lead"),
        paragraph(ap_summary(report)),
        paragraph(outputs_compared(report)),
        *(paragraph(f"Refused: {text}", "bad") for text in report["failures"]),
        *(paragraph(f"Note: {text}") for text in report["notes"]),
        drawn.pop("ratios", ""),
        *(html_table(table) for table in tables),
        *drawn.values(),
        *(html_figure(title, path) for title, path in extra_plots.items()),
    ]
    return html_page(_title(report), parts)


def without_nan(value: Any) -> Any:
    """JSON has no nan: null in its place."""
    if isinstance(value, Mapping):
        return {key: without_nan(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(child) for child in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_report(path: str) -> dict[str, Any]:
    """A report.json to compare with.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no report, or one of another schema.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{COMPARE} {path!r} does not exist")
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{COMPARE} {path!r} is no JSON: {error}") from None
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema not in SCHEMAS:
        known = " and ".join(map(str, SCHEMAS))
        raise ValueError(f"{COMPARE} {path!r} is of schema {schema!r}; this version reads {known}")
    return report


def compare_reports(
    old: Mapping[str, Any], new: Mapping[str, Any], threshold: float
) -> tuple[list[str], list[str]]:
    """Find what got worse.

    Args:
        old: a report.
        new: another, with the same image size, batch and device.
        threshold: a count may grow by this part of itself.

    Returns:
        two lists. The first has what became more, each naming the config and the figure; the second
        has warnings, ratios of times beyond the threshold and configs that only the old one has.

    Raises:
        ValueError: if the two cannot be compared.
    """
    for key in ("size", "batch", "device"):
        if old["settings"][key] != new["settings"][key]:
            raise ValueError(
                f"{COMPARE}: the old report was made with {key} {old['settings'][key]!r}, this one"
                f" with {new['settings'][key]!r}"
            )
    shared = [name for name in old["counts"] if name in new["counts"]]
    if not shared:
        raise ValueError(
            f"{COMPARE}: the two have no counts of the same config: {sorted(old['counts'])} and"
            f" {sorted(new['counts'])} (was --what counts left out?)"
        )
    regressions = []
    for name in shared:
        for figure, was in old["counts"][name].items():
            now = new["counts"][name].get(figure, 0)
            room = max(threshold, BYTES_ROOM) if figure.endswith("bytes") else threshold
            if now > was * (1 + room):
                growth = f"+{now / was - 1:.1%}" if was else "from nothing"
                regressions.append(
                    f"{name}: {figure} grew from {was:,.10g} to {now:,.10g} ({growth})"
                )
    warnings = [f"{name} is in the old report only" for name in old["counts"] if name not in shared]
    if old["timings"] and new["timings"]:
        machines = [each["machine"].get("gpu") or each["machine"]["cpu"] for each in (old, new)]
        if machines[0] != machines[1]:
            warnings.append(f"times are of other machines: {machines[0]}, now {machines[1]}")
    return regressions, warnings + _slower(old, new, threshold)


def _slower(old: Mapping[str, Any], new: Mapping[str, Any], threshold: float) -> list[str]:
    """Ratios and not seconds, which another machine or another day changes."""
    texts = []
    for section, data in new["timings"].items():
        before = {
            (row["contestant"], row["reference"]): row["value"]
            for row in old["timings"].get(section, {}).get("ratios", [])
        }
        for row in data["ratios"]:
            was, now = before.get((row["contestant"], row["reference"])), row["value"]
            if was and now and row["high"] < was * (1 - threshold):
                texts.append(
                    f"{section}: {row['contestant']} was {was:.2f} times as fast as"
                    f" {row['reference']} and is {now:.2f} times now"
                )
    return texts
