#!/usr/bin/env python3
"""Compare training runs: AP of boxes and masks, costs, and which differences are significant.

compare_runs.py RUN_DIR … --report DIR [--baseline NAME|RUN_DIR] [--size-bins 8,16,32,64,128,256]
compare_runs.py RUN_DIR … --report DIR --benchmark output/bench/report.json    with latencies

Runs of one config with several seeds are grouped. Intervals are a paired bootstrap over images.
"""

import os

# before torch is imported: its OpenMP workers otherwise spin, which starves a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import warnings  # noqa: E402

for text in ("`torch.jit.script`", "pkg_resources"):  # deprecated; said at each import
    warnings.filterwarnings("ignore", text)

import argparse  # noqa: E402

import fpn_plugin  # noqa: E402, F401  (registers the builders and the datasets)
from fpn_plugin.compare.comparison import compare  # noqa: E402


def _edges(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_DIR", help="an OUTPUT_DIR, or an eval-N in one")
    add("--report", required=True, metavar="DIR", help="for the page, Markdown, CSV and JSON")
    add("--benchmark", default="", metavar="FILE", help="report.json of tools/benchmark.py")
    add("--size-bins", type=_edges, default=[], metavar="A,B,…", help="sides in pixels")
    add("--baseline", default="", metavar="NAME|DIR", help="by default the first run's config")
    add("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (1000)")
    add("--overwrite", action="store_true", help="replace the comparison that DIR holds")
    add("--quiet", action="store_true", help="print no tables and no progress")
    args = parser.parse_args()
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


if __name__ == "__main__":
    main()
