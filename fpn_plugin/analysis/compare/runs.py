"""Training runs as they lie in their folders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import yaml
from detectron2.config import get_cfg

from fpn_plugin.analysis.benchmark.configs import short_names
from fpn_plugin.analysis.study.record import read_record
from fpn_plugin.config import add_fpn_config
from fpn_plugin.engine.run_folder import CONFIG, flatten, metric_lines, recorded_config

TASKS = ("bbox", "segm")
RESULTS = "coco_instances_results.json"
_EVALUATION = re.compile(r"eval-\d+")  # what `--eval-only` calls its folders
# what an evaluation's own config does not have from the run whose weights it evaluates
_OF_TRAINING = ("MODEL.WEIGHTS", "MODEL.BOTTOM_UP.WEIGHTS", "DATASETS.TRAIN", "SEED")


@dataclass(frozen=True)
class Run:
    """An OUTPUT_DIR.

    Attributes:
        name: unique among the runs.
        config: every key with its value.
        dataset: the test set.
        truth: the test set's annotations as the config names them, for one's own data; or "".
        iteration: of the last evaluation; -1 where metrics.json has none.
        metrics: of the last evaluation in metrics.json, such as "bbox/AP", in percent.
        losses: the total loss by iteration.
        curves: by task, AP in percent by iteration.
        results: the detections of the last evaluation, where they are.
        entry: what the study that trained it calls its config; "" if no study did.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    dataset: str
    truth: str
    iteration: int
    metrics: Mapping[str, float]
    losses: Mapping[int, float]
    curves: Mapping[str, Mapping[int, float]]
    results: Path | None
    entry: str = ""

    @property
    def seed(self) -> int:
        return int(self.config.get("SEED", -1))

    @property
    def is_evaluated(self) -> bool:
        return bool(self.metrics) or self.results is not None

    @property
    def planned(self) -> int:
        """The iterations that the training was to have."""
        return int(self.config["SOLVER.MAX_ITER"])


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in some folders, finished or not.

    Raises:
        FileNotFoundError: for a folder that is no run's.
        ValueError: for a folder that is given twice, or runs that were tested on different data.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise ValueError(f"RUN_DIR {str(twice[0])!r} is given twice")
    defaults = _defaults()
    # the names must not lose what follows a dot, which is no suffix of a folder
    names = short_names([f"{path}.run" for path in paths])
    names = [
        "/".join(path.parts[-2:]) if name == path.name and _EVALUATION.fullmatch(name) else name
        for name, path in zip(names, paths, strict=True)
    ]
    runs = [
        _read(name, Path(folder), defaults) for name, folder in zip(names, folders, strict=True)
    ]
    tested = {(run.dataset, run.truth): run for run in runs if run.is_evaluated}
    if len(tested) > 1:
        told = "; ".join(
            f"{run.folder} on {' '.join(filter(None, of))}" for of, run in tested.items()
        )
        raise ValueError(
            f"the runs were tested on different data, which cannot be compared: {told}"
        )
    return runs


def _defaults() -> dict[str, Any]:
    """For keys that are newer than a run."""
    cfg = get_cfg()
    add_fpn_config(cfg)
    return flatten(yaml.safe_load(cfg.dump()))


def _read(name: str, folder: Path, defaults: Mapping[str, Any]) -> Run:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"RUN_DIR {str(folder)!r} has no {CONFIG}: it is no run's folder")
    config = {**defaults, **flatten(recorded_config(str(folder)))}
    if _EVALUATION.fullmatch(folder.resolve().name):
        parent = flatten(recorded_config(str(folder.resolve().parent)))
        config.update({key: parent[key] for key in _OF_TRAINING if key in parent})
    sets = config["DATASETS.TEST"]
    dataset = sets[0] if sets else ""
    inference = folder / "inference"
    results = (inference / dataset if len(sets) > 1 else inference) / RESULTS
    lines = [line for line in metric_lines(str(folder)) if "iteration" in line]
    evaluations = [(line["iteration"], _metrics(line, dataset)) for line in lines]
    evaluations = [(iteration, found) for iteration, found in evaluations if found]
    iteration, metrics = evaluations[-1] if evaluations else (-1, {})
    own = config["DATASETS.OWN.VAL_JSON"]
    return Run(
        name=name,
        folder=folder,
        config=config,
        dataset=dataset,
        truth=str(Path(own).resolve()) if own and dataset == "own_val" else "",
        iteration=iteration,
        metrics=metrics,
        losses={line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line},
        curves={
            task: {at: found[f"{task}/AP"] for at, found in evaluations if f"{task}/AP" in found}
            for task in TASKS
            if f"{task}/AP" in metrics
        },
        results=results if results.is_file() else None,
        entry=read_record(folder).get("name", ""),
    )


def _metrics(line: Mapping[str, Any], dataset: str) -> dict[str, float]:
    """What an evaluation found; with several test sets their names come first."""
    names = {key: key.removeprefix(f"{dataset}/") for key in line}
    return {
        name: float(line[key])
        for key, name in names.items()
        if name.startswith(tuple(f"{task}/" for task in TASKS))
    }
