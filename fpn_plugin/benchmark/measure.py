"""The benchmark itself: from settings to a report, ready for JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Callable, Iterable, Mapping, Sequence

import torch

from fpn_plugin.benchmark.accuracy import measure_ap, read_test_data
from fpn_plugin.benchmark.configs import BenchmarkConfig, gather_configs, read_runs
from fpn_plugin.benchmark.counts import count, peak_bytes
from fpn_plugin.benchmark.equality import (
    DIFFERS,
    NOT_COMPARED,
    Equality,
    compare_outputs,
    matched_share,
    rounding_of,
)
from fpn_plugin.benchmark.inputs import Inputs
from fpn_plugin.benchmark.models import BenchmarkModel, build_models, difference_by_design
from fpn_plugin.benchmark.timing import (
    OK,
    TOO_WIDE,
    WHOLE,
    Clock,
    InterleavedTimes,
    Plan,
    Ratio,
    Times,
    Work,
    clock_for,
    no_lap,
    time_interleaved,
)
from fpn_plugin.benchmark.workloads import WORKLOADS, Workload, calibrate
from fpn_plugin.report.environment import collect_environment, environment_warnings
from fpn_plugin.report.progress import Bar

SCHEMA = 2
"""1: outputs were "equal", by looser bounds, "not equal" or of a "different model"; no "noise" of
the timings, no "result" of the ratios, no "ap"."""
COUNTS = "counts"
PLAIN = "float32"
FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference"
REFUSED, TOO_FEW_ROUNDS = "refused", "too few rounds"
MIN_ROUNDS = 6
"""Fewer cannot tell: that all of five ratios are on one side of 1 happens in 6% of the cases where
their median is 1."""
_SHARE = 0.98  # of the reference's detections that must be found again in full precision


@dataclass(frozen=True)
class Settings:
    """What to benchmark.

    Attributes:
        files: configs.
        opts: `KEY VALUE …` on top of them.
        variants: "NAME: KEY VALUE …", each measured beside every config.
        baseline: see :func:`gather_configs`.
        baseline_opts: see :func:`gather_configs`.
        device: "cpu" or "cuda".
        size: of an image, height and width in pixels.
        batch: images at a time.
        what: "counts" and names of WORKLOADS.
        plan: of all timings.
        weights: a checkpoint for all models; "" for weights from a seed.
        allow_partial: whether it may lack weights of a model, or have others.
        dataset: on which AP is measured with these weights; "" for none.
        num: images of it, at most.
        runs: folders of training runs.
        seed: of weights and inputs.
    """

    files: Sequence[str]
    opts: Sequence[str] = ()
    variants: Sequence[str] = ()
    baseline: str = "auto"
    baseline_opts: Sequence[str] = ()
    device: str = "cpu"
    size: tuple[int, int] = (800, 1344)
    batch: int = 1
    what: Sequence[str] = (COUNTS,)
    plan: Plan = Plan()
    weights: str = ""
    allow_partial: bool = False
    dataset: str = ""
    num: int = 50
    runs: Sequence[str] = ()
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """Two models that are compared.

    Attributes:
        by_design: why their outputs differ, such as "other weights"; "" where they must be the
            same.
        compared: whether their outputs are compared at all.
    """

    model: str
    reference: str
    by_design: str = ""
    compared: bool = True

    @property
    def names(self) -> tuple[str, str]:
        return self.model, self.reference


@dataclass
class Section:
    """What is timed together: a workload of each model, in the order in which they run.

    Attributes:
        name: in the report.
        workloads: by the model's name.
        pairs: whose ratios are wanted.
        repeated: a reference and the same workload of another copy of it: what their ratio is off
            from 1 is noise.
    """

    name: str
    workloads: dict[str, Workload] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    repeated: tuple[str, Workload] | None = None


Extend = Callable[[Section, Mapping[str, BenchmarkModel], Inputs], None]


def benchmark(settings: Settings, bar: Bar, extend: Extend | None = None) -> dict[str, Any]:
    """Run everything that the settings ask for.

    Args:
        extend: called with each section before it is measured, to add what runs beside the models.

    Returns:
        the report: "failures" in it lists what was refused, empty if all is well. In it a config or
        variant is called a contestant.

    Raises:
        FileNotFoundError, KeyError, ValueError: naming the option, config key or file.
    """
    configs = gather_configs(
        settings.files,
        settings.opts,
        settings.variants,
        settings.baseline,
        settings.baseline_opts,
        settings.device,
    )
    runs = read_runs(settings.runs, configs)
    inputs = Inputs(settings.size, settings.batch, settings.device, settings.seed)
    data = None
    if settings.dataset:
        cfgs = [config.cfg for config in configs]
        data = read_test_data(settings.dataset, settings.num, cfgs, settings.weights)
    report = _new_report(settings, configs)
    if configs:
        bar.say(f"building {', '.join(config.name for config in configs)}")
    models = build_models(configs, inputs, settings.weights, settings.allow_partial)
    for name, model in models.items():
        report["contestants"][name]["weights"] = model.weights
    if COUNTS in settings.what:
        bar.begin(COUNTS, len(models))
        for done, (name, model) in enumerate(models.items(), 1):
            report["counts"][name] = count(model, inputs)
            bar.step(done)
    for name in settings.what:
        if name == COUNTS:
            continue
        bar.say(f"{name}: preparing")
        section = section_of(name, models, inputs, trained=bool(settings.weights))
        if extend:
            extend(section, models, inputs)
        _repeat_a_reference(section, models, inputs)
        bar.begin(name, settings.plan.rounds)
        measured = measure_section(section, inputs.device, settings.plan, bar.step)
        report["failures"] += measured.pop("failures")
        report["timings"][name] = measured
    report["runs"] = runs
    if data:
        report["ap"] = measure_ap(models, data, bar)
    bar.end()
    return report


def _new_report(settings: Settings, configs: Sequence[BenchmarkConfig]) -> dict[str, Any]:
    environment = collect_environment(settings.device)
    return {
        "schema": SCHEMA,
        "command": sys.argv[1:],
        "machine": environment,
        "settings": {**asdict(settings), "size": list(settings.size)},
        "contestants": {
            config.name: {
                "config": config.source,
                "role": config.role,
                "overrides": list(config.overrides),
                "references": list(config.references),
            }
            for config in configs
        },
        "counts": {},
        "timings": {},
        "ap": {},
        "runs": [],
        "notes": environment_warnings(environment),
        "failures": [],
    }


def section_of(
    name: str, models: Mapping[str, BenchmarkModel], inputs: Inputs, trained: bool
) -> Section:
    """A workload of every model, paired with its references.

    Args:
        name: of WORKLOADS.
        trained: the weights come from a checkpoint, and so find objects by themselves.
    """
    section = Section(name)
    if name == "inference" and not trained:
        _set_thresholds(models.values(), inputs)
    for model in models.values():
        workload = WORKLOADS.get(name)(model, inputs)
        section.workloads[model.name] = workload
        for reference in model.config.references:
            by_design = difference_by_design(model, models[reference], workload.part)
            section.pairs.append(Pair(model.name, reference, by_design))
    return section


def _repeat_a_reference(
    section: Section, models: Mapping[str, BenchmarkModel], inputs: Inputs
) -> None:
    """Let one model of the section's pairs, a reference if possible, be timed twice."""
    names = [name for pair in section.pairs for name in pair.names[::-1] if name in models]
    if names:
        again = WORKLOADS.get(section.name)(models[names[0]], inputs)
        section.repeated = names[0], again


