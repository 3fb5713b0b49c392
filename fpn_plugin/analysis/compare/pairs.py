"""Every config against every other: AP on the same draws of images."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Mapping, Sequence

import numpy as np

from fpn_plugin.analysis.compare.bootstrap import ap_of_draws, difference, draw_images
from fpn_plugin.analysis.compare.groups import Group
from fpn_plugin.analysis.compare.scores import Score, Scores
from fpn_plugin.analysis.report.bar import Bar


def compare_pairs(
    groups: Sequence[Group], scores: Scores, report: Mapping[str, Any], bar: Bar
) -> dict[str, Any]:
    """By task and two groups, the first's difference to the second."""
    draws = draw_images(report["images"], report["resamples"])
    means = {facts["name"]: facts["metrics"] for facts in report["groups"]}
    found: dict[str, Any] = {}
    for task in report["tasks"]:
        able = {
            group.name: [scores[run.name][task] for run in group.runs]
            for group in groups
            if all(task in scores.get(run.name, {}) for run in group.runs)
        }
        if len(able) < 2:
            continue
        aps = _ap_of_groups(able, draws, task, bar)
        values = {name: means[name][f"{task}/AP"]["mean"] for name in able}
        found[task] = {
            one: {
                other: _pair(values[one] - values[other], aps[one], aps[other])
                for other in aps
                if other != one
            }
            for one in aps
        }
    return found


def _ap_of_groups(
    groups: Mapping[str, Sequence[Score]], draws: np.ndarray, task: str, bar: Bar
) -> dict[str, np.ndarray]:
    """The mean AP of each group's runs on each draw."""
    done = 0
    bar.begin(f"bootstrap, {task}", len(draws) * sum(map(len, groups.values())))
    aps = {}
    for name, scores in groups.items():
        of = []
        for score in scores:

            def step(number: int, start: int = done) -> None:
                bar.step(start + number)

            of.append(ap_of_draws(score.matches, draws, step))
            done += len(draws)
        aps[name] = np.mean(of, axis=0)
    return aps


def _pair(value: float, ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    found = difference(value, ours, theirs)
    return {**asdict(found), "told": found.told}
