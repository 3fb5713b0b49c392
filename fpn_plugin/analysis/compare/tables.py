"""A comparison's tables."""

from __future__ import annotations

import math
from typing import Any, Callable, Mapping, Sequence

from fpn_plugin.analysis.compare.groups import text_of
from fpn_plugin.analysis.compare.scores import METRICS
from fpn_plugin.analysis.compare.summary import WHAT
from fpn_plugin.analysis.report.table import Table

_HEADS = dict(zip(METRICS, ("AP", "AP50", "AP75", "small", "medium", "large")))
NONE = "–"


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All of them; those without content are left out."""
    found = []
    for task in report["tasks"]:
        found += [_main(report, task), _chance(report, task), _pairs(report, task)]
        found += [_by_bin(report, task), _by_category(report, task)]
    found += [_differences(report), _costs(report), _runs(report)]
    return [table for table in found if table is not None and table.rows]


def number(value: float | None, digits: int = 1) -> str:
    """A dash for what is not known."""
    return NONE if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _cell(group: Mapping[str, Any], key: str) -> str:
    found = group["metrics"].get(key)
    if found is None:
        return NONE
    spread = found["spread"]
    return number(found["mean"]) + ("" if math.isnan(spread) else f" ± {spread:.1f}")


def _mean(group: Mapping[str, Any], key: str) -> float:
    return group["metrics"].get(key, {}).get("mean", math.nan)


def _best(
    columns: Mapping[int, Sequence[float]], choose: Callable[[Sequence[float]], float] = max
) -> set[tuple[int, int]]:
    """Row and column of each column's best value, where there are several to choose from."""
    best = set()
    for column, values in columns.items():
        known = [value for value in values if not math.isnan(value)]
        if len(known) > 1 and len(set(known)) > 1:
            best |= {(row, column) for row, value in enumerate(values) if value == choose(known)}
    return best


def _main(report: Mapping[str, Any], task: str) -> Table:
    groups = report["groups"]
    keys = [f"{task}/{name}" for name in METRICS]
    rows = [
        [group["name"], str(len(group["runs"])), *(_cell(group, key) for key in keys)]
        for group in groups
    ]
    columns = {i: [_mean(group, key) for group in groups] for i, key in enumerate(keys, 2)}
    several = any(len(group["runs"]) > 1 for group in groups)
    note = "small: below 32² pixels, large: above 96²."
    note += " Mean of the runs ± their standard deviation." if several else ""
    title = f"{WHAT[task].capitalize()} AP"
    return Table(title, ["config", "runs", *_HEADS.values()], rows, note, _best(columns))


def _chance(report: Mapping[str, Any], task: str) -> Table | None:
    baseline = report["baseline"]
    rows = []
    for name, pairs in report["pairs"].get(task, {}).items():
        if baseline in pairs:
            pair = pairs[baseline]
            rows.append(
                [
                    *(name, f"{pair['value']:+.2f}", f"{pair['low']:+.2f} … {pair['high']:+.2f}"),
                    *(
                        f"{100 * pair['better']:.1f}%",
                        _verdict(pair),
                    ),
                ]
            )
    return Table(
        f"{WHAT[task].capitalize()} AP against {baseline}",
        ["config", "difference", "95% interval", "better in", "verdict"],
        rows,
        f"Paired bootstrap: {report['resamples']} draws of {report['images']} images with"
        " replacement, the same for all runs; AP is the mean of a config's runs. The interval is"
        " that of the images: what other seeds would give is not in it.",
    )


def _verdict(pair: Mapping[str, Any]) -> str:
    if pair["told"]:
        return "better" if pair["low"] > 0 else "worse"
    return "equal" if pair["low"] == pair["high"] == 0 else "cannot be told"


def _pairs(report: Mapping[str, Any], task: str) -> Table | None:
    pairs = report["pairs"].get(task, {})
    if len(pairs) < 3:
        return None
    rows = [
        [one, *(NONE if one == other else f"{100 * of[other]['better']:.0f}%" for other in pairs)]
        for one, of in pairs.items()
    ]
    title = f"{WHAT[task].capitalize()} AP: how often the row is better than the column"
    return Table(title, ["config", *pairs], rows)


def _by_bin(report: Mapping[str, Any], task: str) -> Table | None:
    objects = report["objects"]
    rows, best = [], set()
    groups = report["groups"]
    for i, (name, count) in enumerate(objects.items()):
        key = f"{task}/AP@{name}"
        rows.append([name, str(count), *(_cell(group, key) for group in groups)])
        best |= _best_in_row(i, 2, [_mean(group, key) for group in groups])
    header = ["side in pixels", "objects", *(group["name"] for group in groups)]
    note = "Side: the square root of an object's area. COCO's rules with these areas."
    return Table(f"{WHAT[task].capitalize()} AP by size", header, rows, note, best)


def _best_in_row(row: int, first: int, values: Sequence[float]) -> set[tuple[int, int]]:
    return {(row, first + column) for column, _ in _best({0: values})}


def _by_category(report: Mapping[str, Any], task: str) -> Table | None:
    start = f"{task}/AP-"
    groups = report["groups"]
    keys = dict.fromkeys(
        key for group in groups for key in group["metrics"] if key.startswith(start)
    )
    rows, best = [], set()
    for i, key in enumerate(keys):
        rows.append([key[len(start) :], *(_cell(group, key) for group in groups)])
        best |= _best_in_row(i, 1, [_mean(group, key) for group in groups])
    header = ["category", *(group["name"] for group in groups)]
    return Table(f"{WHAT[task].capitalize()} AP by category", header, rows, best=best)


def _costs(report: Mapping[str, Any]) -> Table | None:
    groups = report["groups"]
    scales = {"parameters": 1e-6, "gflops": 1.0, "seconds": 1e3}
    values = {
        key: [group.get(key) * scale if group.get(key) else math.nan for group in groups]
        for key, scale in scales.items()
    }
    rows = [
        [group["name"], *(number(of[i], 2) for of in values.values())]
        for i, group in enumerate(groups)
    ]
    height, width = report["size"]
    note = (
        f"GFLOPs: 10⁹ multiply-accumulates of the backbone with its pyramid, an image of {height} ×"
        f" {width}. Parameters of the whole detector."
    )
    note += f" Time: {report['latency']}, from the benchmark." if report["latency"] else ""
    header = ["config", "million parameters", "GFLOPs", "milliseconds"]
    if not report["latency"]:
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table("Costs", header, rows, note, _best(dict(enumerate(values.values(), 1)), min))


def _differences(report: Mapping[str, Any]) -> Table:
    rows = [[key, *map(text_of, values)] for key, values in report["differences"].items()]
    header = ["key", *(group["name"] for group in report["groups"])]
    return Table(
        "What the configs differ in",
        header,
        rows,
        "All others are equal, but for the seed, where it runs and what is kept on the way.",
    )


def _runs(report: Mapping[str, Any]) -> Table:
    keys = [f"{task}/{name}" for task in report["tasks"] for name in METRICS[:3]]
    heads = [f"{WHAT[task]} {name}" for task in report["tasks"] for name in METRICS[:3]]
    rows = [
        [
            *(run["name"], run["group"], str(run["seed"])),
            *(NONE if run["iteration"] < 0 else str(run["iteration"]),),
            *(number(run["metrics"].get(key)) for key in keys),
        ]
        for run in report["runs"]
    ]
    return Table("Runs", ["run", "config", "seed", "iteration", *heads], rows)
