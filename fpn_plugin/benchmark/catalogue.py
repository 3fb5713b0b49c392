"""The catalogue's pyramids on one network: what each costs, and how long it takes beside FPN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from fvcore.nn import FlopCountAnalysis
from torch import Tensor

from fpn_plugin.benchmark.timing import Lap, Plan, Work, clock_for, time_interleaved
from fpn_plugin.config.files import merge_config_file
from fpn_plugin.config.resolve import resolve_config
from fpn_plugin.config.settings import PyramidSettings, read_settings
from fpn_plugin.config.validate import keys_in_errors
from fpn_plugin.paths import configs_dir
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.report.tables import Table
from fpn_plugin.visualize.complexity import Cost, count_parameters

REFERENCE = "fpn"
OWN = "this config"


@dataclass(frozen=True)
class Latency:
    """How long a pyramid's forward pass takes.

    Attributes:
        seconds: the median.
        relative: the median over the rounds of its time to FPN's, and the ends of the 95% interval
            of that median.
    """

    seconds: float
    relative: tuple[float, float, float]


@dataclass(frozen=True)
class Entry:
    """A pyramid of the catalogue on a network.

    Attributes:
        name: of its file in configs/pyramids, or OWN.
        settings: None for what the network cannot have.
        pyramid: without the network, in evaluation mode, on the CPU.
        maps: the shape of each map that it reads, with batch.
        reason: why the network cannot have it; "" otherwise.
        is_own: whether it is the config's own pyramid.
    """

    name: str
    settings: PyramidSettings | None = None
    pyramid: Pyramid | None = None
    maps: Mapping[str, tuple[int, ...]] | None = None
    reason: str = ""
    is_own: bool = False

    def inputs(self) -> dict[str, Tensor]:
        """Random maps, the same for all pyramids of a size."""
        generator = torch.Generator().manual_seed(0)
        shapes = self.maps or {}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def outputs(self) -> list[str]:
        """The names of the maps that it gives."""
        return list(self.pyramid.graph.output_names()) if self.pyramid else []


def preset_files() -> dict[str, Path]:
    """The files of configs/pyramids, one per entry of the catalogue, by name."""
    return {path.stem: path for path in sorted((configs_dir() / "pyramids").glob("*.yaml"))}


def with_preset(cfg: CfgNode, path: Path) -> CfgNode:
    """A copy of a config with the pyramid of such a file; resolved.

    Raises:
        ValueError: (KeyError for an unknown name) if the config cannot have it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    merge_config_file(cfg, str(path))
    return resolve_config(cfg)


def catalogue(
    cfg: CfgNode, shapes: Mapping[str, ShapeSpec], size: Sequence[int], divisibility: int = 0
) -> list[Entry]:
    """All entries of the catalogue in the place of a config's pyramid, and its own, if that is
    another.

    Args:
        cfg: resolved.
        shapes: of the maps that the network underneath gives.
        size: of the image in pixels, height and width. Each pyramid reads maps of an image that is
            padded as it needs.
        divisibility: what the network needs the image's sides to be divisible by, in pixels.
    """
    entries = []
    for name, path in preset_files().items():
        try:
            entries.append(_entry(name, with_preset(cfg, path), shapes, size, divisibility))
        except (KeyError, ValueError) as error:
            entries.append(Entry(name, reason=str(error)))
    own = replace(_entry(OWN, cfg, shapes, size, divisibility), is_own=True)
    if own.settings not in [entry.settings for entry in entries]:
        return [*entries, own]
    return [replace(entry, is_own=entry.settings == own.settings) for entry in entries]


