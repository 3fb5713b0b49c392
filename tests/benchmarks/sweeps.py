"""How a pyramid's cost grows with one setting: seconds and bytes, beside its operations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from matplotlib.figure import Figure
from torch import nn

from fpn_plugin.benchmark.configs import BenchmarkConfig
from fpn_plugin.benchmark.counts import peak_bytes
from fpn_plugin.benchmark.inputs import Inputs
from fpn_plugin.benchmark.models import BenchmarkModel
from fpn_plugin.benchmark.timing import Plan, clock_for, no_lap, time_interleaved
from fpn_plugin.benchmark.workloads import Workload, neck_workload
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.pyramid.topologies import INNER_LEVELS
from fpn_plugin.report.figures import COLOURS, save
from fpn_plugin.report.tables import Table
from fpn_plugin.visualize.complexity import padded_size, totals

WIDTHS, REPEATS, SCALES = (32, 64, 128, 256), (1, 2, 3, 4), (0.25, 0.375, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Point:
    """One setting of a sweep.

    Attributes:
        label: the setting.
        cfg: with it.
        inputs: likewise.
    """

    label: str
    cfg: CfgNode
    inputs: Inputs


def _widths(cfg: CfgNode, inputs: Inputs) -> list[Point]:
    return [_point(cfg, inputs, str(width), OUT_CHANNELS=width) for width in WIDTHS]


def _repeats(cfg: CfgNode, inputs: Inputs) -> list[Point]:
    return [_point(cfg, inputs, str(count), REPEATS=count) for count in REPEATS]


def _levels(cfg: CfgNode, inputs: Inputs) -> list[Point]:
    """The coarsest k bottom-up maps, with as many inner levels as the whole pyramid has."""
    names, inner = list(cfg.MODEL.FPN.IN_FEATURES), cfg.MODEL.FPN.INNER_LEVELS
    if inner < 0:
        first = cfg.MODEL.FPN.TOPOLOGY.split("+")[0]
        inner = max(0, INNER_LEVELS.get(first, 0) - len(names))
    return [
        _point(cfg, inputs, f"{names[-count]} …", IN_FEATURES=names[-count:], INNER_LEVELS=inner)
        for count in range(2, len(names) + 1)
    ]


def _sizes(cfg: CfgNode, inputs: Inputs) -> list[Point]:
    points = []
    for scale in SCALES:
        height, width = (max(64, round(side * scale / 64) * 64) for side in inputs.size)
        scaled = replace(inputs, size=(height, width))
        points.append(Point(f"{height}x{width}", cfg, scaled))
    return points


def _nodes(backbone: PyramidBackbone, inputs: Inputs) -> float:
    return len(backbone.graph.nodes)


def _pixels(backbone: PyramidBackbone, inputs: Inputs) -> float:
    height, width = padded_size(backbone, inputs.size)
    return height * width


SWEEPS: dict[str, tuple[str, Callable[..., list[Point]], Callable[..., float]]] = {
    "width": ("channels", _widths, lambda backbone, inputs: backbone.defaults.channels),
    "levels": ("nodes", _levels, _nodes),
    "repeats": ("nodes", _repeats, _nodes),
    "size": ("pixels", _sizes, _pixels),
}
"""Of each kind: what cost is fitted against, how its points are made, and its value at a point."""
FITTED = ("seconds", "bytes", "gflops")


def check_sweep(kind: str, config: BenchmarkConfig) -> None:
    """Refuse what cannot be varied, before anything is built.

    Raises:
        ValueError: for a config without this plugin's pyramid, or without such settings.
    """
    if config.cfg.MODEL.BACKBONE.NAME != "build_pyramid_backbone":
        raise ValueError(
            f"--sweep {kind}: {config.name} has MODEL.BACKBONE.NAME"
            f" {config.cfg.MODEL.BACKBONE.NAME!r}; only build_pyramid_backbone can be varied"
        )
    if kind in ("repeats", "levels") and config.cfg.MODEL.FPN.GRAPH:
        raise ValueError(f"--sweep {kind}: {config.name} has a MODEL.FPN.GRAPH of its own")
    if kind == "levels" and len(config.cfg.MODEL.FPN.IN_FEATURES) < 2:
        raise ValueError(f"--sweep levels: {config.name} reads one map (MODEL.FPN.IN_FEATURES)")


def sweep(
    kind: str,
    config: BenchmarkConfig,
    inputs: Inputs,
    plan: Plan,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure a config's pyramid at several settings, interleaved, and fit how its cost grows.

    Args:
        kind: a key of SWEEPS.

    Returns:
        "kind", "contestant", "against" (what x is), "points" and "fits", ready for JSON.

    Raises:
        ValueError: what :func:`check_sweep` raises.
    """
    check_sweep(kind, config)
    against, make, value_of = SWEEPS[kind]
    points: dict[str, dict[str, Any]] = {}
    workloads: dict[str, Workload] = {}
    for point in make(config.cfg, inputs):
        backbone = _backbone(point.cfg)
        cost = totals(backbone, "bottom_up", point.inputs.size)["neck"]
        points[point.label] = {
            "label": point.label,
            "x": value_of(backbone, point.inputs),
            "gflops": cost.flops / 1e9 * inputs.batch,
        }
        varied = replace(config, name=point.label, cfg=point.cfg)
        model = BenchmarkModel(varied, _Holder(backbone))
        workloads[point.label] = neck_workload(model, point.inputs)
    works = {label: workload.work for label, workload in workloads.items()}
    for label, work in works.items():
        work(no_lap)
        points[label]["bytes"] = peak_bytes(partial(work, no_lap), inputs.device)
    measured = time_interleaved(works, [], clock_for(inputs.device), plan, on_round)
    for label, times in measured.times.items():
        points[label].update(seconds=times.median(), spread=times.spread())
    rows = list(points.values())
    fits = {what: fit([p["x"] for p in rows], [p[what] for p in rows]) for what in FITTED}
    return {
        "kind": kind,
        "contestant": config.name,
        "against": against,
        "points": rows,
        "fits": fits,
    }


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """A power law `y = factor * x^exponent` and a line `y = start + slope * x`, by least squares.

    Returns:
        "exponent", "factor", "r2" (of the logarithms), "start", "slope"; empty for fewer than two
        different x.
    """
    if len(set(x)) < 2:
        return {}
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.maximum(np.asarray(y, float), 1e-12))
    exponent, offset = np.polyfit(log_x, log_y, 1)
    slope, start = np.polyfit(np.asarray(x, float), np.asarray(y, float), 1)
    residual = float(np.square(log_y - offset - exponent * log_x).sum())
    total = float(np.square(log_y - log_y.mean()).sum())
    return {
        "exponent": float(exponent),
        "factor": float(np.exp(offset)),
        "r2": 1 - residual / total if total else 1.0,
        "start": float(start),
        "slope": float(slope),
    }


