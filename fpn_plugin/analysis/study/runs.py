"""The runs of a study: their configs, their folders, and how far each is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Sequence

from detectron2.config import CfgNode

from fpn_plugin.analysis.study.study_file import Entry, Study, StudyError
from fpn_plugin.config import load_config
from fpn_plugin.data.coco_format import register_own
from fpn_plugin.engine.run_record import (
    OUTER_KEYS,
    RESULT_KEY,
    config_changes,
    metric_lines,
    run_results,
)
from fpn_plugin.engine.setup import argument_parser, choose_device
from fpn_plugin.registry import unknown_name

FINAL = "model_final.pth"
PENDING, BROKEN_OFF, DONE, OTHER = "to do", "broken off", "done", "another config's"
# the metrics that Detectron2's evaluators give; with several test sets the set's name stands first


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        entry: the config of the study.
        folder: its OUTPUT_DIR.
        cfg: what it is trained with.
    """

    entry: Entry
    seed: int
    folder: Path
    cfg: CfgNode

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.entry.name} seed {self.seed}"

    @property
    def iterations(self) -> int:
        """Of the whole training."""
        return self.cfg.SOLVER.MAX_ITER

    def arguments(self) -> list[str]:
        """Of tools/train_net.py, without --resume."""
        own = ["OUTPUT_DIR", str(self.folder), "SEED", str(self.seed)]
        return ["--config-file", str(self.entry.config), *self.entry.overrides, *own]

    def changes(self) -> list[str]:
        """What the folder's run was trained with otherwise."""
        return config_changes(str(self.folder), self.cfg, OUTER_KEYS)

    def state(self) -> str:
        """PENDING, BROKEN_OFF, DONE, or OTHER if its folder holds the run of another config."""
        if not run_results(str(self.folder)):
            return PENDING
        if self.changes():
            return OTHER
        evaluated = (self.folder / FINAL).is_file() and self._evaluated()
        return DONE if evaluated else BROKEN_OFF

    def reached(self) -> int:
        """The iterations that its metrics tell of."""
        lines = metric_lines(str(self.folder))
        return max((int(x.get("iteration", -1)) + 1 for x in lines), default=0)

    def _evaluated(self) -> bool:
        """Whether the evaluation after the last iteration left its numbers."""
        lines = metric_lines(str(self.folder))
        last = [x for x in lines if x.get("iteration", -1) >= self.iterations - 1]
        return any(RESULT_KEY.search(key) for line in last for key in line)


def plan(study: Study, only: Sequence[str] = ()) -> list[Run]:
    """The runs in their order: all configs with the first seed, then with the next.

    Args:
        only: names of entries; none: all.

    Raises:
        KeyError: for a name or a config key that does not exist.
        ValueError: for a config that cannot be trained and evaluated, or is tested on other data
            than another, naming its entry.
    """
    names = [entry.name for entry in study.entries]
    for name in only:
        if name not in names:
            raise unknown_name("--only", name, names)
    chosen = [entry for entry in study.entries if not only or entry.name in only]
    configs = {entry.name: _config(entry) for entry in chosen}
    _check_test_sets(configs)
    return [
        _run(study, entry, seed, configs[entry.name]) for seed in study.seeds for entry in chosen
    ]


def _check_test_sets(configs: Mapping[str, CfgNode]) -> None:
    tested: dict[tuple[str, str], str] = {}
    for name, cfg in configs.items():
        tested.setdefault((cfg.DATASETS.TEST[0], cfg.DATASETS.OWN.VAL_JSON), name)
    if len(tested) > 1:
        told = ", ".join(
            f"runs.{name} on {' '.join(filter(None, of))}" for of, name in tested.items()
        )
        raise StudyError(f"runs are tested on different data, which cannot be compared: {told}")


def _run(study: Study, entry: Entry, seed: int, cfg: CfgNode) -> Run:
    cfg = cfg.clone()
    cfg.SEED = seed
    return Run(entry, seed, study.output / entry.name / f"seed-{seed}", cfg)


def _config(entry: Entry) -> CfgNode:
    """As tools/train_net.py works it out."""
    words = ["--config-file", str(entry.config), *entry.overrides]
    for key in ("OUTPUT_DIR", "SEED"):
        if key in entry.overrides[::2]:
            raise StudyError(f"runs.{entry.name}: {key} is the study's to set (output, seeds)")
    try:
        cfg = register_own(load_config(argument_parser().parse_args(words)))
    except (KeyError, ValueError, FileNotFoundError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        raise StudyError(f"runs.{entry.name}: {text}") from error
    choose_device(cfg)
    for key in ("TRAIN", "TEST"):
        if not cfg.DATASETS[key]:
            raise StudyError(
                f"runs.{entry.name}: DATASETS.{key} is empty: a study trains and evaluates"
            )
    return cfg


def check_folders(runs: Sequence[Run]) -> None:
    """Refuse folders that hold runs of other configs, before anything starts.

    Raises:
        ValueError: naming the folders, and the keys with both values.
    """
    wrong = [run for run in runs if run.state() == OTHER]
    if wrong:
        told = [f"  {run.folder}: {'; '.join(run.changes())}" for run in wrong]
        raise StudyError(
            "these folders hold runs with another config than the study asks for:\n"
            + "\n".join(told)
            + "\nNothing was started. Give another --output, or move the folders away"
        )