def _entry(
    name: str,
    cfg: CfgNode,
    shapes: Mapping[str, ShapeSpec],
    size: Sequence[int],
    divisibility: int,
) -> Entry:
    settings = read_settings(cfg)
    if settings.rfp_steps > 1:
        reason = f"MODEL.FPN.RFP_STEPS: {settings.rfp_steps}, so it is no pyramid alone"
        return Entry(name, settings, reason=f"{reason}: `fpn show` counts it with its networks")
    with keys_in_errors():
        if missing := [each for each in settings.in_features if each not in shapes]:
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES: the network gives no {missing[0]!r}, but"
                f" {', '.join(shapes)}"
            )
        strides = {each: shapes[each].stride or 1 for each in settings.in_features}
        graph = settings.build_graph({each: x.bit_length() - 1 for each, x in strides.items()})
        channels = {each: shapes[each].channels or 1 for each in settings.in_features}
        torch.manual_seed(0)
        pyramid = Pyramid(graph, channels, settings.defaults()).eval()
    step = max(graph.size_divisibility(), divisibility, *strides.values())
    height, width = (-(-side // step) * step for side in size)
    maps = {
        each: (1, channels[each], height // strides[each], width // strides[each])
        for each in graph.inputs
    }
    return Entry(name, settings, pyramid, maps)


@torch.no_grad()
def count_costs(
    entries: Sequence[Entry], on_entry: Callable[[int], None] = lambda done: None
) -> dict[str, Cost]:
    """Parameters and multiply-accumulates of each pyramid, by name.

    Args:
        on_entry: called with the number of those that are counted.
    """
    costs = {}
    for done, entry in enumerate(entries, 1):
        if entry.pyramid is not None:
            analysis = FlopCountAnalysis(entry.pyramid, (entry.inputs(),))
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            analysis.tracer_warnings("none")
            costs[entry.name] = Cost(count_parameters(entry.pyramid), analysis.total())
        on_entry(done)
    return costs


def measure_latencies(
    entries: Sequence[Entry], plan: Plan, on_round: Callable[[int], None] | None = None
) -> dict[str, Latency]:
    """The time of each pyramid's forward pass on the CPU, in turns with FPN's, by name.

    Raises:
        ValueError: if FPN is not among them.
    """
    pyramids = {entry.name: entry.pyramid for entry in entries if entry.pyramid is not None}
    inputs = {entry.name: entry.inputs() for entry in entries}
    if REFERENCE not in pyramids:
        reason = next((entry.reason for entry in entries if entry.name == REFERENCE), "")
        raise ValueError(f"--latency is relative to {REFERENCE}, which cannot be built: {reason}")

    @torch.no_grad()
    def forward(pyramid: Pyramid, inputs: dict[str, Tensor], lap: Lap) -> object:
        return pyramid(inputs)

    works: dict[str, Work] = {
        name: partial(forward, pyramid, inputs[name]) for name, pyramid in pyramids.items()
    }
    pairs = [(name, REFERENCE) for name in works]
    timed = time_interleaved(works, pairs, clock_for("cpu"), plan, on_round)
    latencies = {}
    for name in works:
        ratio = timed.ratios[name, REFERENCE]["whole"]  # how many times as fast
        relative = (1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
        latencies[name] = Latency(timed.times[name].median(), relative)
    return latencies


def catalogue_table(
    entries: Sequence[Entry],
    costs: Mapping[str, Cost],
    latencies: Mapping[str, Latency],
    size: Sequence[int],
) -> Table:
    """One row per entry, the cheapest first: by time if that was measured, else by operations.
    What the network cannot have comes last, with the reason."""
    reference = costs.get(REFERENCE)

    def key(entry: Entry) -> tuple[bool, float]:
        if entry.name in latencies:
            return False, latencies[entry.name].seconds
        return entry.name not in costs, costs[entry.name].flops if entry.name in costs else 0

    header = ["pyramid", "maps", "nodes", "parameters", "GFLOPs", f"of {REFERENCE}'s"]
    header += ["ms", f"time / {REFERENCE}'s (95%)"] if latencies else []
    rows = []
    for entry in sorted(entries, key=key):
        if entry.pyramid is None:
            rows.append([entry.name, "–", *[""] * (len(header) - 2)])
            continue
        cost, maps = costs[entry.name], entry.outputs()
        share = f"{cost.flops / reference.flops:.2f}×" if reference else ""
        title = f"{entry.name} ({OWN})" if entry.is_own and entry.name != OWN else entry.name
        row = [title, f"{maps[0]} … {maps[-1]}", str(len(entry.pyramid.graph.nodes))]
        row += [f"{cost.parameters:,}", f"{cost.flops / 1e9:.2f}", share]
        if latencies:
            latency = latencies[entry.name]
            row += [f"{1000 * latency.seconds:.1f}", relative_text(latency)]
        rows.append(row)
    lines = [
        f"The pyramid alone, for one image of {size[0]} x {size[1]} pixels with the padding that"
        " it needs, each with its file of configs/pyramids on this config's network and width.",
        "GFLOPs: 10^9 multiply-accumulates, counted by fvcore.",
    ]
    if latencies:
        lines.append("Times: forward pass on the CPU, medians, in turns; norms are not folded.")
    lines += [f"{entry.name}: {entry.reason}" for entry in entries if entry.reason]
    return Table("The catalogue", header, rows, "\n".join(lines), left=2)


def relative_text(latency: Latency) -> str:
    """A time relative to FPN's, with its interval."""
    value, low, high = latency.relative
    return f"{value:.2f}× ({low:.2f}…{high:.2f})"
