"""Measure configs side by side: costs, speed, equality of outputs.

fpn benchmark --config-file configs/… [--config-file …] [--baseline FILE|zoo-name|none]
    [--what counts,neck,backbone,inference,train] [--report DIR] [KEY VALUE …]
fpn benchmark --config-file F --variant 'bf16: SOLVER.AMP.ENABLED True' …     levers, each alone
fpn benchmark --config-file F --baseline none --what counts --compare old.json

Exit code 1: a count grew beyond --threshold; 3: a ratio was refused, or outputs differ.
"""

from __future__ import annotations

import argparse
import sys
from typing import Sequence

from fpn_plugin.benchmark.measure import benchmark
from fpn_plugin.benchmark.options import argument_parser, settings_of
from fpn_plugin.benchmark.report import (
    check_folder,
    compare_reports,
    read_report,
    terminal_text,
    write_report,
)
from fpn_plugin.cli.arguments import add_common_flags, parse
from fpn_plugin.report.progress import Bar


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__ or "")
    parser.prog = "fpn benchmark"
    add_common_flags(parser)
    return parse(parser, argv)


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    old = read_report(args.compare) if args.compare else None
    if args.report:
        check_folder(args.report, args.overwrite)
    report = benchmark(settings, Bar(args.quiet))
    print(terminal_text(report))
    if args.report:
        print(f"\nThe report is in {write_report(report, args.report)}")
    if old is not None:
        regressions, warnings = compare_reports(old, report, args.threshold)
        for text in warnings:
            print(f"WARNING {text}")
        for text in regressions:
            print(f"REGRESSION {text}", file=sys.stderr)
        if regressions:
            return 1
    return 3 if report["failures"] else 0
