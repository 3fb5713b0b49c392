"""A comparison's pictures.

Each function takes the report of :mod:`fpn_plugin.compare.comparison`.
"""

from __future__ import annotations

import math
from typing import Any, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpn_plugin.compare.tables import TASK_NAMES, mean
from fpn_plugin.report.figures import COLOURS, WIDTH, new_figure

# for studies, which have many configs
_COLOURS = (*COLOURS, "#d45fa8", "#17a2b8", "#8c6d3f", "#9fb02e", "#4f4fd0", "#e4572e")
_STYLES, _MARKERS = ("-", "--", ":", "-."), "osD^"  # for more configs than colours
_SIZES = {"APs": "small", "APm": "medium", "APl": "large"}
_COSTS = (
    ("parameters", 1e-6, "million parameters"),
    ("gflops", 1.0, "GFLOPs"),
    ("seconds", 1e3, "milliseconds"),
)


def draw_all(report: Mapping[str, Any]) -> dict[str, tuple[str, Figure]]:
    """All pictures that have content: by file name without suffix, a title and a figure."""
    pictures: dict[str, tuple[str, Figure | None]] = {}
    for task in report["tasks"]:
        name = TASK_NAMES[task].capitalize()
        title = f"{name} AP against {report['baseline']}, with 95% intervals"
        pictures[f"difference_{task}"] = title, _differences(report, task)
        pictures[f"sizes_{task}"] = f"{name} AP by size of the object", _sizes(report, task)
        pictures[f"ap_{task}"] = f"{name} AP while training", _curves(report, task)
    name = TASK_NAMES[report["tasks"][0]].capitalize()
    pictures["cost"] = f"{name} AP against cost", _costs(report)
    return {
        name: (title, figure) for name, (title, figure) in pictures.items() if figure is not None
    }


def colour(number: int) -> str:
    """The colour of a config, by its place."""
    return _COLOURS[number % len(_COLOURS)]


def _differences(report: Mapping[str, Any], task: str) -> Figure | None:
    baseline = report["baseline"]
    pairs = {
        name: others[baseline]
        for name, others in report["pairs"].get(task, {}).items()
        if baseline in others and not math.isnan(others[baseline]["low"])
    }
    if not pairs:
        return None
    numbers = {group["name"]: i for i, group in enumerate(report["groups"])}
    figure, axes = new_figure(0.9 + 0.42 * len(pairs))
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
    heights = np.array([[mean(group, key) for key in bins] for group in groups])
    if np.isnan(heights).all():
        return None
    figure, axes = new_figure(3.4)
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
    """A thin line for each run, and a thick one for the mean of a config's runs."""
    curves = {name: dict(curve["AP"].get(task, [])) for name, curve in report["curves"].items()}
    if all(len(curve) < 2 for curve in curves.values()):  # a point is no curve
        return None
    figure, axes = new_figure(3.4)
    for i, group in enumerate(report["groups"]):
        runs = [curves[name] for name in group["runs"] if curves[name]]
        if not runs:
            continue
        style = _STYLES[i // len(_COLOURS) % len(_STYLES)]
        look: dict[str, Any] = {"color": colour(i), "linestyle": style}
        if len(runs) > 1:
            for curve in runs:
                axes.plot(list(curve), list(curve.values()), linewidth=0.8, alpha=0.5, **look)
        common = sorted(set.intersection(*map(set, runs)))
        means = [float(np.mean([curve[at] for curve in runs])) for at in common]
        marker = "o" if len(common) < 12 else ""
        axes.plot(common, means, linewidth=2.2, marker=marker, ms=4, label=group["name"], **look)
    axes.set_xlim(left=0)
    axes.set_xlabel("iteration")
    axes.set_ylabel(f"{TASK_NAMES[task]} AP")
    axes.grid(axis="y", linewidth=0.6)
    _legend(axes, len(report["groups"]))
    return figure


def _costs(report: Mapping[str, Any]) -> Figure | None:
    """The first task's AP against each known cost, side by side."""
    groups = report["groups"]
    key = f"{report['tasks'][0]}/AP"
    known = [cost for cost in _COSTS if sum(group.get(cost[0]) is not None for group in groups) > 1]
    if not known:
        return None
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    for place, (cost, scale, label) in enumerate(known, 1):
        axes = figure.add_subplot(1, len(known), place)
        axes.spines[["top", "right"]].set_visible(False)
        for i, group in enumerate(groups):
            if group.get(cost) is not None and key in group["metrics"]:
                x, y = group[cost] * scale, mean(group, key)
                spread = group["metrics"][key]["spread"]
                axes.errorbar([x], [y], [spread], color=colour(i), linewidth=1)
                marker = _MARKERS[i // len(_COLOURS) % len(_MARKERS)]
                axes.plot([x], [y], marker, color=colour(i), ms=8, label=group["name"])
        axes.margins(0.15)
        axes.locator_params(nbins=5)
        axes.set_xlabel(label)
        axes.grid(linewidth=0.6)
        if place == 1:
            axes.set_ylabel("AP")
    _legend(figure.axes[0], len(groups))
    return figure


def _legend(axes: Axes, count: int) -> None:
    """Below the figure, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, count), frameon=False, fontsize=9
    )
