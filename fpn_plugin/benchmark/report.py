"""A benchmark's report: tables, plots and one HTML page, on disk and in the terminal; and what has
grown since an older one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from matplotlib.figure import Figure

from fpn_plugin.benchmark.measure import SCHEMA
from fpn_plugin.report.figures import COLOURS, new_figure, save
from fpn_plugin.report.page import html_figure, html_page, html_table, paragraph
from fpn_plugin.report.tables import Table

JSON, MARKDOWN, HTML = "report.json", "report.md", "report.html"
TITLES = {
    "neck": "The pyramid alone: inference",
    "neck_train": "The pyramid alone: forward and backward",
    "backbone": "Network and pyramid: inference",
    "inference": "Full inference",
    "train": "A training iteration",
}
_COUNTS = {
    "model_parameters": ("parameters, M", 1e6, 2),
    "neck_parameters": ("of the pyramid, M", 1e6, 3),
    "backbone_gflops": ("backbone, GFLOPs", 1, 2),
    "neck_gflops": ("of the pyramid", 1, 3),
    "backbone_activations": ("activations, M", 1e6, 1),
    "neck_activations": ("of the pyramid, M", 1e6, 2),
    "neck_peak_bytes": ("pyramid's peak, MB", 1e6, 1),
}
COMPARE = "--compare"
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
    for name in ("share.png", "latency_ap.png"):
        (root / name).unlink(missing_ok=True)
    (root / JSON).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plots = {**draw_plots(report, root), **(extra_plots or {})}
    tables = [*report_tables(report), *extra_tables]
    lines = [f"# {_title(report)}", "", *_messages(report)]
    for table in tables:
        lines += [f"## {table.title}", "", table.text("github"), "", table.note, ""]
    for title, path in plots.items():
        lines += [f"![{title}]({path.name})", ""]
    (root / MARKDOWN).write_text("\n".join(lines), encoding="utf-8")
    (root / HTML).write_text(_html(report, tables, plots), encoding="utf-8")
    return root / HTML


def terminal_text(report: Mapping[str, Any], extra_tables: Sequence[Table] = ()) -> str:
    """All tables, and what was refused."""
    tables = [*report_tables(report), *extra_tables]
    parts = [f"{table.title}\n\n{table.text()}\n" for table in tables]
    return "\n".join([*parts, *_messages(report)]).rstrip()


def _title(report: Mapping[str, Any]) -> str:
    return f"Benchmark of {', '.join(report['contestants'])}"


def _messages(report: Mapping[str, Any]) -> list[str]:
    lines = [f"REFUSED {text}" for text in report["failures"]]
    lines += [f"Note: {text}" for text in report["notes"]]
    return [line for text in lines for line in (text, "")]


def _html(report: Mapping[str, Any], tables: Sequence[Table], plots: Mapping[str, Path]) -> str:
    machine = report["machine"]
    commit = machine["commit"][:12] + ("+dirty" if machine["commit"].endswith("+dirty") else "")
    where = machine.get("gpu", machine["cpu"])
    messages = [paragraph(f"Refused: {text}", "bad") for text in report["failures"]]
    if report["timings"] and not messages:
        messages.append(paragraph("Every ratio is conclusive, and all outputs agree.", "good"))
    parts = [
        paragraph(f"{machine['date']}, commit {commit or 'unknown'}, {where}"),
        *messages,
        *(paragraph(f"Note: {text}") for text in report["notes"]),
        *(html_table(table) for table in tables),
        *(html_figure(title, path) for title, path in plots.items()),
    ]
    return html_page(_title(report), parts)


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """Everything in a report that fits a table."""
    tables = [_counts_table(report["counts"])] if report["counts"] else []
    for section, data in report["timings"].items():
        tables += timing_tables(TITLES[section], data)
    if report["runs"]:
        rows = [[run["folder"], run["contestant"], _format_ap(run["AP"])] for run in report["runs"]]
        tables.append(Table("Training runs", ["folder", "contestant", "AP"], rows))
    return [*tables, _machine_table(report)]


def _counts_table(counts: Mapping[str, Mapping[str, float]]) -> Table:
    header = ["", *(title for title, _, _ in _COUNTS.values())]
    rows = [
        [name, *(f"{row[key] / unit:,.{digits}f}" for key, (_, unit, digits) in _COUNTS.items())]
        for name, row in counts.items()
    ]
    note = (
        "For one image; GFLOPs are 10⁹ multiply-accumulates (fvcore). The peak is that of live"
        " allocations during the pyramid's forward, above its inputs."
    )
    return Table("Counts", header, rows, note)


def timing_tables(title: str, data: Mapping[str, Any]) -> list[Table]:
    """The times of a section, and its ratios if it has any."""
    tables = [_times_table(title, data["times"])]
    return [*tables, _ratios_table(title, data)] if data["ratios"] else tables


def _times_table(title: str, times: Mapping[str, Mapping[str, Any]]) -> Table:
    phases = list(dict.fromkeys(phase for row in times.values() for phase in row["phases"]))
    extra = [
        key for key in ("proposals", "detections") if any(key in row for row in times.values())
    ]
    header = ["", "type", "ms", "spread", "images/s", *(f"{phase}, ms" for phase in phases)]
    rows = [
        [
            name,
            row.get("precision", ""),
            milliseconds(row["seconds"]) + ("" if row["verdict"] == "ok" else " (!)"),
            f"{row['spread']:.0%}",
            f"{row['images_per_second']:.2f}" if "images_per_second" in row else "",
            *(milliseconds(row["phases"].get(phase)) for phase in phases),
            f"{row['peak_bytes'] / 1e6:,.1f}" if "peak_bytes" in row else "",
            f"{row['first_call']:.2f}" if "first_call" in row else "",
            *(f"{row[key]:.0f}" if row.get(key) is not None else "" for key in extra),
        ]
        for name, row in times.items()
    ]
    note = (
        "Medians over the rounds; the spread is the interquartile range over the median, (!) where"
        " it is beyond --max-spread."
    )
    if extra:
        note += " Proposals and detections are those of an image."
    return Table(title, [*header, "peak MB", "first call, s", *extra], rows, note)


def _ratios_table(title: str, data: Mapping[str, Any]) -> Table:
    equality = {(row["contestant"], row["reference"]): row for row in data["equality"]}
    rows = []
    for row in data["ratios"]:
        outputs = _format_equality(equality.get((row["contestant"], row["reference"]), {}))
        rows.append([row["contestant"], row["reference"], *_format_ratio(row), outputs])
        for phase, ratio in row["phases"].items():
            rows.append([f"· {phase}", "", *_format_ratio(ratio), ""])
    rows += [
        [row["contestant"], row["reference"], "not timed", "", "", _format_equality(row)]
        for row in data["equality"]
        if row["verdict"] == "not equal"
    ]
    header = ["", "against", "times as fast", "95% interval", "spread", "outputs"]
    note = (
        "The median over the rounds of the other's time over its own, with its bootstrap interval."
        " Outputs: the relative difference, the largest one in full precision and the root mean"
        " square in half."
    )
    return Table(f"{title}: ratios", header, rows, note)


def _format_ratio(row: Mapping[str, Any]) -> list[str]:
    if row["value"] is None:
        return ["too wide", f"±{row['width'] / 2:.0%}", f"{row['spread']:.0%}"]
    interval = f"{row['low']:.2f} … {row['high']:.2f}"
    return [f"{row['value']:.2f}×", interval, f"{row['spread']:.0%}"]


def _format_equality(row: Mapping[str, Any]) -> str:
    verdict = row.get("verdict", "")
    if verdict != "equal":
        return verdict  # why it is not equal is among the failures
    return f"{verdict}, {row['relative']:.1e}" + (f" ({row['note']})" if row["note"] else "")


def _format_ap(ap: Mapping[str, float]) -> str:
    return ", ".join(f"{task} {value:.1f}" for task, value in ap.items())


def milliseconds(seconds: float | None) -> str:
    """Format as milliseconds; "" for None."""
    return "" if seconds is None else f"{seconds * 1e3:,.{2 if seconds < 0.1 else 1}f}"


def _machine_table(report: Mapping[str, Any]) -> Table:
    settings = report["settings"]
    height, width = settings["size"]
    run = {
        "image": f"{height} x {width}, {settings['batch']} at a time, on {settings['device']}",
        "seed": settings["seed"],
        "weights": settings["weights"] or "from the seed, the same for all",
    }
    rows = [
        [key.replace("_", " "), _format_value(value)]
        for key, value in {**run, **report["machine"]}.items()
    ]
    return Table("Machine and settings", ["", "value"], rows)


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def draw_plots(report: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draw what the report has the numbers for, as PNG files in `folder`; returns them by title."""
    plots = {}
    if shares := neck_shares(report):
        plots["The pyramid's share of the time"] = save(_share_plot(shares), folder / "share.png")
    if points := latency_points(report):
        plots["Latency against AP"] = save(_ap_plot(points), folder / "latency_ap.png")
    return plots