class _Holder(nn.Module):
    """A backbone where a detector has it, with what images are normalised by."""

    def __init__(self, backbone: PyramidBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))
        self.register_buffer("pixel_std", torch.ones(3, 1, 1))


def _backbone(cfg: CfgNode) -> PyramidBackbone:
    """Without Detectron2's build_backbone, which wants all maps that the heads read."""
    torch.manual_seed(0)
    return PyramidBackbone(cfg, ShapeSpec(channels=3)).eval()


def _point(cfg: CfgNode, inputs: Inputs, label: str, **values: Any) -> Point:
    varied = cfg.clone()
    varied.defrost()
    for key, value in values.items():
        varied.MODEL.FPN[key] = value
    return Point(label, varied, inputs)


def sweeps_table(sweeps: Sequence[Mapping[str, Any]]) -> Table:
    """The exponents of all sweeps."""
    rows = [
        [
            f"{swept['contestant']}: {swept['kind']}",
            swept["against"],
            *(_format_power(swept["fits"][what]) for what in ("gflops", "seconds", "bytes")),
        ]
        for swept in sweeps
    ]
    header = ["", "x", "operations", "seconds", "peak bytes"]
    note = "The power of x that cost grows with, fitted to the logarithms, and how well (R²)."
    return Table("Scaling of the pyramid", header, rows, note)


def _format_power(fit: Mapping[str, float]) -> str:
    return f"x^{fit['exponent']:.2f} ({fit['r2']:.2f})" if fit else "one point"


def draw_sweeps(sweeps: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Path]:
    """Draw each sweep as a PNG file in `folder`, in place of those there; returns them by title."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("sweep_*.png"):
        old.unlink()
    return {
        f"Scaling of {swept['contestant']}: {swept['kind']}": save(
            _sweep_plot(swept), folder / f"sweep_{number}_{swept['kind']}.png"
        )
        for number, swept in enumerate(sweeps, 1)
    }


def _sweep_plot(swept: Mapping[str, Any]) -> Figure:
    """Seconds and bytes, each with its fit and with what the operations alone would predict."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    points = swept["points"]
    x = [point["x"] for point in points]
    for i, (what, unit, label) in enumerate(
        (("seconds", 1e3, "milliseconds"), ("bytes", 1e-6, "MB"))
    ):
        axes = figure.add_subplot(1, 2, i + 1)
        y = [point[what] * unit for point in points]
        axes.plot(x, y, "o", color=COLOURS[i], label="measured")
        if fitted := swept["fits"][what]:
            law = [fitted["factor"] * value ** fitted["exponent"] * unit for value in x]
            axes.plot(x, law, "-", color=COLOURS[i], label=f"x^{fitted['exponent']:.2f}")
        scale = y[-1] / points[-1]["gflops"]
        predicted = [point["gflops"] * scale for point in points]
        axes.plot(x, predicted, "--", color=COLOURS[5], label="operations, scaled")
        axes.set(xscale="log", yscale="log", xlabel=swept["against"], ylabel=label)
        axes.set_xticks(x, [f"{value:g}" for value in x], rotation=30, fontsize=7)
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
    return figure
