#!/usr/bin/env python3
"""Export every config in every format with random weights, compare each file with its model, and
write the table of docs/export.md.

export_table.py --output output/export.md configs/quickstart/faster_rcnn_trees_*.yaml
export_table.py --operators --output operators.md configs/quickstart/faster_rcnn_trees_FPN.yaml
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

from checkout import use_package

use_package()

import fpn_plugin  # noqa: E402, F401  (registers the builders and the datasets)
from fpn_plugin.export.export_table import Case, measure, operator_cases  # noqa: E402
from fpn_plugin.export.formats import FORMATS  # noqa: E402
from fpn_plugin.report.progress import Bar  # noqa: E402


def parse_args() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("configs", nargs="+", metavar="FILE", help="config files")
    add("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS), help="default: all")
    add("--operators", action="store_true", help="each operator in these configs instead")
    add("--output", required=True, type=Path, metavar="FILE", help="Markdown; grows as it goes")
    add(
        "--opts", nargs="+", default=(), metavar="KEY VALUE", help="config overrides, of every case"
    )
    add("--time-limit", type=int, default=900, metavar="S", help="per export (default: 900)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cases = [Case(Path(path).stem, path, args.opts) for path in args.configs]
    if args.operators:
        cases = [case for path in args.configs for case in operator_cases(path, args.opts)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for table in measure(cases, args.formats, args.time_limit, Bar()):
        args.output.write_text(table.text("github") + "\n")
    print(args.output)


if __name__ == "__main__":
    sys.exit(main())
