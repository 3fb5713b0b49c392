"""Progress on a terminal and elsewhere: a tool's stages, and a training run seen from outside."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence, TextIO

from tabulate import tabulate
from tqdm import tqdm

from fpn_plugin.report.mistakes import printed_mistake

_PAUSE = 10.0  # seconds between the lines of a stage, where there is no terminal
_POLL = 0.5  # seconds between two looks at a run's files
_MISTAKE = 2  # a command's exit code
_TAIL = 30  # lines of a failed run's output in the error
_LINES = 10  # of single runs, to one about all
_BARS = 12  # of runs at once on a terminal
_LAYOUT = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}"
_METRICS = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "APs": "AP small (< 32² px)",
    "APm": "AP medium",
    "APl": "AP large (> 96² px)",
}


class Bar:
    """Progress of one stage after another.

    Args:
        quiet: print nothing.
        stream: standard error by default, so that standard output has the report alone.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None
        self._total = 0
        self._began = self._last_line = 0.0  # seconds

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.end()
        if not self._quiet:
            print(text, file=self._stream, flush=True)

    def begin(self, name: str, total: int) -> None:
        """Begin a stage of `total` steps."""
        self.end()
        if self._quiet:
            return
        self._total, self._began = total, time.monotonic()
        self._last_line = self._began
        if self._stream.isatty():
            self._bar = tqdm(total=total, desc=name, file=self._stream, leave=False)
        else:
            print(f"{name} …", file=self._stream, flush=True)

    def step(self, done: int) -> None:
        """Show that `done` steps of the stage are done, which may be more than its `total`."""
        if self._bar is not None:
            self._bar.total = max(self._bar.total, done)
            self._bar.update(done - self._bar.n)
        elif (
            not self._quiet and time.monotonic() - self._last_line >= _PAUSE and done < self._total
        ):
            now = self._last_line = time.monotonic()
            left = timedelta(seconds=round((now - self._began) * (self._total / done - 1)))
            print(f"  {done} of {self._total}, ETA {left}", file=self._stream, flush=True)

    def end(self) -> None:
        """End the stage."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TrainingProgress:
    """Shows iteration, loss and ETA: a tqdm bar on a terminal, plain lines elsewhere.

    Args:
        quiet: show nothing.
        stream: standard error by default.
        interval: seconds between the lines where there is no terminal; 0: a line for each update.
        row: of the bar, from the cursor's downwards; by default below the other bars.
    """

    def __init__(
        self,
        quiet: bool = False,
        stream: TextIO | None = None,
        interval: float = 30.0,
        row: int | None = None,
    ) -> None:
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self.interval = interval
        self._row = row
        self._title, self._total = "", 0
        self._last_line = float("-inf")
        self._bar: tqdm | None = None

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self._quiet:
            tqdm.write(text, file=self._stream)
            self._stream.flush()

    def begin(self, title: str, total: int) -> None:
        """Show a run of `total` iterations from now on."""
        self.end()
        self._title, self._total = title, total
        if not self._quiet and self._stream.isatty():
            self._bar = tqdm(
                desc=title,
                total=total,
                file=self._stream,
                leave=False,
                bar_format=_LAYOUT,
                position=self._row,
            )

    def update(self, metrics: Mapping[str, Any], note: str = "") -> None:
        """Show a line of metrics.json with a loss, and a note behind its ETA."""
        done = int(metrics["iteration"]) + 1
        text = f"loss {metrics['total_loss']:.4g}"
        if done >= self._total:
            text += ", evaluating"
        elif "eta_seconds" in metrics:
            text += f", ETA {as_time(metrics['eta_seconds'])}{note}"
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._last_line >= self.interval:
            self._last_line = time.monotonic()
            self.say(f"{self._title}: iteration {done} of {self._total}, {text}")

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class RunsProgress:
    """Shows several runs at once: below a bar of all of them a bar each on a terminal, plain lines
    elsewhere, as many of them as of one run.

    Args:
        quiet, stream, interval: as of :class:`TrainingProgress`.
    """

    def __init__(
        self, quiet: bool = False, stream: TextIO | None = None, interval: float = 30.0
    ) -> None:
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._interval = interval
        self._shown: dict[str, TrainingProgress] = {}
        self._rows: dict[str, int] = {}
        self._total, self._last_line = 0, 0.0
        self._bar: tqdm | None = None

    def say(self, text: str) -> None:
        """Print a line that stays."""
        TrainingProgress(self._quiet, self._stream).say(text)

    def begin_all(self, total: int) -> None:
        """Show how many of `total` runs are done: in a bar above those of the runs, or in a line
        now and then."""
        self._total, self._last_line = total, time.monotonic()
        if not self._quiet and self._stream.isatty():
            self._bar = tqdm(
                desc="all runs",
                total=total,
                file=self._stream,
                leave=False,
                bar_format=_LAYOUT,
                position=0,
            )

    def update_all(self, done: int, text: str) -> None:
        """Show that `done` runs are done, and a text behind that."""
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(text)
        elif self._total and time.monotonic() - self._last_line >= _LINES * self._interval:
            self._last_line = time.monotonic()
            self.say(f"{done} of {self._total} runs are done, {text}")

    def end_all(self) -> None:
        """Remove all bars."""
        for title in list(self._shown):
            self.end(title)
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._total = 0

    def begin(self, title: str, total: int) -> None:
        """Show a run of `total` iterations from now on, beside the others."""
        first = 0 if self._bar is None else 1
        rows = [row for row in range(first, first + _BARS) if row not in self._rows.values()]
        # where there is no row left, a terminal does not show the run
        quiet = self._quiet or (not rows and self._stream.isatty())
        row = rows[0] if rows else None
        shown = TrainingProgress(quiet, self._stream, row=row)
        self._shown[title] = shown
        if row is not None:
            self._rows[title] = row
        self._share_lines()
        shown.begin(title, total)

    def update(self, title: str, metrics: Mapping[str, Any], note: str = "") -> None:
        """Show a line of a run's metrics.json with a loss, and a note behind its ETA, which the bar
        of all runs has instead where there is one."""
        self._shown[title].update(metrics, note if self._bar is None else "")

    def end(self, title: str) -> None:
        """Remove a run's bar."""
        self._shown.pop(title).end()
        self._rows.pop(title, None)
        self._share_lines()

    def _share_lines(self) -> None:
        """Let all runs together have as many lines as one run has."""
        for shown in self._shown.values():
            shown.interval = self._interval * len(self._shown)


