"""The pictures of a report: the neck's share of the whole, latency against AP, scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

from matplotlib.figure import Figure

from fpn_plugin.analysis.report.figures import COLOURS, new_figure, save


def draw_all(report: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draw what the report has the numbers for, as PNG files in `folder`; returns them by title."""
    made: dict[str, Path] = {}
    times = {section: data["times"] for section, data in report["timings"].items()}
    if shares := neck_shares(times):
        made["The pyramid's share of the time"] = save(_share_figure(shares), folder / "share.png")
    if points := latency_points(report):
        made["Latency against AP"] = save(_ap_figure(points), folder / "latency_ap.png")
    for number, one in enumerate(report["sweeps"], 1):
        title = f"Scaling of {one['contestant']}: {one['kind']}"
        made[title] = save(_sweep_figure(one), folder / f"sweep_{number}_{one['kind']}.png")
    return made


def neck_shares(
    times: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> dict[str, dict[str, float]]:
    """Seconds of each contestant's pyramid, of the network underneath and of the heads, where they
    were measured."""
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
    """(seconds, AP) of each run's contestant: full inference, or else the backbone or the neck."""
    for section in ("inference", "backbone", "neck"):
        times = report["timings"].get(section, {}).get("times", {})
        found = {
            f"{run['contestant']}, {task}": (times[run["contestant"]]["seconds"], value)
            for run in report["runs"]
            if run["contestant"] in times
            for task, value in run["AP"].items()
        }
        if found:
            return found
    return {}


def _share_figure(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    figure, axes = new_figure(0.9 + 0.45 * len(shares))
    names = list(shares)[::-1]
    left = [0.0] * len(names)
    for part, colour in zip(("network", "pyramid", "heads"), COLOURS):
        widths = [shares[name].get(part, 0.0) * 1e3 for name in names]
        if any(widths):
            axes.barh(names, widths, left=left, color=colour, label=part)
        left = [one + two for one, two in zip(left, widths)]
    axes.set_xlabel("milliseconds")
    axes.legend(frameon=False)
    return figure


def _ap_figure(points: Mapping[str, tuple[float, float]]) -> Figure:
    figure, axes = new_figure(4)
    for i, (name, (seconds, value)) in enumerate(points.items()):
        axes.scatter([seconds * 1e3], [value], color=COLOURS[i % len(COLOURS)], label=name)
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("AP")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _sweep_figure(one: Mapping[str, Any]) -> Figure:
    """Seconds and bytes, each with its fit and with what the operations alone would say."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    points = one["points"]
    x = [point["x"] for point in points]
    for i, (what, unit, label) in enumerate(
        (("seconds", 1e3, "milliseconds"), ("bytes", 1e-6, "MB"))
    ):
        axes = figure.add_subplot(1, 2, i + 1)
        y = [point[what] * unit for point in points]
        axes.plot(x, y, "o", color=COLOURS[i], label="measured")
        if fitted := one["fits"][what]:
            law = [fitted["factor"] * value ** fitted["exponent"] * unit for value in x]
            axes.plot(x, law, "-", color=COLOURS[i], label=f"x^{fitted['exponent']:.2f}")
        scale = y[-1] / points[-1]["gflops"]
        predicted = [point["gflops"] * scale for point in points]
        axes.plot(x, predicted, "--", color=COLOURS[5], label="operations, scaled")
        axes.set(xscale="log", yscale="log", xlabel=one["against"], ylabel=label)
        axes.set_xticks(x, [f"{value:g}" for value in x], rotation=30, fontsize=7)
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
    return figure
