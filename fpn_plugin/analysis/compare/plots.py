"""A comparison's pictures."""

from __future__ import annotations

import math
from typing import Any, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpn_plugin.analysis.compare.summary import WHAT
from fpn_plugin.analysis.report.figures import COLOURS, new_figure

# for studies, which have many configs
_COLOURS = (*COLOURS, "#d45fa8", "#17a2b8", "#8c6d3f", "#9fb02e", "#4f4fd0", "#e4572e")
_STYLES = ("-", "--", ":", "-.")  # for more configs than colours
_WIDTH = 6.2  # inches
_SIZES = {"APs": "small", "APm": "medium", "APl": "large"}
_COSTS = (
    ("parameters", 1e-6, "million parameters"),
    ("gflops", 1.0, "GFLOPs"),
    ("seconds", 1e3, "milliseconds"),
)


def draw_all(report: Mapping[str, Any]) -> dict[str, tuple[str, Figure]]:
    """What the report has the numbers for: by file name without suffix, a title and a figure."""
    found: dict[str, tuple[str, Figure | None]] = {}
    for task in report["tasks"]:
        what = WHAT[task].capitalize()
        title = f"{what} AP against {report['baseline']}, with 95% intervals over images"
        found[f"difference_{task}"] = title, _differences(report, task)
        found[f"sizes_{task}"] = f"{what} AP by size of the object", _sizes(report, task)
        found[f"ap_{task}"] = f"{what} AP while training", _curves(report, task)
    found["loss"] = "Total loss while training", _losses(report)
    found["cost"] = f"{WHAT[report['tasks'][0]].capitalize()} AP against cost", _costs(report)
    return {name: (title, made) for name, (title, made) in found.items() if made is not None}


def colour(number: int) -> str:
    """Of a config, by its place."""
    return _COLOURS[number % len(_COLOURS)]


def _style(number: int) -> str:
    return _STYLES[number // len(_COLOURS) % len(_STYLES)]


def _figure(height: float) -> tuple[Figure, Axes]:
    """Narrower than other reports', as two stand side by side on the page."""
    figure, axes = new_figure(height)
    figure.set_size_inches(_WIDTH, height)
    return figure, axes


def _differences(report: Mapping[str, Any], task: str) -> Figure | None:
    baseline = report["baseline"]
    pairs = {
        name: of[baseline]
        for name, of in report["pairs"].get(task, {}).items()
        if baseline in of and not math.isnan(of[baseline]["low"])
    }
    if not pairs:
        return None
    numbers = {group["name"]: i for i, group in enumerate(report["groups"])}
    figure, axes = _figure(0.9 + 0.42 * len(pairs))
    for y, (name, pair) in enumerate(reversed(pairs.items())):
        tone = colour(numbers[name])
        axes.plot([pair["low"], pair["high"]], [y, y], color=tone, linewidth=3, alpha=0.45)
        axes.plot([pair["value"]], [y], "o", color=tone, markersize=8)
    axes.axvline(0, color=COLOURS[5], linewidth=1)
    axes.set_yticks(range(len(pairs)), list(reversed(pairs)))
    axes.set_ylim(-0.6, len(pairs) - 0.4)
    axes.set_xlabel("points of AP")
    axes.grid(axis="x", linewidth=0.6)
    return figure


def _sizes(report: Mapping[str, Any], task: str) -> Figure | None:
    objects = report["objects"]
    bins = {f"{task}/AP@{name}": f"{name}\n{count}" for name, count in objects.items() if count}
    bins = bins or {f"{task}/{key}": name for key, name in _SIZES.items()}
    groups = report["groups"]
    heights = np.array(
        [[group["metrics"].get(key, {}).get("mean", math.nan) for key in bins] for group in groups]
    )
    if np.isnan(heights).all():
        return None
    figure, axes = _figure(3.4)
    width = 0.8 / len(groups)
    for i, (group, row) in enumerate(zip(groups, heights, strict=True)):
        places = np.arange(len(bins)) - 0.4 + width * (i + 0.5)
        spread = [group["metrics"].get(key, {}).get("spread", math.nan) for key in bins]
        axes.bar(places, row, width * 0.92, color=colour(i), label=group["name"])
        axes.errorbar(places, row, spread, fmt="none", ecolor=COLOURS[5], linewidth=1)
    axes.set_xticks(range(len(bins)), list(bins.values()), fontsize=9)
    axes.set_xlim(-0.5, len(bins) - 0.5)
    axes.set_xlabel("side in pixels, number of objects" if objects else "")
    axes.set_ylabel("AP")
    axes.grid(axis="y", linewidth=0.6)
    _legend(axes, len(groups))
    return figure


def _curves(report: Mapping[str, Any], task: str) -> Figure | None:
    curves = {name: of["AP"].get(task, []) for name, of in report["curves"].items()}
    if all(len(of) < 2 for of in curves.values()):  # a point is no curve
        return None
    return _lines(report, curves, f"{WHAT[task]} AP")


def _losses(report: Mapping[str, Any]) -> Figure | None:
    return _lines(report, {name: of["loss"] for name, of in report["curves"].items()}, "loss")


def _lines(report: Mapping[str, Any], curves: Mapping[str, Any], label: str) -> Figure | None:
    """A thin line for each run, and a thick one for the mean of a config's runs."""
    if not any(curves.values()):
        return None
    figure, axes = _figure(3.4)
    for i, group in enumerate(report["groups"]):
        of: list[dict[int, float]] = [dict(curves[name]) for name in group["runs"] if curves[name]]
        look: dict[str, Any] = {"color": colour(i), "linestyle": _style(i)}
        if len(of) > 1:
            for one in of:
                axes.plot(list(one), list(one.values()), linewidth=0.8, alpha=0.5, **look)
        common = sorted(set.intersection(*map(set, of))) if of else []
        means = [float(np.mean([one[at] for one in of])) for at in common]
        mark = "o" if len(common) < 12 else ""
        if of:
            axes.plot(common, means, linewidth=2.2, marker=mark, ms=4, label=group["name"], **look)
    axes.set_xlim(left=0)
    axes.set_xlabel("iteration")
    axes.set_ylabel(label)
    axes.grid(axis="y", linewidth=0.6)
    _legend(axes, len(report["groups"]))
    return figure


def _costs(report: Mapping[str, Any]) -> Figure | None:
    """The first task's AP against each cost that is known, side by side."""
    groups = report["groups"]
    key = f"{report['tasks'][0]}/AP"
    known = [cost for cost in _COSTS if sum(group.get(cost[0]) is not None for group in groups) > 1]
    if not known:
        return None
    figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
    for place, (cost, scale, label) in enumerate(known, 1):
        axes = figure.add_subplot(1, len(known), place)
        axes.spines[["top", "right"]].set_visible(False)
        for i, group in enumerate(groups):
            if group.get(cost) is not None and key in group["metrics"]:
                found = group["metrics"][key]
                x, y = group[cost] * scale, found["mean"]
                axes.errorbar([x], [y], [found["spread"]], color=colour(i), linewidth=1)
                marker = "osD^"[i // len(_COLOURS) % 4]
                axes.plot([x], [y], marker, color=colour(i), ms=8, label=group["name"])
        axes.margins(0.15)
        axes.locator_params(nbins=5)
        axes.set_xlabel(label)
        axes.grid(linewidth=0.6)
        if place == 1:
            axes.set_ylabel("AP")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, len(groups)),
        frameon=False,
        fontsize=9,
    )
    return figure


def _legend(axes: Axes, count: int) -> None:
    """Below the plot, where it hides nothing."""
    figure = axes.figure
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, count), frameon=False, fontsize=9
    )
