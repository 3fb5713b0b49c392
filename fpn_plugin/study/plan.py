"""The planned runs of a study: their configs, their folders, and the state of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Sequence

from detectron2.config import CfgNode

from fpn_plugin import plugins
from fpn_plugin.checkpoint.run_folder import (
    OUTER_KEYS,
    RESULT_KEY,
    metric_lines,
    recorded_config,
)
from fpn_plugin.config.resolve import as_recorded
from fpn_plugin.data.coco_format import register_own
from fpn_plugin.engine.run_folder import config_changes, run_results
from fpn_plugin.modeling.described import PYTHON_OUTER_KEYS, changed_values, load_model_config
from fpn_plugin.modeling.python_config import PARTS, attached, is_python_config
from fpn_plugin.registry import unknown_name
from fpn_plugin.study.config import NamedConfig, Study, StudyError

FINAL = "model_final.pth"
PENDING, INTERRUPTED, DONE, OTHER = "to do", "broken off", "done", "another config's"


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One training of a study, which equals no other.

    Attributes:
        folder: its OUTPUT_DIR.
        cfg: the whole config.
    """

    config: NamedConfig
    seed: int
    folder: Path
    cfg: CfgNode

    @property
    def title(self) -> str:
        return f"{self.config.name} seed {self.seed}"

    @property
    def max_iterations(self) -> int:
        return self.cfg.SOLVER.MAX_ITER

    @property
    def wants_gpu(self) -> bool:
        """Whether its config asks for a GPU, be there one on this machine or not."""
        return as_recorded(self.cfg).MODEL.DEVICE.startswith("cuda")

    def arguments(self) -> list[str]:
        """The arguments of `fpn train`, without --resume."""
        python = attached(self.cfg)
        imports = self.cfg.IMPORTS if python is None else plugins.named()
        config = [*plugins.flags(imports), "--config-file", str(self.config.file)]
        if python is not None:
            words = _python_overrides(self.config.overrides)
            return [*config, *words, f"train.output_dir={self.folder}", f"train.seed={self.seed}"]
        config += self.config.overrides
        return [*config, "OUTPUT_DIR", str(self.folder), "SEED", str(self.seed)]

    def changes(self) -> list[str]:
        """The keys that the folder's run has with other values, as "KEY old -> new"."""
        python = attached(self.cfg)
        if python is not None:
            recorded = recorded_config(str(self.folder))
            changes = changed_values(recorded, python, PARTS, PYTHON_OUTER_KEYS)
            return [f"{key} {old!r} -> {new!r}" for key, (old, new) in changes.items()]
        return config_changes(str(self.folder), self.cfg, OUTER_KEYS)

    def state(self) -> str:
        """PENDING, INTERRUPTED, DONE, or OTHER if the folder holds a run of another config."""
        if not run_results(str(self.folder)):
            return PENDING
        if self.changes():
            return OTHER
        evaluated = (self.folder / FINAL).is_file() and self._is_evaluated()
        return DONE if evaluated else INTERRUPTED

    def reached(self) -> int:
        """The number of iterations in its metrics."""
        lines = metric_lines(str(self.folder))
        return max((int(line.get("iteration", -1)) + 1 for line in lines), default=0)

    def _is_evaluated(self) -> bool:
        """Whether metrics.json has results from after the last iteration."""
        lines = metric_lines(str(self.folder))
        last = [line for line in lines if line.get("iteration", -1) >= self.max_iterations - 1]
        return any(RESULT_KEY.search(key) for line in last for key in line)


def plan_runs(study: Study, only: Sequence[str] = ()) -> list[PlannedRun]:
    """Plan the runs in their order: all configs with the first seed, then with the next.

    Args:
        only: names of configs; none: all.

    Raises:
        KeyError: for a name or a config key that does not exist.
        ValueError: for a config that cannot be trained and evaluated, or is tested on other data
            than another, naming it.
    """
    names = [config.name for config in study.configs]
    for name in only:
        if name not in names:
            raise unknown_name("--only", name, names)
    chosen = [config for config in study.configs if not only or config.name in only]
    cfgs = {config.name: _load_cfg(config) for config in chosen}
    _check_test_sets(cfgs)
    runs = []
    for seed in study.seeds:
        for config in chosen:
            cfg = cfgs[config.name].clone()
            cfg.SEED = seed
            folder = study.output / config.name / f"seed-{seed}"
            runs.append(PlannedRun(config, seed, folder, cfg))
    return runs


def check_folders(runs: Sequence[PlannedRun]) -> None:
    """Refuse folders that hold runs of other configs, before anything starts.

    Raises:
        ValueError: naming the folders, and the keys with both values.
    """
    others = [f"  {run.folder}: {'; '.join(run.changes())}" for run in runs if run.state() == OTHER]
    if others:
        raise StudyError(
            "these folders hold runs with another config than the study asks for:\n"
            + "\n".join(others)
            + "\nNothing was started. Give another --output, or move the folders away"
        )


def _load_cfg(config: NamedConfig) -> CfgNode:
    """The config as `fpn train` resolves it."""
    where = f"runs.{config.name}"
    for key in ("OUTPUT_DIR", "SEED", "train.output_dir", "train.seed"):
        if key in config.overrides[::2]:
            raise StudyError(f"{where}: {key} is the study's to set (output, seeds)")
    file, overrides = str(config.file), config.overrides
    opts = _python_overrides(overrides) if is_python_config(file) else overrides
    try:
        cfg = register_own(load_model_config(file, opts))
    except (KeyError, ValueError, FileNotFoundError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        raise StudyError(f"{where}: {text}") from error
    for key in ("TRAIN", "TEST"):
        if not cfg.DATASETS[key]:
            raise StudyError(f"{where}: DATASETS.{key} is empty: a study trains and evaluates")
    return cfg


def _python_overrides(overrides: Sequence[str]) -> list[str]:
    """`KEY VALUE` pairs as a Python config takes them."""
    return [f"{key}={value}" for key, value in zip(overrides[::2], overrides[1::2])]


def _check_test_sets(cfgs: Mapping[str, CfgNode]) -> None:
    tested: dict[tuple[str, str], str] = {}
    for name, cfg in cfgs.items():
        tested.setdefault((cfg.DATASETS.TEST[0], cfg.DATASETS.OWN.VAL_JSON), name)
    if len(tested) > 1:
        listed = ", ".join(
            f"runs.{name} on {' '.join(filter(None, test_set))}"
            for test_set, name in tested.items()
        )
        raise StudyError(f"runs are tested on different data, which cannot be compared: {listed}")
