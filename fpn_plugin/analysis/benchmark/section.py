"""One section of a report: equality first, then memory, then time."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Mapping, Sequence

from fpn_plugin.analysis.benchmark.clock import WHOLE, WallClock, clock_for, no_lap
from fpn_plugin.analysis.benchmark.entrants import Entrant
from fpn_plugin.analysis.benchmark.equality import (
    DIFFERENT,
    UNEQUAL,
    Equality,
    compare_outputs,
    matched_share,
)
from fpn_plugin.analysis.benchmark.inputs import Inputs
from fpn_plugin.analysis.benchmark.lineup import Lineup, Pair, PeerOf, line_up
from fpn_plugin.analysis.benchmark.memory import peak_bytes
from fpn_plugin.analysis.benchmark.start import START_PAIRS, import_works
from fpn_plugin.analysis.benchmark.statistics import OK, Ratio
from fpn_plugin.analysis.benchmark.subjects import Subject
from fpn_plugin.analysis.benchmark.timing import Plan, Race, Times, race
from fpn_plugin.analysis.report.bar import Bar

if TYPE_CHECKING:
    from fpn_plugin.analysis.benchmark.run import Settings

START = "start"
_SHARE = 0.98  # of the reference's detections that must be found again in full precision


def run_section(
    section: str,
    entrants: Mapping[str, Entrant],
    peers: Sequence[PeerOf],
    inputs: Inputs,
    settings: Settings,
    bar: Bar,
    convolutions: bool = False,
) -> dict[str, Any]:
    """Compare, measure and time one kind of work of all entrants.

    Returns:
        "times" by contestant, "ratios", and "failures": what was refused and why.
    """
    bar.say(f"{section}: preparing")
    trained = bool(settings.weights)
    lineup = line_up(section, entrants, peers, inputs, trained, convolutions)
    equalities = check(lineup)
    failures = [
        f"{section}: {pair.contestant} does not equal {pair.reference}: {found.note}"
        for pair, found in equalities.items()
        if found.verdict == UNEQUAL
    ]
    wrong = {pair.contestant for pair, found in equalities.items() if found.verdict == UNEQUAL}
    for name, subject in lineup.subjects.items():
        if name not in wrong:
            subject.facts["peak_bytes"] = _peak(subject, inputs.device)
    works = {name: one.work for name, one in lineup.subjects.items() if name not in wrong}
    pairs = [pair for pair in lineup.pairs if not wrong & {pair.contestant, pair.reference}]
    bar.begin(section, settings.plan.rounds)
    names = [(pair.contestant, pair.reference) for pair in pairs]
    done = race(works, names, clock_for(inputs.device), settings.plan, bar.step)
    rows = [_ratio_row(pair, done, equalities.get(pair)) for pair in pairs]
    return {
        "times": {
            name: _time_row(times, lineup.subjects[name], settings.plan)
            for name, times in done.times.items()
        },
        "ratios": rows,
        "equality": [
            {"contestant": pair.contestant, "reference": pair.reference, **asdict(found)}
            for pair, found in equalities.items()
        ],
        "failures": failures + refusals(section, done, rows, settings.plan),
    }


def run_start(plan: Plan, bar: Bar) -> dict[str, Any]:
    """The section that imports the plugin in fresh processes."""
    bar.begin(START, plan.rounds)
    done = race(import_works(), START_PAIRS, WallClock(), plan, bar.step)
    pairs = [Pair(*names, same=False, compared=False) for names in START_PAIRS]
    rows = [_ratio_row(pair, done, None) for pair in pairs]
    times = {name: _time_row(one, None, plan) for name, one in done.times.items()}
    failures = refusals(START, done, rows, plan)
    return {"times": times, "ratios": rows, "equality": [], "failures": failures}


def check(lineup: Lineup) -> dict[Pair, Equality]:
    """Compare the outputs of every pair that is to be compared."""
    outputs = {}
    needed = {
        name
        for pair in lineup.pairs
        if pair.compared and pair.same
        for name in (pair.contestant, pair.reference)
    }
    for name, subject in lineup.subjects.items():
        if name in needed:
            outputs[name] = subject.outputs()
    found = {}
    for pair in lineup.pairs:
        if not pair.compared:
            continue
        if not pair.same:
            found[pair] = Equality(DIFFERENT)
            continue
        one, two = lineup.subjects[pair.contestant], lineup.subjects[pair.reference]
        precision = one.precision if one.precision != "float32" else two.precision
        depth = max(one.depth, two.depth)
        made = compare_outputs(outputs[pair.reference], outputs[pair.contestant], precision, depth)
        found[pair] = _with_detections(made, one, two, precision)
    return found


def _with_detections(found: Equality, one: Subject, two: Subject, precision: str) -> Equality:
    """In half precision random weights put other boxes first, so there the share is only told."""
    if one.detections is None or two.detections is None:
        return found
    share = matched_share(two.detections, one.detections)
    note = "; ".join([*filter(None, [found.note]), f"{share:.0%} of the detections are the same"])
    verdict = UNEQUAL if precision == "float32" and share < _SHARE else found.verdict
    return Equality(verdict, found.max_abs, found.relative, found.tolerance, note)


def _peak(subject: Subject, device: str) -> int:
    subject.work(no_lap)
    if subject.reset:
        subject.reset()
    return peak_bytes(lambda: subject.work(no_lap), device)


def _time_row(times: Times, subject: Subject | None, plan: Plan) -> dict[str, Any]:
    phases = {phase: times.median(phase) for phase in times.samples if phase != WHOLE}
    row: dict[str, Any] = {
        "seconds": times.median(),
        "spread": times.spread(),
        "rounds": len(times.samples[WHOLE]),
        "repeats": times.repeats,
        "phases": phases if len(phases) > 1 else {},
        "samples": times.samples[WHOLE],
        "verdict": OK if times.spread() <= plan.max_spread else "too wide",
    }
    if subject is not None:
        row.update(
            precision=subject.precision,
            first_call=subject.work.seconds,
            images_per_second=subject.images / times.median(),
            **subject.facts,
        )
    return row


def _ratio_row(pair: Pair, done: Race, equality: Equality | None) -> dict[str, Any]:
    ratios = done.ratios[pair.contestant, pair.reference]
    return {
        "contestant": pair.contestant,
        "reference": pair.reference,
        "equality": equality.verdict if equality else "",
        **_told(ratios[WHOLE]),
        "phases": (
            {phase: _told(ratio) for phase, ratio in ratios.items() if phase != WHOLE}
            if len(ratios) > 2
            else {}
        ),
    }


def _told(ratio: Ratio) -> dict[str, Any]:
    """A ratio that is too wide is not told, only how wide it is."""
    ok = ratio.verdict == OK
    told = {key: getattr(ratio, key) if ok else None for key in ("value", "low", "high")}
    return {**told, "spread": ratio.spread, "width": ratio.width, "verdict": ratio.verdict}


def refusals(section: str, done: Race, rows: Sequence[Mapping[str, Any]], plan: Plan) -> list[str]:
    """What is too wide to be told, in words."""
    found = [
        f"{section}: {row['contestant']} against {row['reference']} is too wide after"
        f" {len(next(iter(done.times.values())).samples[WHOLE])} rounds: the rounds' ratios spread"
        f" by {row['spread']:.0%}, the interval is {row['width']:.0%} wide, and --max-spread is"
        f" {plan.max_spread:.0%}"
        for row in rows
        if row["verdict"] != OK
    ]
    paired = {row[key] for row in rows for key in ("contestant", "reference")}
    return found + [
        f"{section}: the times of {name} spread by {times.spread():.0%}, and --max-spread is"
        f" {plan.max_spread:.0%}"
        for name, times in done.times.items()
        if name not in paired and times.spread() > plan.max_spread
    ]
