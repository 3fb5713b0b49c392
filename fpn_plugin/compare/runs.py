"""Training runs as their folders hold them, grouped by config.

A study (:mod:`fpn_plugin.study`) leaves RECORD beside each run; the name that it gives a
config is the group's name here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import yaml
from detectron2.config import get_cfg

from fpn_plugin.benchmark.configs import short_names
from fpn_plugin.checkpoint.run_folder import (
    CONFIG,
    OUTER_KEYS,
    flatten,
    is_python_record,
    metric_lines,
    recorded_config,
)
from fpn_plugin.config import add_fpn_config
from fpn_plugin.modeling.described import (
    PYTHON_OUTER_KEYS,
    keys_within,
    run_keys,
    shared_keys,
)

TASKS = ("bbox", "segm")
RESULTS = "coco_instances_results.json"
RECORD = "study.json"
_EVALUATION = re.compile(r"eval-\d+")  # what `--eval-only` calls its folders
# keys that an evaluation takes from the run whose weights it evaluates
_TRAINING_KEYS = ("MODEL.WEIGHTS", "MODEL.BOTTOM_UP.WEIGHTS", "DATASETS.TRAIN", "SEED")
# keys in which runs of one config may differ
_UNCOMPARED_KEYS = ("SEED", "VERSION", "TEST.EVAL_PERIOD", *OUTER_KEYS)
# the same for runs of Python configs, where each stands for all below it
_PYTHON_TRAINING_KEYS = (
    "train.init_checkpoint",
    "train.seed",
    "train.max_iter",
    "dataloader.train",
    "model.backbone.bottom_up.weights",
)
_KIND = "config"  # where configs of both kinds are compared: YAML or Python
_MAX_NAME_LENGTH = 32  # of a group's name made of the values that differ


@dataclass(frozen=True)
class Run:
    """An OUTPUT_DIR.

    Attributes:
        name: unique among the runs.
        config: every key with its value.
        dataset: the test set.
        truth: the test set's annotation file as the config names it (`DATASETS.OWN`), or "".
        iteration: of the last evaluation; -1 where metrics.json has none.
        metrics: of the last evaluation in metrics.json, such as "bbox/AP", in percent.
        curves: by task, AP in percent by iteration.
        results: the file with the detections of the last evaluation, if it exists.
        config_name: what the study that trained the run calls its config; "" without a study.
        is_python: whether it was trained from a Python config.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    dataset: str
    truth: str
    iteration: int
    metrics: Mapping[str, float]
    curves: Mapping[str, Mapping[int, float]]
    results: Path | None
    config_name: str = ""
    is_python: bool = False

    @property
    def seed(self) -> int:
        return int(self.config.get("SEED", -1))

    @property
    def is_evaluated(self) -> bool:
        return bool(self.metrics) or self.results is not None

    @property
    def max_iterations(self) -> int:
        """The length of the whole training."""
        return int(self.config["SOLVER.MAX_ITER"])

    @property
    def compared_config(self) -> dict[str, Any]:
        """The config without the keys in which runs of one config may differ."""
        if self.is_python:
            keys = keys_within(_python_keys(self.config), PYTHON_OUTER_KEYS)
            return {key: self.config[key] for key in _python_keys(self.config) if key not in keys}
        return {key: value for key, value in self.config.items() if key not in _UNCOMPARED_KEYS}

    @property
    def shared_config(self) -> dict[str, Any]:
        """The part of the config that a run of a YAML and one of a Python config both have."""
        kind = "Python" if self.is_python else "YAML"
        keys = [key for key in shared_keys() if key not in _UNCOMPARED_KEYS]
        shared = {key: self.config[key] for key in sorted(keys)}
        if shared["MODEL.FPN.EXTRA_LEVELS"] == "auto":  # a Python config's is what it stands for
            del shared["MODEL.FPN.EXTRA_LEVELS"]
        return {_KIND: kind, **shared}


@dataclass(frozen=True)
class Group:
    """Runs of one config, with different seeds.

    Attributes:
        name: unique among the groups.
    """

    name: str
    runs: tuple[Run, ...]


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read the runs in some folders, finished or not.

    Raises:
        FileNotFoundError: for a folder that holds no run.
        ValueError: for a folder that is given twice, or runs that were tested on different data.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if duplicates := [path for path, count in Counter(paths).items() if count > 1]:
        raise ValueError(f"RUN_DIR {str(duplicates[0])!r} is given twice")
    defaults = _default_config()
    names = [
        "/".join(path.parts[-2:]) if name == path.name and _EVALUATION.fullmatch(name) else name
        for name, path in zip(_short_names(paths), paths, strict=True)
    ]
    runs = [
        _read_run(name, Path(folder), defaults) for name, folder in zip(names, folders, strict=True)
    ]
    test_sets = {(run.dataset, run.truth): run for run in runs if run.is_evaluated}
    if len(test_sets) > 1:
        listed = "; ".join(
            f"{run.folder} on {' '.join(filter(None, test_set))}"
            for test_set, run in test_sets.items()
        )
        raise ValueError(
            f"the runs were tested on different data, which cannot be compared: {listed}"
        )
    return runs


def read_record(folder: Path) -> dict[str, Any]:
    """Read what a study recorded of a run; {} if no study trained it."""
    path = folder / RECORD
    return json.loads(path.read_text()) if path.is_file() else {}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs by config, in the order in which the configs come first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.compared_config, sort_keys=True), []).append(run)
    members = list(groups.values())
    names = _group_names(members)
    return [Group(name, tuple(runs)) for name, runs in zip(names, members, strict=True)]