def neck_shares(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds of each model's pyramid, of the network underneath and of the heads, where they were
    measured."""
    times = {section: data["times"] for section, data in report["timings"].items()}
    shares: dict[str, dict[str, float]] = {}
    for name, row in times.get("neck", {}).items():
        backbone = times.get("backbone", {}).get(name)
        if backbone is None:
            continue
        whole = times.get("inference", {}).get(name)
        parts = {
            "network": max(backbone["seconds"] - row["seconds"], 0.0),
            "pyramid": row["seconds"],
        }
        if whole is not None:
            parts["heads"] = max(whole["seconds"] - backbone["seconds"], 0.0)
        shares[name] = parts
    return shares


def latency_points(report: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """(seconds, AP) of each training run: of full inference, or else the backbone or the neck."""
    for section in ("inference", "backbone", "neck"):
        times = report["timings"].get(section, {}).get("times", {})
        points = {
            f"{run['contestant']}, {task}": (times[run["contestant"]]["seconds"], value)
            for run in report["runs"]
            if run["contestant"] in times
            for task, value in run["AP"].items()
        }
        if points:
            return points
    return {}


def _share_plot(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    figure, axes = new_figure(0.9 + 0.45 * len(shares))
    names = list(shares)[::-1]
    left = [0.0] * len(names)
    for part, colour in zip(("network", "pyramid", "heads"), COLOURS):
        widths = [shares[name].get(part, 0.0) * 1e3 for name in names]
        if any(widths):
            axes.barh(names, widths, left=left, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths)]
    axes.set_xlabel("milliseconds")
    axes.legend(frameon=False)
    return figure


def _ap_plot(points: Mapping[str, tuple[float, float]]) -> Figure:
    figure, axes = new_figure(4)
    for i, (name, (seconds, value)) in enumerate(points.items()):
        axes.scatter([seconds * 1e3], [value], color=COLOURS[i % len(COLOURS)], label=name)
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("AP")
    axes.legend(frameon=False, fontsize=8)
    return figure


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
    if schema != SCHEMA:
        raise ValueError(f"{COMPARE} {path!r} is of schema {schema!r}; this version reads {SCHEMA}")
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
        regressions of counts, each naming the config and the figure; and warnings: ratios of times
        beyond the threshold, and configs that only the old report has.

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
