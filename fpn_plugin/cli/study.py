"""Train a matrix of configs and seeds, one after the other, and compare the results.

fpn study STUDY.yaml [--dry-run]               configs/studies has some
fpn study STUDY.yaml --output DIR --seeds 0,1 --only fpn,bifpn SOLVER.MAX_ITER 100

Run again it skips what is done and goes on with what was broken off. A folder that holds a run with
another config is refused before anything starts. The report is in OUTPUT/report.

Exit code 1: a run failed; 130: it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from pathlib import Path
from typing import Sequence

from fpn_plugin.cli.arguments import OVERRIDES_HELP, command_parser, parse
from fpn_plugin.report.progress import TrainingProgress
from fpn_plugin.study import execute
from fpn_plugin.study.config import Study, parse_seeds, read_study
from fpn_plugin.study.plan import plan_runs


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("study", __doc__)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.yaml", help="a file, or a name: studies/trees.yaml")
    add("--output", type=Path, metavar="DIR", help="instead of the study's")
    add("--only", default="", metavar="NAME,…", help="these runs of the study")
    add("--seeds", default="", metavar="N,…", help="instead of the study's")
    add("--dry-run", action="store_true", help="print what is done and what would be run")
    add("--quiet", action="store_true", help="no progress")
    add("opts", nargs="*", metavar="KEY VALUE", help=f"of every run: {OVERRIDES_HELP}")
    return parse(parser, argv)


def study_of(args: argparse.Namespace) -> Study:
    study = read_study(args.study, args.opts)
    changes = {"output": args.output, "seeds": parse_seeds("--seeds", args.seeds)}
    return dataclasses.replace(study, **{key: value for key, value in changes.items() if value})


def run(args: argparse.Namespace) -> int:
    execute.quiet_loggers()
    study = study_of(args)
    runs = plan_runs(study, [name for name in args.only.split(",") if name])
    progress = TrainingProgress(args.quiet)
    if args.dry_run:
        print(execute.status_text(runs))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    try:
        outcome = execute.run_study(study, runs, progress)
        if outcome.done:
            page = execute.compare_runs(study, outcome.done, args.quiet)
            print(f"The report is in {page}")
    except KeyboardInterrupt:
        print("Interrupted; run it again to go on", file=sys.stderr)
        return 130
    for name, text in outcome.failures.items():
        print(f"FAILED {name}: {text}", file=sys.stderr)
    return 1 if outcome.failures else 0
