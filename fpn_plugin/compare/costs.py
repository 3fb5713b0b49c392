"""Costs of a config: parameters and operations counted here, latency from a benchmark's report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from detectron2.config import CfgNode

from fpn_plugin.benchmark.configs import find_baseline, model_differences
from fpn_plugin.benchmark.models import find_below
from fpn_plugin.benchmark.timing import OK
from fpn_plugin.checkpoint.run_folder import CONFIG, flatten, recorded_config
from fpn_plugin.compare.runs import Group
from fpn_plugin.modeling.build import build_model
from fpn_plugin.modeling.described import load_model_config, run_keys
from fpn_plugin.paths import configs_dir, zoo_dir
from fpn_plugin.visualize.complexity import count_parameters, totals

SIZE = (800, 1344)
BENCHMARK = "--benchmark"
# keys outside MODEL that change a config's speed
_SPEED_KEYS = ("SOLVER.AMP.ENABLED", "TEST.FOLD_NORMS")
_NO_WEIGHTS = ("MODEL.WEIGHTS", "", "MODEL.BOTTOM_UP.WEIGHTS", "", "MODEL.DEVICE", "cpu")


@dataclass(frozen=True)
class Latencies:
    """What a benchmark measured.

    Attributes:
        what: "inference", "backbone" or "neck", of what and on which machine: for a table's note.
        seconds: by group.
        notes: groups that the benchmark did not measure, and its configs that cannot be read.
    """

    what: str
    seconds: Mapping[str, float]
    notes: tuple[str, ...]


def model_key(group: Group) -> str:
    """Equal for groups with equal models."""
    config = group.runs[0].config
    return json.dumps({key: config[key] for key in config if key.startswith(("MODEL.", "model."))})


def count_costs(group: Group) -> dict[str, float]:
    """Count "parameters" of the detector and "gflops" of its backbone with the pyramid.

    GFLOPs are 10^9 multiply-accumulates for one image of SIZE.

    Raises:
        Exception: whatever building the model raises if its config is of another version.
    """
    cfg = _load_config(str(group.runs[0].folder / CONFIG), ())
    cfg.freeze()
    model: Any = build_model(cfg)
    complexity = totals(model.backbone, find_below(model.backbone), SIZE)["backbone"]
    return {"parameters": count_parameters(model), "gflops": complexity.flops / 1e9}


def read_latencies(path: str, groups: list[Group]) -> Latencies:
    """Read the latency of each group whose model a benchmark measured.

    Raises:
        ValueError: naming the file, if it is no benchmark's report or has no times.
        FileNotFoundError: if it does not exist.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{BENCHMARK} {path!r} does not exist")
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        timed = [name for name in ("inference", "backbone", "neck") if name in report["timings"]]
        models, size = report["contestants"], report["settings"]["size"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{BENCHMARK} {path!r} is no report.json of `fpn benchmark`") from error
    if not timed:
        raise ValueError(f"{BENCHMARK} {path!r} holds no times: it was run with --what counts")
    times = dict(report["timings"][timed[0]]["times"])
    seconds: dict[str, float] = {}
    notes = []
    for name in [name for name, row in times.items() if row.get("verdict", OK) != OK]:
        notes.append(f"{BENCHMARK}: the time of {name} was refused, its samples spread too far")
        del times[name]
    for name, model in models.items():
        try:
            file = find_baseline(model["config"])
            _refuse_code(file)
            cfg = _load_config(file, model["overrides"])
        except (FileNotFoundError, KeyError, ValueError) as error:
            notes.append(f"{BENCHMARK}: {name} is left out: {error}")
            continue
        for group in groups:
            if name in times and group.name not in seconds and _is_equally_fast(group, cfg):
                seconds[group.name] = times[name]["seconds"]
    if missing := [group.name for group in groups if group.name not in seconds]:
        notes.append(f"{BENCHMARK} {path} did not measure the model of {', '.join(missing)}")
    batch = report["settings"].get("batch", 1)
    images = "an image" if batch == 1 else f"{batch} images"
    what = f"{timed[0]} of {images} of {size[0]} × {size[1]}"
    machine = report.get("machine", {})
    if processor := machine.get("gpu") or machine.get("cpu"):
        what += f" on {processor}, {machine.get('date', '')[:10]}".rstrip(", ")
    return Latencies(what, seconds, tuple(notes))


def _refuse_code(file: str) -> None:
    """Refuse a Python config that a report names, and not the user.

    Raises:
        ValueError: naming it, unless it is Detectron2's or this plugin's.
    """
    folders = (configs_dir(), zoo_dir())
    if file.endswith(".py") and not any(Path(file).resolve().is_relative_to(f) for f in folders):
        raise ValueError(
            f"{file} is a Python config, which is code, and a report must not say what is run"
        )


def _is_equally_fast(group: Group, cfg: CfgNode) -> bool:
    """Whether a config has the group's model, and the same value of each key of speed."""
    recorded = recorded_config(str(group.runs[0].folder))
    if model_differences(recorded, cfg):
        return False
    # a key that the record lacks is newer than the run
    values, recorded_values = flatten(cfg), run_keys(recorded)
    return all(recorded_values.get(key, values[key]) == values[key] for key in _SPEED_KEYS)


def _load_config(file: str, opts: Any) -> CfgNode:
    """A config for counting: on the CPU and without weight files."""
    return load_model_config(file, opts, _NO_WEIGHTS)