def follow(
    process: subprocess.Popen[Any],
    output: Path,
    metrics: Path,
    on_metrics: Callable[[Mapping[str, Any]], None],
    on_output: Callable[[str], None] = lambda line: None,
) -> None:
    """Follow a training run until it ends.

    Args:
        output: the file that the process writes its output to.
        metrics: metrics.json of the run.
        on_metrics: gets each of its new lines that has a loss.
        on_output: gets each line of the output.

    Raises:
        RuntimeError: with the message of the user's mistake, or the end of its output, if the run
            fails.
    """
    new_output, new_metrics = NewLines(output, 0), NewLines(metrics)
    running = True
    while running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL)
            running = False
        for line in new_output.read():
            on_output(line)
        for values in new_metrics.read_losses():
            on_metrics(values)
    if process.returncode:
        raise RuntimeError(failure_text(process.returncode, output.read_text(errors="replace")))


def failure_text(returncode: int, output: str) -> str:
    """Why a run failed: the message of the user's mistake, or the end of its output."""
    if returncode == _MISTAKE and (mistake := printed_mistake(output)):
        return mistake
    tail = output.splitlines()[-_TAIL:]
    return f"the run ended with exit code {returncode}:\n" + "\n".join(tail)


def show_training(command: Sequence[str], title: str, total: int, metrics: Path) -> None:
    """Run a training in a process, and show its progress and its warnings on standard output.

    Args:
        total: iterations of the training.
        metrics: metrics.json of the run.

    Raises:
        RuntimeError: with the end of its output, if the run fails.
    """
    progress = TrainingProgress(stream=sys.stdout, interval=0)

    def warn(line: str) -> None:
        if re.search(r"\b(WARNING|ERROR)\b", line):
            progress.say(line)

    progress.begin(title, total)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log.txt"), "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            follow(process, Path(log.name), metrics, progress.update, warn)
        finally:
            progress.end()


class NewLines:
    """The lines that are appended to a file, which may not exist yet.

    Args:
        position: in bytes, where to start; the end by default.
    """

    def __init__(self, path: Path, position: int | None = None) -> None:
        self._path = path
        size = path.stat().st_size if path.is_file() else 0
        self._position = size if position is None else position

    def read(self) -> list[str]:
        """The lines since the last call, those that are complete."""
        if not self._path.is_file():
            return []
        with open(self._path, "rb") as file:
            if file.seek(0, 2) < self._position:  # emptied by a run that replaces another
                self._position = 0
            file.seek(self._position)
            content = file.read()
        lines, end, _ = content.rpartition(b"\n")
        self._position += len(lines + end)
        return lines.decode(errors="replace").splitlines()

    def read_losses(self) -> list[dict[str, Any]]:
        """Those of the lines that are a run's metrics with a loss, if the file is metrics.json."""
        losses = []
        for line in self.read():
            # what a killed run left of its last line may stand before; the objects are flat
            with contextlib.suppress(json.JSONDecodeError):
                values = json.loads(line[max(line.rfind("{"), 0) :])
                if "iteration" in values and "total_loss" in values:
                    losses.append(values)
        return losses


def as_time(seconds: float) -> str:
    """h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def ap_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """AP of an evaluation as a table.

    Args:
        scores: by "bbox" and "segm", then by the rows' names, the metrics in percent.
    """
    rows = []
    for task, name in (("bbox", "boxes"), ("segm", "masks")):
        for part, metrics in scores.get(task, {}).items():
            rows.append([f"{name} {part}".strip(), *(f"{metrics[key]:.1f}" for key in _METRICS)])
    return tabulate(rows, headers=["", *_METRICS.values()], disable_numparse=True)
