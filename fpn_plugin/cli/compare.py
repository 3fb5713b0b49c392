"""Compare training runs: AP, costs, and which differences are significant.

fpn compare RUN_DIR … --report DIR [--baseline NAME|RUN_DIR] [--size-bins 8,16,32,64,128,256]
fpn compare RUN_DIR … --report DIR --benchmark output/bench/report.json    with latencies

Runs of one config with several seeds are grouped. Intervals are over images, by a paired bootstrap,
and over seeds where both configs have several.
"""

from __future__ import annotations

import argparse
from typing import Sequence

from fpn_plugin.cli.arguments import command_parser
from fpn_plugin.compare.comparison import compare


def _edges(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("compare", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_DIR", help="an OUTPUT_DIR, or an eval-N in one")
    add("--report", required=True, metavar="DIR", help="for the page, Markdown, CSV and JSON")
    add("--benchmark", default="", metavar="FILE", help="report.json of fpn benchmark")
    add("--size-bins", type=_edges, default=[], metavar="A,B,…", help="sides in pixels")
    add("--baseline", default="", metavar="NAME|DIR", help="by default the first run's config")
    add("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (1000)")
    add("--overwrite", action="store_true", help="replace the comparison that DIR holds")
    add("--quiet", action="store_true", help="print no tables and no progress")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    page = compare(
        args.runs,
        args.report,
        benchmark=args.benchmark,
        size_bins=args.size_bins,
        baseline=args.baseline,
        resamples=args.resamples,
        overwrite=args.overwrite,
        quiet=args.quiet,
    )
    print(f"\nThe comparison is in {page}")
