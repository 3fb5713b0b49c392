"""How a pyramid's cost grows with one setting: seconds and bytes, beside its operations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import nn

from fpn_plugin.analysis.benchmark.clock import clock_for, no_lap
from fpn_plugin.analysis.benchmark.contestants import Contestant
from fpn_plugin.analysis.benchmark.entrants import Entrant
from fpn_plugin.analysis.benchmark.inputs import Inputs
from fpn_plugin.analysis.benchmark.memory import peak_bytes
from fpn_plugin.analysis.benchmark.subjects import Subject, neck_subject
from fpn_plugin.analysis.benchmark.timing import Plan, race
from fpn_plugin.analysis.visualize.complexity import padded_size, totals
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.pyramid.topologies import INNER_LEVELS

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
    """The coarsest k bottom-up maps; the levels that a topology makes of its own stay as many."""
    names, own = list(cfg.MODEL.FPN.IN_FEATURES), cfg.MODEL.FPN.INNER_LEVELS
    if own < 0:
        first = cfg.MODEL.FPN.TOPOLOGY.split("+")[0]
        own = max(0, INNER_LEVELS.get(first, 0) - len(names))
    return [
        _point(cfg, inputs, f"{names[-count]} …", IN_FEATURES=names[-count:], INNER_LEVELS=own)
        for count in range(2, len(names) + 1)
    ]


def _sizes(cfg: CfgNode, inputs: Inputs) -> list[Point]:
    points = []
    for scale in SCALES:
        height, width = (max(64, round(side * scale / 64) * 64) for side in inputs.size)
        made = Inputs((height, width), inputs.batch, inputs.device, inputs.seed)
        points.append(Point(f"{height}x{width}", cfg, made))
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
"""Of each kind: what cost is fitted against, the points, and its value at a point."""


def check_sweep(kind: str, contestant: Contestant) -> None:
    """Refuse what cannot be varied; before anything is built.

    Raises:
        ValueError: for a config that is none of this plugin's, or has no such settings.
    """
    if contestant.cfg.MODEL.BACKBONE.NAME != "build_pyramid_backbone":
        raise ValueError(
            f"--sweep {kind}: {contestant.name} has MODEL.BACKBONE.NAME"
            f" {contestant.cfg.MODEL.BACKBONE.NAME!r}; only build_pyramid_backbone can be varied"
        )
    if kind in ("repeats", "levels") and contestant.cfg.MODEL.FPN.GRAPH:
        raise ValueError(f"--sweep {kind}: {contestant.name} has a MODEL.FPN.GRAPH of its own")
    if kind == "levels" and len(contestant.cfg.MODEL.FPN.IN_FEATURES) < 2:
        raise ValueError(f"--sweep levels: {contestant.name} reads one map (MODEL.FPN.IN_FEATURES)")


def sweep(
    kind: str,
    contestant: Contestant,
    inputs: Inputs,
    plan: Plan,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure a config's pyramid at several settings, in turns, and fit how it grows.

    Args:
        kind: a key of SWEEPS.

    Returns:
        "kind", "contestant", "against" (what x is), "points" and "fits", ready for JSON.

    Raises:
        ValueError: what :func:`check_sweep` raises.
    """
    check_sweep(kind, contestant)
    against, make, value_of = SWEEPS[kind]
    points: dict[str, dict[str, Any]] = {}
    subjects: dict[str, Subject] = {}
    for point in make(contestant.cfg, inputs):
        backbone = _backbone(point.cfg)
        cost = totals(backbone, "bottom_up", point.inputs.size)["neck"]
        points[point.label] = {
            "label": point.label,
            "x": value_of(backbone, point.inputs),
            "gflops": cost.flops / 1e9 * inputs.batch,
        }
        entrant = Entrant(Contestant(point.label, point.cfg, contestant.source), _Holder(backbone))
        subjects[point.label] = neck_subject(entrant, point.inputs)
    works = {label: subject.work for label, subject in subjects.items()}
    for label, work in works.items():
        work(no_lap)
        points[label]["bytes"] = peak_bytes(partial(work, no_lap), inputs.device)
    done = race(works, [], clock_for(inputs.device), plan, on_round)
    for label, times in done.times.items():
        points[label].update(seconds=times.median(), spread=times.spread())
    made = list(points.values())
    fits = {what: fit([p["x"] for p in made], [p[what] for p in made]) for what in FITTED}
    return {
        "kind": kind,
        "contestant": contestant.name,
        "against": against,
        "points": made,
        "fits": fits,
    }


FITTED = ("seconds", "bytes", "gflops")


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """A power law `y = factor * x^exponent` and a line `y = start + slope * x`, by least squares.

    Returns:
        "exponent", "factor", "r2" (of the logarithms), "start", "slope"; nothing for fewer than two
        different x.
    """
    if len(set(x)) < 2:
        return {}
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.maximum(np.asarray(y, float), 1e-12))
    exponent, offset = np.polyfit(log_x, log_y, 1)
    slope, start = np.polyfit(np.asarray(x, float), np.asarray(y, float), 1)
    left = float(np.square(log_y - offset - exponent * log_x).sum())
    all_of_it = float(np.square(log_y - log_y.mean()).sum())
    return {
        "exponent": float(exponent),
        "factor": float(np.exp(offset)),
        "r2": 1 - left / all_of_it if all_of_it else 1.0,
        "start": float(start),
        "slope": float(slope),
    }


class _Holder(nn.Module):
    """A backbone where a detector has it, with what an image needs to reach it."""

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
    made = cfg.clone()
    made.defrost()
    for key, value in values.items():
        made.MODEL.FPN[key] = value
    return Point(label, made, inputs)
