"""Runs of one config, and what the configs differ in."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from fpn_plugin.analysis.benchmark.configs import short_names
from fpn_plugin.analysis.compare.runs import Run
from fpn_plugin.engine.run_folder import OUTER_KEYS

# what makes no other detector; an evaluation's weights and seed are those of its run
_FREE = ("SEED", "VERSION", "TEST.EVAL_PERIOD", *OUTER_KEYS)
_LONGEST = 32  # letters of a name that is made of the values that differ


@dataclass(frozen=True)
class Group:
    """Runs of one config, apart from the seed.

    Attributes:
        name: unique among the groups.
    """

    name: str
    runs: tuple[Run, ...]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """The runs by their configs, in the order in which these come first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(_compared(run), sort_keys=True), []).append(run)
    members = list(found.values())
    return [Group(name, tuple(of)) for name, of in zip(_names(members), members, strict=True)]


def config_differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """By key, the value of each group; only keys in which the groups differ."""
    return _differences([group.runs for group in groups])


def find_group(name: str, groups: Sequence[Group]) -> Group:
    """The group of a name, or with a run of that folder.

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


def _compared(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key not in _FREE}


def _differences(members: Sequence[Sequence[Run]]) -> dict[str, list[Any]]:
    configs = [_compared(of[0]) for of in members]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [config.get(key) for config in configs] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _names(members: Sequence[Sequence[Run]]) -> list[str]:
    """What a study calls them, or the values that differ where these are short, or the folders."""
    entries = [" + ".join(dict.fromkeys(run.entry for run in of)) for of in members]
    if all(entries) and len(set(entries)) == len(entries):
        return entries
    differing = _differences(members)
    names = [
        " + ".join(_short(key, row[i]) for key, row in differing.items())
        for i in range(len(members))
    ]
    if all(0 < len(name) <= _LONGEST for name in names) and len(set(names)) == len(names):
        return names
    folders = [of[0].folder.resolve() for of in members]
    # "seed-0" says nothing of the config
    folders = [
        path.parent if re.fullmatch(r"(seed|run)[-_]?\d+", path.name) else path for path in folders
    ]
    if len(set(folders)) < len(folders):
        return [of[0].name for of in members]
    names = short_names([f"{path}.run" for path in folders])
    # an evaluation's has its run's in it
    return [
        max(name, of[0].name, key=len) if path == of[0].folder.resolve() else name
        for name, path, of in zip(names, folders, members, strict=True)
    ]


def _short(key: str, value: Any) -> str:
    """A value as a part of a name: alone where it speaks for itself."""
    last = key.rpartition(".")[2]
    if isinstance(value, str) and re.search("[a-zA-Z]", value):
        return Path(value).name if "/" in value else value
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{last} {text or 'none'}"


def text_of(value: Any) -> str:
    """A config's value in a table."""
    return value if isinstance(value, str) and value else json.dumps(value)


def seeds(runs: Sequence[Run]) -> Mapping[int, int]:
    """How many runs have each seed; one that was not set (below 0) is another one each time."""
    return Counter(run.seed for run in runs if run.seed >= 0)
