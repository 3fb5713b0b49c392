"""The AP that training runs reached, for the contestants whose configs they were trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from detectron2.config import CfgNode

from fpn_plugin.analysis.benchmark.contestants import Contestant
from fpn_plugin.engine.run_record import CONFIG, METRICS, metric_lines, recorded_config

RUNS = "--runs"
# where it runs and what it starts from make no other model
_FREE = ("DEVICE", "WEIGHTS", "BOTTOM_UP.WEIGHTS")


def read_runs(folders: Sequence[str], contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """The last AP of each run, and the contestant with the run's `MODEL` section.

    Returns:
        "folder", "contestant", and "AP" by task ("bbox", "segm", …) of each.

    Raises:
        FileNotFoundError: if a folder has no metrics.json or config.yaml.
        ValueError: if it was never evaluated, or no contestant has its model.
    """
    return [_read(Path(folder), contestants) for folder in folders]


def _read(folder: Path, contestants: Sequence[Contestant]) -> dict[str, Any]:
    for name in (METRICS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{RUNS} {str(folder)!r} has no {name}: it is no run's folder")
    found: dict[str, float] = {}
    for metrics in metric_lines(str(folder)):
        found.update({key[: -len("/AP")]: metrics[key] for key in metrics if key.endswith("/AP")})
    if not found:
        raise ValueError(f"{RUNS} {str(folder)!r}: its metrics.json holds no AP")
    model = recorded_config(str(folder))["MODEL"]
    differing = {one.name: model_differences(model, one.cfg) for one in contestants}
    name = min(differing, key=lambda name: len(differing[name]))
    if differing[name]:
        raise ValueError(
            f"{RUNS} {str(folder)!r} was trained with another model than every contestant's;"
            f" the nearest is {name}, which differs in {', '.join(differing[name][:5])}"
        )
    return {"folder": str(folder), "contestant": name, "AP": found}


def model_differences(recorded: Mapping[str, Any], cfg: CfgNode) -> list[str]:
    """The keys in which a config's model is another one than a run's.

    Args:
        recorded: the `MODEL` section of the run's config.yaml.
    """
    model = _flat(recorded)
    return [
        f"MODEL.{key}"
        for key, value in _flat(cfg.MODEL).items()
        if key not in _FREE and model.get(key, value) != value
    ]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            values.update(_flat(value, f"{prefix}{key}."))
        else:
            values[prefix + key] = json.dumps(value)  # tuples as the lists that YAML has
    return values
