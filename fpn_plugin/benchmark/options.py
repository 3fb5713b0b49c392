"""The command line of `fpn benchmark`."""

from __future__ import annotations

import argparse
from typing import Any, Callable, Sequence

import torch

from fpn_plugin.benchmark.measure import COUNTS, Settings
from fpn_plugin.benchmark.timing import Plan
from fpn_plugin.benchmark.workloads import WORKLOADS
from fpn_plugin.checkpoint.fit import PARTIAL_HELP
from fpn_plugin.registry import unknown_name

WHAT = (COUNTS, *WORKLOADS.names())
DEFAULT_WHAT = "counts,neck,backbone,inference,train"
SPREAD = {"cpu": 0.25, "cuda": 0.1}


def argument_parser(description: str) -> argparse.ArgumentParser:
    """All options, with Detectron2's `KEY VALUE …`."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    _add_configs(parser.add_argument)
    _add_measurements(parser.add_argument)
    _add_reports(parser.add_argument)
    text = "overrides, not for the baseline; of a Python config, which is run: path.key=value"
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help=text)
    return parser


def _add_configs(add: Callable[..., Any]) -> None:
    text = "a config to measure; may be given again"
    add("--config-file", action="append", default=[], metavar="FILE", help=text)
    text = "measure each config with other keys too, such as 'bf16: SOLVER.AMP.ENABLED True'"
    add("--variant", action="append", default=[], metavar="'NAME: KEY VALUE'", help=text)
    text = "a config file, a name of Detectron2's zoo, none (default: the zoo's of the same head)"
    add("--baseline", default="auto", metavar="FILE|NAME", help=text)
    text = "overrides for the baseline, such as 'SOLVER.AMP.ENABLED True' (default: as shipped)"
    add("--baseline-opts", default="", metavar="'KEY VALUE'", help=text)


def _add_measurements(add: Callable[..., Any]) -> None:
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--image-size", nargs=2, type=_positive, default=(800, 1344), metavar=("H", "W"))
    add("--batch", type=_positive, default=1, metavar="N", help="images at a time (default: 1)")
    text = f"of {', '.join(WHAT)} (default: {DEFAULT_WHAT})"
    add("--what", default=DEFAULT_WHAT, metavar="A,B", help=text)
    text = "at least; up to four times as many where ratios are too wide (default: 10)"
    add("--rounds", type=_positive, default=10, metavar="N", help=text)
    text = f"beyond it a ratio is refused (default: {SPREAD['cpu']}, on CUDA {SPREAD['cuda']})"
    add("--max-spread", type=float, metavar="X", help=text)
    text = "seconds of one sample, at least (default: 0.1)"
    add("--min-sample", type=float, default=0.1, metavar="S", help=text)
    add("--weights", default="", metavar="FILE", help="a checkpoint for all (default: from --seed)")
    add("--allow-partial", action="store_true", help=f"--weights: {PARTIAL_HELP}")
    text = "measure AP with these --weights on a registered dataset too, such as trees_val"
    add("--dataset", default="", metavar="NAME", help=text)
    text = "images of --dataset, at most, evenly spread (default: 50)"
    add("--num", type=_positive, default=50, metavar="N", help=text)
    add("--runs", nargs="+", default=[], metavar="DIR", help="training runs, for AP and latency")


def _add_reports(add: Callable[..., Any]) -> None:
    add("--report", default="", metavar="DIR", help="write report.json, .md, .html and PNG there")
    add("--overwrite", action="store_true", help="replace the report that --report holds")
    add("--compare", default="", metavar="OLD.JSON", help="fail if counts grew since that report")
    text = "for --compare: growth that is let pass (default: 0.01; bytes at least 0.1)"
    add("--threshold", type=float, default=0.01, metavar="X", help=text)
    add("--seed", type=int, default=0, metavar="N", help="of weights and inputs (default: 0)")
    add("--quiet", action="store_true", help="no progress")


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of a command line.

    Raises:
        KeyError: for a name that does not exist, with those that do.
        ValueError: for `--device cuda` without a GPU, a negative number, or no config.
    """
    plan = plan_of(args)
    if args.threshold < 0:
        raise ValueError(f"--threshold {args.threshold} is negative")
    what = split_names("--what", args.what, WHAT)
    if not args.config_file:
        raise ValueError("--config-file: none is given")
    return Settings(
        files=args.config_file,
        opts=args.opts,
        variants=args.variant,
        baseline=args.baseline,
        baseline_opts=args.baseline_opts.split(),
        device=args.device,
        size=tuple(args.image_size),
        batch=args.batch,
        what=what,
        plan=plan,
        weights=args.weights,
        allow_partial=args.allow_partial,
        dataset=args.dataset,
        num=args.num,
        runs=args.runs,
        seed=args.seed,
    )


def plan_of(args: argparse.Namespace) -> Plan:
    """Plan how much is measured, and how far apart samples may be.

    Raises:
        ValueError: for `--device cuda` without a GPU or a negative spread.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; choose cpu")
    spread = SPREAD[args.device] if args.max_spread is None else args.max_spread
    if spread < 0:
        raise ValueError(f"--max-spread {spread} is negative")
    return Plan(args.rounds, 4 * args.rounds, args.min_sample, max_spread=spread, seed=args.seed)


def split_names(option: str, text: str, choices: Sequence[str]) -> list[str]:
    """The names of a list with commas.

    Raises:
        KeyError: naming the option, for a name that is none of `choices`.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in choices:
            raise unknown_name(option, name, choices)
    return names


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return value