def _set_thresholds(models: Iterable[BenchmarkModel], inputs: Inputs) -> None:
    """Set one score threshold for all models of the same weights, calibrated on the first."""
    thresholds: dict[str, float | None] = {}
    for model in models:
        weights = repr(sorted(model.shapes("model").items()))
        if weights not in thresholds:
            thresholds[weights] = calibrate(model, inputs)
        model.score_threshold = thresholds[weights]


def measure_section(
    section: Section, device: str, plan: Plan, on_round: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Compare outputs, measure memory, then time one kind of work of all models.

    A model whose outputs differ from its reference's where they must not is not timed.

    Returns:
        "times" by model, "ratios", "equality", and "failures": what was refused and why.
    """
    equalities = check_outputs(section, device)
    wrong = {pair.model for pair, equality in equalities.items() if equality.verdict == DIFFERS}
    failures = [
        f"{section.name}: the outputs of {pair.model} differ from those of {pair.reference} by more"
        f" than rounding: {equality.note}"
        for pair, equality in equalities.items()
        if equality.verdict == DIFFERS
    ]
    workloads = {name: work for name, work in section.workloads.items() if name not in wrong}
    pairs = [pair for pair in section.pairs if not wrong & {pair.model, pair.reference}]
    for workload in workloads.values():
        workload.facts["peak_bytes"] = _peak(workload, device)
    works: dict[str, Work] = {name: workload.work for name, workload in workloads.items()}
    repeated = section.repeated if pairs and section.repeated else ("", None)
    again = f"{repeated[0]}, again,"
    timed_pairs = list(pairs)
    if repeated[1] and repeated[0] in works:
        works[again] = repeated[1].work
        timed_pairs.append(Pair(again, repeated[0]))
    timed = time_pairs(section.name, works, timed_pairs, clock_for(device), plan, on_round)
    timed["noise"] = {}
    if again in works:
        del timed["times"][again]
        row = timed["ratios"].pop()
        keys = ("reference", "value", "low", "high", "spread", "width", "verdict")
        timed["noise"] = {key: row[key] for key in keys}
    for name, row in timed["times"].items():
        workload = workloads[name]
        row.update(
            precision=workload.precision,
            first_call=workload.work.seconds,
            images_per_second=workload.images / row["seconds"],
            **workload.facts,
        )
    for row, pair in zip(timed["ratios"], pairs):
        row["equality"] = equalities[pair].verdict if pair in equalities else ""
        row["result"] = result_of(row, timed["noise"])
    timed["equality"] = [
        {"contestant": pair.model, "reference": pair.reference, **asdict(equality)}
        for pair, equality in equalities.items()
    ]
    timed["failures"] = failures + timed["failures"]
    return timed


def result_of(ratio: Mapping[str, Any], noise: Mapping[str, Any]) -> str:
    """FASTER or SLOWER where a ratio's interval, as it is shown, excludes 1 and is beyond what the
    same model's ratio to itself is off; else NO_DIFFERENCE, TOO_FEW_ROUNDS or REFUSED.

    Args:
        noise: the ratio of a model to a copy of itself; {} if there is none.
    """
    if ratio["value"] is None:
        return REFUSED
    if ratio["rounds"] < MIN_ROUNDS:
        return TOO_FEW_ROUNDS
    off = noise_of(noise)
    if round(ratio["low"], 2) > round(off, 2):
        return FASTER
    return SLOWER if round(ratio["high"], 2) < round(1 / off, 2) else NO_DIFFERENCE


def noise_of(noise: Mapping[str, Any]) -> float:
    """The factor by which a ratio may be off for noise alone, 1 or more."""
    if not noise:
        return 1.0
    if noise["value"] is None:  # too wide to have an interval
        return float(1 + noise["width"])
    return float(max(1.0, noise["high"], 1 / noise["low"]))


def check_outputs(section: Section, device: str) -> dict[Pair, Equality]:
    """Compare the outputs of every pair that is to be compared."""
    pairs = [pair for pair in section.pairs if pair.compared]
    needed = {name for pair in pairs if not pair.by_design for name in (pair.model, pair.reference)}
    outputs = {
        name: workload.outputs() for name, workload in section.workloads.items() if name in needed
    }
    roundings: dict[tuple[str, str], dict[str, float]] = {}
    equalities = {}
    for pair in pairs:
        if pair.by_design:
            equalities[pair] = Equality(NOT_COMPARED, note=pair.by_design)
            continue
        workload, reference = section.workloads[pair.model], section.workloads[pair.reference]
        half = [each.precision for each in (workload, reference) if each.precision != PLAIN]
        plain = next((n for n in pair.names[::-1] if section.workloads[n].precision == PLAIN), "")
        if half and plain and (plain, half[0]) not in roundings:
            with torch.autocast(device, getattr(torch, half[0])):
                rounded = section.workloads[plain].outputs()
            roundings[plain, half[0]] = rounding_of(outputs[plain], rounded)
        equality = compare_outputs(
            outputs[pair.reference],
            outputs[pair.model],
            half[0] if half else PLAIN,
            max(workload.depth, reference.depth),
            roundings.get((plain, half[0])) if half else None,
        )
        equalities[pair] = _with_detections(equality, workload, reference, bool(half))
    return equalities


def _with_detections(
    equality: Equality, workload: Workload, reference: Workload, half: bool
) -> Equality:
    """Add the share of equal detections; it decides in full precision alone, since in half
    precision random weights rank the boxes differently."""
    if workload.detections is None or reference.detections is None:
        return equality
    share = matched_share(reference.detections, workload.detections)
    equality = replace(equality, detections=share, of=len(reference.detections["boxes"]))
    if half or share >= _SHARE:
        return equality
    note = f"{share:.0%} of the detections are the same"
    note = f"{equality.note}; {note}" if equality.note else note
    return replace(equality, note=note, verdict=DIFFERS)


def _peak(workload: Workload, device: str) -> int:
    workload.work(no_lap)
    if workload.reset:
        workload.reset()
    return peak_bytes(lambda: workload.work(no_lap), device)


def time_pairs(
    section: str,
    works: Mapping[str, Work],
    pairs: Sequence[Pair],
    clock: Clock,
    plan: Plan,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Time work interleaved.

    Args:
        section: names it in the failures.

    Returns:
        "times" by model, "ratios" in the order of `pairs`, and "failures": what is inconclusive.
    """
    names = [(pair.model, pair.reference) for pair in pairs]
    measured = time_interleaved(works, names, clock, plan, on_round)
    rows = [_ratio_row(pair, measured) for pair in names]
    return {
        "times": {name: _time_row(times, plan) for name, times in measured.times.items()},
        "ratios": rows,
        "equality": [],
        "failures": _inconclusive(section, measured, rows, plan),
    }


def _time_row(times: Times, plan: Plan) -> dict[str, Any]:
    phases = {phase: times.median(phase) for phase in times.samples if phase != WHOLE}
    return {
        "seconds": times.median(),
        "spread": times.spread(),
        "rounds": times.rounds,
        "repeats": times.repeats,
        "phases": phases if len(phases) > 1 else {},
        "samples": times.samples[WHOLE],
        "verdict": OK if times.spread() <= plan.max_spread else TOO_WIDE,
    }


def _ratio_row(pair: tuple[str, str], measured: InterleavedTimes) -> dict[str, Any]:
    phases = {phase: _ratio_values(ratio) for phase, ratio in measured.ratios[pair].items()}
    whole = phases.pop(WHOLE)
    return {
        "contestant": pair[0],
        "reference": pair[1],
        "equality": "",
        "rounds": measured.times[pair[0]].rounds,
        **whole,
        "phases": phases if len(phases) > 1 else {},
    }


def _ratio_values(ratio: Ratio) -> dict[str, Any]:
    """The fields of a ratio; of an inconclusive one only how wide it is."""
    values = {
        key: getattr(ratio, key) if ratio.verdict == OK else None
        for key in ("value", "low", "high")
    }
    return {**values, "spread": ratio.spread, "width": ratio.width, "verdict": ratio.verdict}


def _inconclusive(
    section: str, measured: InterleavedTimes, rows: Sequence[Mapping[str, Any]], plan: Plan
) -> list[str]:
    """Describe what is too wide for a statement."""
    texts = [
        f"{section}: {row['contestant']} against {row['reference']} is too wide after"
        f" {measured.times[row['contestant']].rounds} rounds: the rounds' ratios spread"
        f" by {row['spread']:.0%}, the interval is {row['width']:.0%} wide, and --max-spread is"
        f" {plan.max_spread:.0%}"
        for row in rows
        if row["verdict"] != OK
    ]
    paired = {row[key] for row in rows for key in ("contestant", "reference")}
    return texts + [
        f"{section}: the times of {name} spread by {times.spread():.0%}, and --max-spread is"
        f" {plan.max_spread:.0%}"
        for name, times in measured.times.items()
        if name not in paired and times.spread() > plan.max_spread
    ]
