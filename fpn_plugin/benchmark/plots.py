"""A benchmark's pictures, drawn for its page and as PNG."""

from __future__ import annotations

from typing import Any, Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from fpn_plugin.benchmark.measure import TOO_FEW_ROUNDS, noise_of
from fpn_plugin.benchmark.tables import TITLES
from fpn_plugin.report.figures import COLOURS, GREY, new_figure


def draw_plots(report: Mapping[str, Any]) -> dict[str, tuple[str, Figure]]:
    """What the report has the numbers for: by file name without suffix, a title and a figure."""
    plots = {}
    if any(row["value"] for data in report["timings"].values() for row in data["ratios"]):
        title = "Times as fast, with 95% intervals; within the grey band is noise"
        plots["ratios"] = title, _ratio_plot(report["timings"])
    if shares := neck_shares(report):
        plots["share"] = "The pyramid's share of the time", _share_plot(shares)
    if points := latency_points(report):
        plots["latency_ap"] = "Latency against AP of the training runs", _ap_plot(points)
    return plots


def _ratio_plot(timings: Mapping[str, Any]) -> Figure:
    """A line for each ratio below its names; the sections below each other."""
    rows: list[tuple[str, Any, float]] = []  # a section's title, or its ratio and noise
    for section, data in timings.items():
        ratios = [row for row in data["ratios"] if row["value"]]
        noise = noise_of(data.get("noise", {}))
        rows += [(TITLES[section], None, noise)] if ratios else []
        rows += [(f"{r['contestant']} / {r['reference']}", r, noise) for r in ratios]
    figure, axes = new_figure(0.8 + 0.42 * len(rows))
    axes.set_xscale("log")
    number = -1
    for y, (text, ratio, noise) in enumerate(rows):
        title = ratio is None
        number += title
        tone = COLOURS[number % len(COLOURS)]
        size, weight = (11, "bold") if title else (10, "normal")
        place: Any = axes.get_yaxis_transform()
        axes.text(0, y - 0.12, _short(text), transform=place, size=size, weight=weight, va="center")
        axes.fill_betweenx([y - 0.5, y + 0.5], 1 / noise, noise, color=GREY, alpha=0.25, lw=0)
        if ratio is not None:
            line = [y + 0.27, y + 0.27]
            if ratio["result"] != TOO_FEW_ROUNDS:
                axes.plot([ratio["low"], ratio["high"]], line, color=tone, linewidth=3, alpha=0.5)
            axes.plot([ratio["value"]], line[:1], "o", color=tone, markersize=6)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 1.1))
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(*axes.get_xlim())
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick > 0]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}×"))
    axes.grid(axis="x", linewidth=0.6)
    return figure


def _short(text: str, most: int = 58) -> str:
    """A name that fits the width of the figure."""
    return text if len(text) <= most else f"{text[:most - 1]}…"


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
    if len({tuple(run["dataset"]) for run in report["runs"]}) > 1:
        return {}  # AP on different test sets cannot be compared
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
