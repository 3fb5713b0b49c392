"""The work of `tools/export_table.py`: every config in every format, verified, as a table."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator, List, Sequence

import torch
from torch import nn

from fpn_plugin.export.export import Settings, export, json_path
from fpn_plugin.export.formats import FORMATS
from fpn_plugin.modeling.build import build_model
from fpn_plugin.pyramid.build import REGISTRIES
from fpn_plugin.report.progress import Bar
from fpn_plugin.report.tables import Table
from fpn_plugin.visualize.detector import read_config

# by the name of a registry: the key that selects its operators, and a topology that uses them
_KEYS = {
    "up": ("MODEL.FPN.UPSAMPLE", "fpn"),
    "down": ("MODEL.FPN.DOWNSAMPLE", "bifpn"),  # pafpn's are always convolutions
    "block": ("MODEL.FPN.BLOCK", "fpn"),
    "fuse": ("MODEL.FPN.FUSE_TYPE", "fpn"),
}
HEADER = ("", "format", "sizes", "largest relative difference", "seconds", "MB")


@dataclass(frozen=True)
class Case:
    """A model to export in every format.

    Attributes:
        opts: `KEY VALUE` pairs for the config.
    """

    name: str
    config_file: str
    opts: Sequence[str] = ()


def operator_cases(config_file: str, opts: Sequence[str]) -> List[Case]:
    """A case for each registered operator, in a config."""
    return [
        Case(f"{registry} {name}", config_file, (*opts, "MODEL.FPN.TOPOLOGY", topology, key, name))
        for registry, (key, topology) in _KEYS.items()
        for name in REGISTRIES[registry].names()
    ]


def measure(cases: Sequence[Case], formats: Sequence[str], limit: int, bar: Bar) -> Iterator[Table]:
    """Export each case with random weights in each format.

    Args:
        limit: the time limit of an export, in seconds.

    Yields:
        the table after each case; where an export fails, it has the reason instead of numbers.
    """
    rows: list[list[str]] = []
    for case in cases:
        with tempfile.TemporaryDirectory() as name:
            bar.say(case.name)
            weights = Path(name, "model.pth")
            _write_weights(case, weights)
            for format in formats:
                output = Path(name, f"model{FORMATS[format].suffix}")
                settings = Settings(case.config_file, format, output, str(weights), opts=case.opts)
                rows.append([case.name, format, *_cells(replace(settings, time_limit=limit))])
        yield Table("Exports", HEADER, rows, left=2)


def _write_weights(case: Case, path: Path) -> None:
    path.touch()  # read_config checks that it exists
    cfg = read_config(case.config_file, str(path), case.opts)
    cfg.MODEL.DEVICE, cfg.MODEL.BOTTOM_UP.WEIGHTS = "cpu", ""
    torch.manual_seed(0)
    model: nn.Module = build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():  # offsets and gates start at zero, but should matter
            parameter.add_(0.02 * torch.randn_like(parameter))
    torch.save({"model": model.state_dict()}, path)


def _cells(settings: Settings) -> list[str]:
    """Sizes, difference, seconds and megabytes of one export, or the reason why it failed."""
    try:
        differences = export(settings, Bar(True))
    except (ValueError, TimeoutError) as error:
        return ["", f"refused: {str(error)[:200]}", "", ""]
    shapes = [(difference.shape[0], *difference.shape[2:]) for difference in differences]
    sizes = ", ".join("x".join(map(str, shape)) for shape in shapes)
    how = re.search(r"([\d.]+) s$", json.loads(json_path(settings.output).read_text())["how"])
    megabytes = settings.output.stat().st_size / 1e6
    worst = max(difference.relative for difference in differences)
    return [sizes, f"{worst:.1e}", how[1] if how else "", f"{megabytes:.1f}"]
