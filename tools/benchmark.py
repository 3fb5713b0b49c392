#!/usr/bin/env python3
"""Measure configs side by side: costs, speed against Detectron2's baseline, equality of outputs.

benchmark.py --config-file configs/… [--config-file …] [--baseline FILE|zoo-name|none]
    [--what counts,neck,backbone,inference,train] [--report DIR] [KEY VALUE …]
benchmark.py --config-file F --variant 'bf16: SOLVER.AMP.ENABLED True' …     levers, each alone
benchmark.py --config-file F --baseline none --what counts --compare old.json

Exit code 1: a count grew beyond --threshold; 2: a ratio was refused, or outputs differ.
"""

import os

# before torch is imported: its OpenMP workers otherwise spin, which starves a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# the profiler that memory is measured with otherwise writes a greeting to stderr
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import sys  # noqa: E402

from fpn_plugin.benchmark.measure import benchmark  # noqa: E402
from fpn_plugin.benchmark.options import argument_parser, settings_of  # noqa: E402
from fpn_plugin.benchmark.report import (  # noqa: E402
    check_folder,
    compare_reports,
    read_report,
    terminal_text,
    write_report,
)
from fpn_plugin.report.progress import Bar  # noqa: E402


def main() -> int:
    args = argument_parser(__doc__ or "").parse_args()
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
    return 2 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
