"""What a config costs: parameters and operations counted here, latency from a benchmark."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from fpn_plugin.analysis.benchmark.configs import find_baseline, model_differences
from fpn_plugin.analysis.benchmark.models import find_below
from fpn_plugin.analysis.compare.groups import Group
from fpn_plugin.analysis.complexity import count_parameters, totals
from fpn_plugin.engine.run_folder import CONFIG, recorded_config
from fpn_plugin.engine.setup import load_config

SIZE = (800, 1344)
BENCHMARK = "--benchmark"
# beside the model these decide how fast it is
_SPEED = (("SOLVER", "AMP", "ENABLED"), ("TEST", "FOLD_NORMS"))
_NO_WEIGHTS = ("MODEL.WEIGHTS", "", "MODEL.BOTTOM_UP.WEIGHTS", "", "MODEL.DEVICE", "cpu")


@dataclass(frozen=True)
class Latencies:
    """What a benchmark timed.

    Attributes:
        what: "inference", "backbone" or "neck", and on what: for a table's header.
        seconds: by group.
        notes: groups and contestants that found no partner.
    """

    what: str
    seconds: Mapping[str, float]
    notes: tuple[str, ...]


def model_key(group: Group) -> str:
    """Equal for groups whose models are."""
    config = group.runs[0].config
    return json.dumps({key: config[key] for key in config if key.startswith("MODEL.")})


def counts(group: Group) -> dict[str, float]:
    """The parameters of the whole detector, and 10^9 multiply-accumulates of its backbone, with the
    pyramid if it has one, for one image of SIZE.

    Raises:
        Exception: whatever building a model of a config raises that is not of this version.
    """
    cfg = _load(str(group.runs[0].folder / CONFIG), ())
    cfg.freeze()
    model = build_model(cfg)
    # "": the whole backbone, which is all that a single-level detector has
    whole = totals(model.backbone, find_below(model.backbone), SIZE)["backbone"]
    return {"parameters": count_parameters(model), "gflops": whole.flops / 1e9}


def latencies(path: str, groups: list[Group]) -> Latencies:
    """The seconds of those groups whose model a benchmark's contestant has.

    Raises:
        ValueError: naming the file, if it is no benchmark's report or timed nothing.
        FileNotFoundError: if it does not exist.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{BENCHMARK} {path!r} does not exist")
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        timed = [name for name in ("inference", "backbone", "neck") if name in report["timings"]]
        contestants, size = report["contestants"], report["settings"]["size"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{BENCHMARK} {path!r} is no report.json of tools/benchmark.py") from error
    if not timed:
        raise ValueError(f"{BENCHMARK} {path!r} holds no times: it was run with --what counts")
    times = report["timings"][timed[0]]["times"]
    found: dict[str, float] = {}
    notes = []
    for name, one in contestants.items():
        try:
            cfg = _load(find_baseline(one["config"]), one["overrides"])
        except (FileNotFoundError, KeyError, ValueError) as error:
            notes.append(f"{BENCHMARK}: {name} is left out: {error}")
            continue
        for group in groups:
            if name in times and group.name not in found and _same(group, cfg):
                found[group.name] = times[name]["seconds"]
    missing = [group.name for group in groups if group.name not in found]
    if missing:
        notes.append(f"{BENCHMARK} {path}: no contestant has the model of {', '.join(missing)}")
    batch = report["settings"].get("batch", 1)
    images = "an image" if batch == 1 else f"{batch} images"
    what = f"{timed[0]} of {images} of {size[0]} × {size[1]}"
    return Latencies(what, found, tuple(notes))


def _same(group: Group, cfg: CfgNode) -> bool:
    recorded = recorded_config(str(group.runs[0].folder))
    if model_differences(recorded["MODEL"], cfg):
        return False
    for path in _SPEED:
        ours: Any = cfg
        theirs: Any = recorded
        for part in path:
            ours, theirs = ours[part], theirs.get(part, {})
        if theirs not in ({}, ours):
            return False
    return True


def _load(file: str, opts: Any) -> CfgNode:
    """A config for counting: on the CPU and without weight files."""
    return load_config(argparse.Namespace(config_file=file, opts=[*opts, *_NO_WEIGHTS]))
