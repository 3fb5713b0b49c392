"""Train a matrix of configs and seeds, and compare the results.

fpn study STUDY.yaml [--dry-run]               configs/studies has some
fpn study STUDY.yaml --output DIR --seeds 0,1 --only fpn,bifpn SOLVER.MAX_ITER 100
fpn study STUDY.yaml --jobs 4                  four at once: a GPU each, or a quarter of the cores
fpn study STUDY.yaml --jobs 4 --cores 2        … or two cores each
fpn study STUDY.yaml --launcher slurm --slurm-partition gpu --slurm-time 4:00:00
                                               a job of SLURM for each run; any option of sbatch

Run again it skips what is done and goes on with what was broken off. A run that is lost (killed, or
its machine gone) is started again. A folder that holds a run with another config is refused before
anything starts. The report is in OUTPUT/report; --report-only makes it of what is done by now.

Exit code 1: a run failed; 130: it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import signal
import sys
from pathlib import Path
from typing import Sequence

from fpn_plugin.cli.arguments import OVERRIDES_HELP, command_parser, parse, split_overrides
from fpn_plugin.report.progress import RunsProgress
from fpn_plugin.study import execute
from fpn_plugin.study.cluster import ClusterLauncher
from fpn_plugin.study.config import Study, StudyError, parse_seeds, read_study
from fpn_plugin.study.launchers import Launcher, LocalLauncher
from fpn_plugin.study.plan import DONE, plan_runs

_LOCAL, _SLURM = "local", "slurm"
_OPTION = re.compile(r"--slurm-([a-z][a-z-]*)(?:=(.*))?", re.DOTALL)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("study", __doc__)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.yaml", help="a file, or a name: studies/trees.yaml")
    add("--output", type=Path, metavar="DIR", help="instead of the study's")
    add("--only", default="", metavar="NAME,…", help="these runs of the study")
    add("--seeds", default="", metavar="N,…", help="instead of the study's")
    text = "runs at work at once (default: 1; with --launcher slurm as many as SLURM lets)"
    add("--jobs", type=_count, default=0, metavar="N", help=text)
    text = "of the CPU for each run; with the same number, runs on a CPU give the same numbers"
    add("--cores", type=_count, default=0, metavar="K", help=text)
    text = "where runs are trained: this machine, or jobs of SLURM (default: %(default)s)"
    add("--launcher", choices=[_LOCAL, _SLURM], default=_LOCAL, help=text)
    text = "an option of sbatch for each job, --slurm-mem 32G, or --slurm-exclusive (repeatable)"
    add("--slurm-OPTION", metavar="VALUE", help=text)  # taken out by _split_slurm
    add("--report-only", action="store_true", help="compare the runs that are done, start none")
    add("--dry-run", action="store_true", help="print what is done and what would be run")
    add("--quiet", action="store_true", help="no progress")
    add("opts", nargs="*", metavar="KEY VALUE", help=f"of every run: {OVERRIDES_HELP}")
    words, pairs = split_overrides(argv)
    words, slurm = _split_slurm(words)
    args = parse(parser, [*words, *pairs])
    args.slurm = slurm
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _split_slurm(words: Sequence[str]) -> tuple[list[str], dict[str, str | bool]]:
    """Take `--slurm-OPTION VALUE` out of a command line: the other words, and values by option.

    An option before another flag or at the end has no value.
    """
    words, others, options = list(words), [], {}
    while words:
        word = words.pop(0)
        if not (match := _OPTION.fullmatch(word)):
            others.append(word)
        elif match[2] is not None:
            options[match[1]] = match[2]
        else:
            has_value = bool(words) and not words[0].startswith("--")
            options[match[1]] = words.pop(0) if has_value else True
    return others, options


def study_of(args: argparse.Namespace) -> Study:
    study = read_study(args.study, args.opts)
    changes = {"output": args.output, "seeds": parse_seeds("--seeds", args.seeds)}
    return dataclasses.replace(study, **{key: value for key, value in changes.items() if value})


def launcher_of(args: argparse.Namespace, study: Study) -> Launcher:
    """What starts the runs.

    Raises:
        ValueError: for options that do not fit together.
    """
    if args.launcher == _SLURM:
        return ClusterLauncher(study.output, execute.TRAIN, args.jobs, args.cores, args.slurm)
    if args.slurm:
        option = next(iter(args.slurm))
        raise StudyError(f"--slurm-{option} is for --launcher slurm, and this is --launcher local")
    return LocalLauncher(execute.TRAIN, args.jobs or 1, args.cores)


def run(args: argparse.Namespace) -> int:
    execute.quiet_loggers()
    study = study_of(args)
    runs = plan_runs(study, [name for name in args.only.split(",") if name])
    if args.dry_run:
        print(execute.status_text(runs))
        return 0
    if args.report_only:
        _report(study, args.quiet, execute.Outcome([run for run in runs if run.state() == DONE]))
        return 0
    launcher = launcher_of(args, study)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    try:
        outcome = execute.run_study(study, runs, RunsProgress(args.quiet), launcher)
        if outcome.done:
            _report(study, args.quiet, outcome)
    except KeyboardInterrupt:
        print(launcher.farewell, file=sys.stderr)
        return 130
    for name, text in outcome.failures.items():
        print(f"FAILED {name}: {text}", file=sys.stderr)
    return 1 if outcome.failures else 0


def _report(study: Study, quiet: bool, outcome: execute.Outcome) -> None:
    if not outcome.done:
        raise StudyError(f"--report-only: no run in {study.output} is done yet")
    page = execute.compare_runs(study, outcome.done, quiet)
    print(f"The report is in {page}")
