#!/usr/bin/env python3
"""How long each pyramid takes beside its reference, on R50's maps of one image, in turns.

time_ratios.py                                    all of tests/parity/*_recipes.py, 640 x 640 pixels
time_ratios.py --only hybrid --channels-last --backward

Exit code 2: a pyramid takes more than LIMIT of its reference's time, or a ratio is inconclusive.
"""

import os

# before torch is imported: its workers would spin while they wait
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse  # noqa: E402
import importlib  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Callable  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
from references import R50, RECIPES, Maps, Recipe, Reference  # noqa: E402

from fpn_plugin.benchmark.timing import (  # noqa: E402
    OK,
    WHOLE,
    Lap,
    Plan,
    clock_for,
    time_interleaved,
)
from fpn_plugin.visualize.complexity import aligned  # noqa: E402

LIMIT = 1.2
OURS, THEIRS = "ours", "reference"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="recipes whose names contain this")
    parser.add_argument("--size", type=int, default=640, help="of the image, in pixels")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--backward", action="store_true", help="forward and backward in training")
    args = parser.parse_args()
    for file in sorted(HERE.glob("*_recipes.py")):
        importlib.import_module(file.stem)
    rows, code = [["recipe", "ours ms", "reference ms", "ours / reference", "95%", ""]], 0
    for name, recipe in RECIPES.items():
        if args.only in name:
            rows.append(measure(name, recipe, args))
            code = 2 if rows[-1][-1] else code
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print(aligned(rows))
    return code


def measure(name: str, recipe: Recipe, args: argparse.Namespace) -> list[str]:
    """A row of the table; the last cell says what is wrong."""
    torch.manual_seed(0)
    channels = {level: R50[level] for level in recipe.levels}
    reference = recipe.build(channels, args.width)
    reference.copy_weights()
    finest = -(-args.size // 2 ** min(channels))
    maps = reference.inputs(channels, (finest, finest), batch=1)
    works = {
        OURS: work(reference, lambda x: list(reference.ours(x).values()), maps, args),
        THEIRS: work(reference, lambda x: reference.run(reference.theirs, x), maps, args),
    }
    plan = Plan(rounds=args.rounds)
    timed = time_interleaved(works, [(THEIRS, OURS)], clock_for("cpu"), plan)
    ratio = timed.ratios[(THEIRS, OURS)][WHOLE]
    fault = "inconclusive" if ratio.verdict != OK else "too slow" if ratio.value > LIMIT else ""
    milliseconds = [f"{timed.times[side].median() * 1000:.1f}" for side in (OURS, THEIRS)]
    interval = f"{ratio.low:.2f} to {ratio.high:.2f}"
    return [name, *milliseconds, f"{ratio.value:.2f}", interval, fault]


def work(
    reference: Reference, run: Callable[[Maps], Any], maps: Maps, args: argparse.Namespace
) -> Callable[[Lap], None]:
    """What is timed: a forward pass in eval mode, or a training step without the optimizer's."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    for module in (reference.ours, reference.theirs):
        module.train(args.backward).to(memory_format=layout)
    given = {name: x.to(memory_format=layout) for name, x in maps.items()}

    def step(lap: Lap) -> None:
        with torch.set_grad_enabled(args.backward):
            # a reference may change its dict, or its maps, in place
            inputs = {name: x.clone() for name, x in given.items()}
            outputs = run(inputs)
            if args.backward:
                sum(x.sum() for x in outputs).backward()

    return step


if __name__ == "__main__":
    sys.exit(main())
