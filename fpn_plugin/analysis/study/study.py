"""Work a study off: what is done is skipped, what was broken off goes on, then all is compared."""

from __future__ import annotations

import logging
import shlex
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Sequence

from fpn_plugin.analysis.study.execute import (
    lock,
    remove_earlier_checkpoints,
    train,
)
from fpn_plugin.analysis.study.record import read_record
from fpn_plugin.analysis.study.runs import BROKEN_OFF, DONE, OTHER, Run, check_folders
from fpn_plugin.analysis.study.show import Display, Watcher, span
from fpn_plugin.analysis.study.study_file import REPORT, Study


@dataclass
class Outcome:
    """How a study ended.

    Attributes:
        done: the runs that can be compared.
        failures: the runs that failed, with the end of their output.
        report: of the comparison, if there was one.
    """

    done: list[Run] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    report: Path | None = None


def hush() -> None:
    """Keep what loading a config logs from the study's own output; each run logs it again."""
    for name in ("fpn_plugin", "detectron2", "fvcore"):
        logging.getLogger(name).setLevel(logging.ERROR)


def status_text(runs: Sequence[Run], script: Path) -> str:
    """Every run with its state, its command, and the keys that stand in the way."""
    lines = []
    for run in runs:
        state = run.state()
        if state == BROKEN_OFF:
            state = f"{state} at {run.reached()} of {run.iterations}"
        lines.append(f"{run.title}: {state}")
        if state == OTHER:
            lines += [f"  {change}" for change in run.changes()]
        elif state != DONE:
            lines.append(f"  {shlex.join([str(script), *run.arguments()])}")
    return "\n".join(lines)


def run_study(study: Study, runs: Sequence[Run], script: Path, display: Display) -> Outcome:
    """Train what is not done yet, one after the other.

    Args:
        runs: of :func:`plan`.
        script: tools/train_net.py.

    Raises:
        ValueError: if a folder holds a run of another config, or another study is at work there;
            nothing was started then.
    """
    check_folders(runs)
    outcome = Outcome()
    with lock(study.output) as held:
        waiting = [run for run in runs if run.state() != DONE]
        finished = [run for run in runs if run not in waiting]
        display.say(f"{len(runs)} runs in {study.output}, {len(finished)} of them done")
        for number, run in enumerate(runs, 1):
            if run in finished:
                outcome.done.append(run)
                continue
            waiting.remove(run)
            title = f"run {number} of {len(runs)}, {run.title}"
            rest = _rest(run, [*finished, *outcome.done], list(waiting))
            watcher = Watcher(display, title, run.iterations, rest)
            going_on = f", going on at {run.reached()}" if run.state() == BROKEN_OFF else ""
            display.say(f"{title}: {run.iterations} iterations{going_on}")
            try:
                seconds = train(run, script, watcher.see, held)
            except RuntimeError as error:
                outcome.failures[run.title] = str(error)
                display.say(f"{title}: FAILED, its log is {run.folder}/log.txt")
                continue
            _finish(study, run, seconds, title, outcome, display)
    return outcome


def _finish(
    study: Study, run: Run, seconds: float, title: str, outcome: Outcome, display: Display
) -> None:
    if run.state() != DONE:
        outcome.failures[run.title] = (
            f"it ended without a final checkpoint or an evaluation: {run.folder}"
        )
        return
    outcome.done.append(run)
    display.say(f"{title}: done in {span(seconds)}")
    if not study.keep_checkpoints:
        remove_earlier_checkpoints(run)


def _rest(run: Run, done: Sequence[Run], waiting: Sequence[Run]) -> Callable[[float], float]:
    """The seconds that the runs after one will take, from its own and those that are done.

    A config takes as long as with another seed; one that has not run yet, as long as the mean.
    """
    known = {
        one.entry.name: seconds
        for one in done
        if (seconds := read_record(one.folder).get("seconds"))
    }

    def rest(seconds: float) -> float:
        times = {run.entry.name: seconds, **known}
        mean = statistics.mean(times.values())
        return sum(times.get(one.entry.name, mean) for one in waiting)

    return rest


def compare_runs(study: Study, outcome: Outcome, quiet: bool) -> None:
    """Compare what is done; the report goes into the study's folder."""
    from fpn_plugin.analysis.compare.compare import compare

    # by its folder: the report may have another name for the config
    baselines = [str(run.folder) for run in outcome.done if run.entry.name == study.baseline]
    outcome.report = compare(
        [str(run.folder) for run in outcome.done],
        str(study.output / REPORT),
        size_bins=study.size_bins,
        baseline=baselines[0] if baselines else "",
        overwrite=True,
        quiet=quiet,
    )
