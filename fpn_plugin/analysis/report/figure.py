"""Pictures for reports, in one look."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#3d7cc9", "#d98a1f", "#2f9e57", "#8257c7", "#c0392b", "#7b8794")


def new_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of 8 x `height` inches with one plot in it."""
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write it as PNG on white; returns the path."""
    FigureCanvasAgg(figure)  # without it a Figure cannot be written in some versions
    figure.savefig(path, dpi=130, facecolor="white")
    return path
