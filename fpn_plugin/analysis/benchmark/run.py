"""The benchmark itself: from settings to a report, ready for JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any, Mapping, Sequence

from fpn_plugin.analysis.benchmark import inference  # noqa: F401  (registers itself)
from fpn_plugin.analysis.benchmark.contestants import Contestant, gather
from fpn_plugin.analysis.benchmark.counts import count
from fpn_plugin.analysis.benchmark.entrants import Entrant, build_all
from fpn_plugin.analysis.benchmark.inputs import Inputs
from fpn_plugin.analysis.benchmark.lineup import PeerOf, peers_of
from fpn_plugin.analysis.benchmark.machine import ceilings, facts, warnings
from fpn_plugin.analysis.benchmark.runs import read_runs
from fpn_plugin.analysis.benchmark.section import START, run_section, run_start
from fpn_plugin.analysis.benchmark.sweep import check_sweep, sweep
from fpn_plugin.analysis.benchmark.timing import Plan
from fpn_plugin.analysis.report.bar import Bar

SCHEMA = 1


@dataclass(frozen=True)
class Settings:
    """What to benchmark.

    Attributes:
        files: configs.
        opts: `KEY VALUE …` on top of them.
        variants: "NAME: KEY VALUE …", each a further contestant of every config.
        baseline: see :func:`gather`.
        baseline_opts: see :func:`gather`.
        device: "cpu" or "cuda".
        size: of an image, height and width in pixels.
        batch: images at a time.
        what: of "counts", "start" and the names of SUBJECTS, and "convs".
        peers: names of PEERS.
        sweeps: keys of SWEEPS.
        plan: of all races.
        weights: a checkpoint for all models; "" for weights from a seed.
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
    what: Sequence[str] = ("counts",)
    peers: Sequence[str] = ()
    sweeps: Sequence[str] = ()
    plan: Plan = Plan()
    weights: str = ""
    runs: Sequence[str] = ()
    seed: int = 0


def benchmark(settings: Settings, bar: Bar) -> dict[str, Any]:
    """Run everything that the settings ask for.

    Returns:
        the report: "failures" in it lists what was refused, empty if all is well.

    Raises:
        FileNotFoundError, KeyError, ValueError: naming the option, config key or file.
        ImportError: naming what to install for a peer.
    """
    contestants = gather(
        settings.files,
        settings.opts,
        settings.variants,
        settings.baseline,
        settings.baseline_opts,
        settings.device,
    )
    runs = read_runs(settings.runs, contestants)
    swept = [one for one in contestants if one.kind == "config"] if settings.sweeps else []
    for kind in settings.sweeps:
        for contestant in swept:
            check_sweep(kind, contestant)
    inputs = Inputs(settings.size, settings.batch, settings.device, settings.seed)
    report = _head(settings, contestants)
    bar.say(f"building {', '.join(one.name for one in contestants)}")
    entrants = build_all(contestants, inputs, settings.weights)
    for name, entrant in entrants.items():
        report["contestants"][name]["weights"] = entrant.facts["weights"]
    peers, notes = peers_of(list(entrants.values()), settings.peers, inputs)
    report["notes"] += notes
    if "counts" in settings.what:
        report["counts"] = _counts(entrants, inputs, bar)
    _time(settings, entrants, peers, inputs, bar, report)
    for kind in settings.sweeps:
        for contestant in swept:
            bar.begin(f"sweep {kind}: {contestant.name}", settings.plan.rounds)
            report["sweeps"].append(sweep(kind, contestant, inputs, settings.plan, bar.step))
    report["runs"] = runs
    bar.end()
    return report


def _time(
    settings: Settings,
    entrants: Mapping[str, Entrant],
    peers: Sequence[PeerOf],
    inputs: Inputs,
    bar: Bar,
    report: dict[str, Any],
) -> None:
    """Put every timing that the settings ask for into the report, and what was refused."""
    timed = [what for what in settings.what if what not in ("counts", "convs", START)]
    if "convs" in settings.what and "neck" not in timed:
        timed.insert(0, "neck")
    if timed:
        report["machine"].update(ceilings(settings.device))
    for what in timed:
        convs = what == "neck" and "convs" in settings.what
        section = run_section(what, entrants, peers, inputs, settings, bar, convs)
        _add_floors(what, section["times"], report, inputs.batch)
        report["timings"][what] = section
        report["failures"] += section.pop("failures")
    if START in settings.what:
        report["timings"][START] = run_start(settings.plan, bar)
        report["failures"] += report["timings"][START].pop("failures")


def _head(settings: Settings, contestants: list[Contestant]) -> dict[str, Any]:
    machine = facts(settings.device)
    return {
        "schema": SCHEMA,
        "command": sys.argv[1:],
        "machine": machine,
        "settings": {**asdict(settings), "size": list(settings.size)},
        "contestants": {
            one.name: {
                "config": one.source,
                "overrides": list(one.overrides),
                "references": list(one.references),
            }
            for one in contestants
        },
        "counts": {},
        "timings": {},
        "sweeps": [],
        "runs": [],
        "notes": warnings(machine),
        "failures": [],
    }


def _counts(entrants: dict[str, Entrant], inputs: Inputs, bar: Bar) -> dict[str, dict[str, float]]:
    bar.begin("counts", len(entrants))
    found = {}
    for done, (name, entrant) in enumerate(entrants.items(), 1):
        found[name] = count(entrant, inputs)
        bar.step(done)
    return found


def _add_floors(what: str, times: dict[str, Any], report: dict[str, Any], batch: int) -> None:
    """The least seconds that the counted operations of a forward can take on this machine."""
    figure = {"neck": "neck_gflops", "backbone": "backbone_gflops"}.get(what)
    for name, row in times.items():
        rate = report["machine"].get(f"{row['precision']}_gflops")
        if figure and rate and name in report["counts"]:
            row["floor_seconds"] = report["counts"][name][figure] * batch / rate