def config_differences(members: Sequence[Sequence[Run]]) -> dict[str, list[Any]]:
    """By key, the value of each group of runs; only keys in which the groups differ.

    Groups of YAML and of Python configs have few keys in common: only these are compared.
    """
    is_mixed = len({runs[0].is_python for runs in members}) > 1
    first = [runs[0] for runs in members]
    configs = [run.shared_config if is_mixed else run.compared_config for run in first]
    keys = dict.fromkeys(key for config in configs for key in config)
    if is_mixed:
        keys = dict.fromkeys(key for key in keys if all(key in config for config in configs))
    rows = {key: [config.get(key) for config in configs] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def find_group(name: str, groups: Sequence[Group]) -> Group:
    """Find a group by its name or by the folder of one of its runs.

    Raises:
        ValueError: if there is none; it names the choices.
    """
    for group in groups:
        folders = [run.folder.resolve() for run in group.runs]
        if name == group.name or Path(name).resolve() in folders:
            return group
    raise ValueError(
        f"--baseline {name!r} is neither a config's name nor a folder of the runs; the names are"
        f" {', '.join(repr(group.name) for group in groups)}"
    )


def count_seeds(runs: Sequence[Run]) -> Mapping[int, int]:
    """Count the runs of each seed; a seed that was not set (below 0) differs each time."""
    return Counter(run.seed for run in runs if run.seed >= 0)


def _default_config() -> dict[str, Any]:
    """The values of keys that are newer than a run."""
    cfg = get_cfg()
    add_fpn_config(cfg)
    return flatten(yaml.safe_load(cfg.dump()))


def _read_run(name: str, folder: Path, defaults: Mapping[str, Any]) -> Run:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"RUN_DIR {str(folder)!r} has no {CONFIG}: it is no run's folder")
    recorded = recorded_config(str(folder))
    is_python = is_python_record(recorded)
    known = [key for key in defaults if not is_python or key in shared_keys()]
    config = {**{key: defaults[key] for key in known}, **run_keys(recorded)}
    if _EVALUATION.fullmatch(folder.resolve().name):
        parent = run_keys(recorded_config(str(folder.resolve().parent)))
        taken = keys_within(parent, _PYTHON_TRAINING_KEYS if is_python else _TRAINING_KEYS)
        config.update({key: parent[key] for key in taken})
    test_sets = config["DATASETS.TEST"]
    dataset = test_sets[0] if test_sets else ""
    inference = folder / "inference"
    results = (inference / dataset if len(test_sets) > 1 else inference) / RESULTS
    evaluations = {
        line["iteration"]: metrics
        for line in metric_lines(str(folder))
        if "iteration" in line and (metrics := _evaluation_metrics(line, dataset))
    }
    iteration, last_metrics = list(evaluations.items())[-1] if evaluations else (-1, {})
    val_json = config.get("DATASETS.OWN.VAL_JSON", "") if dataset == "own_val" else ""
    val_json = val_json or config.get("dataloader.test.dataset.json_file", "")
    return Run(
        name=name,
        folder=folder,
        config=config,
        dataset=dataset,
        truth=str(Path(val_json).resolve()) if val_json else "",
        iteration=iteration,
        metrics=last_metrics,
        curves={
            task: {
                at: metrics[f"{task}/AP"]
                for at, metrics in evaluations.items()
                if f"{task}/AP" in metrics
            }
            for task in TASKS
            if f"{task}/AP" in last_metrics
        },
        results=results if results.is_file() else None,
        config_name=read_record(folder).get("name", ""),
        is_python=is_python,
    )


def _python_keys(config: Mapping[str, Any]) -> list[str]:
    """A Python config's own keys, without those of YAML configs that follow from them."""
    return [key for key in config if key.partition(".")[0].islower()]


def _evaluation_metrics(line: Mapping[str, Any], dataset: str) -> dict[str, float]:
    """The results of an evaluation; with several test sets their keys start with the set's name."""
    names = {key: key.removeprefix(f"{dataset}/") for key in line}
    return {
        name: float(line[key])
        for key, name in names.items()
        if name.startswith(tuple(f"{task}/" for task in TASKS)) and not name.endswith("/maxDets")
    }


def _short_names(folders: Sequence[Path]) -> list[str]:
    """As many of the last parts of each path as tell it from the others."""
    # `short_names` drops a suffix, and what follows a dot in a folder's name is none
    return short_names([f"{folder}.run" for folder in folders])


def _group_names(members: Sequence[Sequence[Run]]) -> list[str]:
    """The study's names for the configs, else the values that differ if short, else the folders."""
    names = [" + ".join(dict.fromkeys(run.config_name for run in runs)) for runs in members]
    if all(names) and len(set(names)) == len(names):
        return names
    differences = config_differences(members)
    names = [
        " + ".join(_short_value(key, values[i]) for key, values in differences.items())
        for i in range(len(members))
    ]
    if all(0 < len(name) <= _MAX_NAME_LENGTH for name in names) and len(set(names)) == len(names):
        return names
    run_folders = [runs[0].folder.resolve() for runs in members]
    # "seed-0" says nothing of the config
    folders = [
        path.parent if re.fullmatch(r"(seed|run)[-_]?\d+", path.name) else path
        for path in run_folders
    ]
    if len(set(folders)) < len(folders):
        return [runs[0].name for runs in members]
    # the name of an evaluation contains its run's
    return [
        max(name, runs[0].name, key=len) if folder == run_folder else name
        for name, folder, run_folder, runs in zip(
            _short_names(folders), folders, run_folders, members, strict=True
        )
    ]


def _short_value(key: str, value: Any) -> str:
    """A value as a part of a name: without its key if it speaks for itself."""
    if isinstance(value, str) and re.search("[a-zA-Z]", value):
        return Path(value).name if "/" in value else value
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{key.rpartition('.')[2]} {text or 'none'}"
