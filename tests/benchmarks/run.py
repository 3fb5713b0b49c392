#!/usr/bin/env python3
"""Prove this repository's claims of speed: tools/benchmark.py, and what only its developers need.

run.py --config-file F --what neck --peers effdet,detectron2,torchvision    other packages' pyramids
run.py --config-file F --what counts,neck,backbone --floors                 what bounds their time
run.py --config-file F --what counts --sweep width,size                     how cost grows
run.py --startup                                      importing the plugin, and Detectron2

All options of tools/benchmark.py hold here too, but --compare. Exit code 2: a ratio was refused, or
outputs differ.
"""

import os

# before torch is imported: see tools/benchmark.py
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import argparse  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Mapping  # noqa: E402

from floors import add_convolutions, add_floors, ceilings, floors_table  # noqa: E402
from peers import PEERS, PeersOfModels  # noqa: E402
from startup import STARTUP, TITLE, measure_startup  # noqa: E402
from sweeps import SWEEPS, check_sweep, draw_sweeps, sweep, sweeps_table  # noqa: E402

from fpn_plugin.benchmark.configs import gather_configs  # noqa: E402
from fpn_plugin.benchmark.inputs import Inputs  # noqa: E402
from fpn_plugin.benchmark.measure import Section, Settings, benchmark  # noqa: E402
from fpn_plugin.benchmark.models import BenchmarkModel  # noqa: E402
from fpn_plugin.benchmark.options import (  # noqa: E402
    argument_parser,
    plan_of,
    settings_of,
    split_names,
)
from fpn_plugin.benchmark.report import (  # noqa: E402
    check_folder,
    terminal_text,
    write_report,
)
from fpn_plugin.benchmark.tables import timing_tables  # noqa: E402
from fpn_plugin.report.progress import Bar  # noqa: E402
from fpn_plugin.report.tables import Table  # noqa: E402


def main() -> int:
    args = parse_args()
    if args.report:
        check_folder(args.report, args.overwrite)
    report = measure(args, Bar(args.quiet))
    tables = extra_tables(report)
    print(terminal_text(report, tables))
    if args.report:
        plots = draw_sweeps(report["sweeps"], Path(args.report))
        print(f"\nThe report is in {write_report(report, args.report, tables, plots)}")
    return 2 if report["failures"] else 0


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__ or "")
    text = f"pyramids of other packages beside the neck: {', '.join(PEERS.names())}"
    parser.add_argument("--peers", default="", metavar="A,B", help=text)
    text = "measure the machine's rates, and each pyramid's convolutions alone"
    parser.add_argument("--floors", action="store_true", help=text)
    text = f"how cost grows with {', '.join(SWEEPS)}"
    parser.add_argument("--sweep", default="", metavar="A,B", help=text)
    text = "importing in fresh processes; needs no --config-file"
    parser.add_argument("--startup", action="store_true", help=text)
    args = parser.parse_args()
    if args.compare:
        parser.error("--compare: tools/benchmark.py does that")
    return args


def measure(args: argparse.Namespace, bar: Bar) -> dict[str, Any]:
    """The report of tools/benchmark.py with "sweeps" and "startup" in it.

    Raises:
        KeyError, ValueError: naming the option.
        ImportError: naming what to install for a peer.
    """
    peers = PeersOfModels(split_names("--peers", args.peers, PEERS.names()))
    kinds = split_names("--sweep", args.sweep, list(SWEEPS))
    if args.startup and not args.config_file:
        settings = Settings(files=(), what=(), plan=plan_of(args))
    else:
        settings = settings_of(args)
    swept = gather_configs(settings.files, settings.opts, (), "none", (), settings.device)
    for kind in kinds:
        for config in swept:
            check_sweep(kind, config)

    def extend(section: Section, models: Mapping[str, BenchmarkModel], inputs: Inputs) -> None:
        if args.floors:
            add_convolutions(section, models, inputs)
        peers.add_to(section, models, inputs)

    rates = ceilings(settings.device) if args.floors else {}
    report = benchmark(settings, bar, extend)
    report["notes"] += peers.notes
    add_floors(report, rates)
    inputs = Inputs(settings.size, settings.batch, settings.device, settings.seed)
    report["sweeps"] = []
    for kind in kinds:
        for config in swept:
            bar.begin(f"sweep {kind}: {config.name}", settings.plan.rounds)
            report["sweeps"].append(sweep(kind, config, inputs, settings.plan, bar.step))
    if args.startup:
        bar.begin(STARTUP, settings.plan.rounds)
        report[STARTUP] = measure_startup(settings.plan, bar.step)
        report["failures"] += report[STARTUP].pop("failures")
    bar.end()
    return report


def extra_tables(report: Mapping[str, Any]) -> list[Table]:
    """What tools/benchmark.py does not measure."""
    floors = floors_table(report)
    tables = [floors] if floors.rows else []
    if report["sweeps"]:
        tables.append(sweeps_table(report["sweeps"]))
    if STARTUP in report:
        tables += timing_tables(TITLE, report[STARTUP])
    return tables


if __name__ == "__main__":
    sys.exit(main())
