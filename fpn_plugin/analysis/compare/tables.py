"""A comparison's tables."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Callable, Mapping, Sequence

from fpn_plugin.analysis.compare.groups import text_of
from fpn_plugin.analysis.compare.scores import METRICS
from fpn_plugin.analysis.compare.summary import WHAT
from fpn_plugin.analysis.report.tables import Table

_HEADS = dict(zip(METRICS, ("AP", "AP50", "AP75", "small", "medium", "large")))
NONE = "–"
_COLUMNS = 12  # of metrics; more are rows
_SIDE_BY_SIDE = 3  # configs whose values stand side by side; with more, each value has a row
_NAMED = 5  # configs that columns are named after; with more, they have numbers


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


def _chance(report: Mapping[str, Any], task: str) -> Table:
    baseline = report["baseline"]
    rows = []
    for name, pairs in report["pairs"].get(task, {}).items():
        if baseline in pairs:
            pair = pairs[baseline]
            rows.append(
                [
                    *(name, f"{pair['value']:+.2f}", f"{pair['low']:+.2f} … {pair['high']:+.2f}"),
                    *(f"{100 * pair['better']:.1f}%", _verdict(pair)),
                ]
            )
    note = (
        f"Paired bootstrap: {report['resamples']} draws of {report['images']} images with"
        " replacement, the same for all runs; AP is the mean of a config's runs. The interval is"
        " that of the images: what other seeds would give is not in it."
    )
    if len(rows) > 2:
        note += " Each stands alone: of twenty configs that are equal, about one is told apart."
    header = ["config", "difference", "95% interval", "better in", "verdict"]
    return Table(f"{WHAT[task].capitalize()} AP against {baseline}", header, rows, note)


def _verdict(pair: Mapping[str, Any]) -> str:
    if pair["told"]:
        return "better" if pair["low"] > 0 else "worse"
    return "equal" if pair["low"] == pair["high"] == 0 else "cannot be told"


def _pairs(report: Mapping[str, Any], task: str) -> Table | None:
    pairs = report["pairs"].get(task, {})
    if len(pairs) < 3:
        return None
    names = list(pairs)
    heads = names if len(names) <= _NAMED else [str(i) for i, _ in enumerate(names, 1)]
    labels = names if heads == names else [f"{i} {one}" for i, one in enumerate(names, 1)]
    rows = [
        [label, *(NONE if one == other else f"{100 * of[other]['better']:.0f}%" for other in names)]
        for label, (one, of) in zip(labels, pairs.items(), strict=True)
    ]
    title = f"{WHAT[task].capitalize()} AP: how often the row is better than the column"
    return Table(title, ["config", *heads], rows)


def _by_bin(report: Mapping[str, Any], task: str) -> Table:
    names = {f"{task}/AP@{name}": name for name in report["objects"]}
    counts = ["objects", *map(str, report["objects"].values())] if names else []
    note = (
        "Bins: sides in pixels, the square root of an object's area. COCO's rules with these areas."
    )
    return _by_key(report, f"{WHAT[task].capitalize()} AP by size", names, counts, note)


def _by_category(report: Mapping[str, Any], task: str) -> Table:
    start = f"{task}/AP-"
    names = {
        key: key[len(start) :]
        for group in report["groups"]
        for key in group["metrics"]
        if key.startswith(start)
    }
    table = _by_key(report, f"{WHAT[task].capitalize()} AP by category", names)
    return table if len(names) <= max(_COLUMNS, len(report["groups"])) else _turned(table)


def _by_key(
    report: Mapping[str, Any],
    title: str,
    names: Mapping[str, str],
    first: Sequence[str] = (),
    note: str = "",
) -> Table:
    """A row for each config, below a `first` one, and a column for each metric, by its name."""
    rows = [list(first)] if first else []
    best = {
        (row + len(rows), column)
        for row, column in _best(
            {i: [_mean(group, key) for group in report["groups"]] for i, key in enumerate(names, 1)}
        )
    }
    if names:
        rows += [
            [group["name"], *(_cell(group, key) for key in names)] for group in report["groups"]
        ]
    return Table(title, ["config", *names.values()], rows, note, best)


def _turned(table: Table) -> Table:
    """Its rows as columns."""
    header, *rows = zip(table.header, *table.rows)
    return replace(table, header=header, rows=rows, best={(j - 1, i + 1) for i, j in table.best})


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
    names = [group["name"] for group in report["groups"]]
    title = "What the configs differ in"
    note = "All others are equal, but for the seed, where it runs and what is kept on the way."
    if len(names) <= _SIDE_BY_SIDE:
        rows = [[key, *map(text_of, values)] for key, values in report["differences"].items()]
        return Table(title, ["key", *names], rows, note, left=len(names) + 1)
    rows = []
    for key, values in report["differences"].items():
        owners: dict[str, list[str]] = {}
        for name, value in zip(names, values, strict=True):
            owners.setdefault(text_of(value), []).append(name)
        ordered = sorted(owners.items(), key=lambda one: report["baseline"] not in one[1])
        for i, (text, of) in enumerate(ordered):
            rows.append(["" if i else key, text, _listed(of, "" if i else report["baseline"])])
    return Table(title, ["key", "value", "configs"], rows, note, left=3)


def _listed(names: Sequence[str], baseline: str) -> str:
    """Names, the baseline's first; of many with its value only how many there are."""
    others = [name for name in names if name != baseline]
    if baseline and len(others) > _SIDE_BY_SIDE:
        return f"{baseline} and {len(others)} others"
    return ", ".join([baseline] * bool(baseline) + others)


def _runs(report: Mapping[str, Any]) -> Table:
    keys = [f"{task}/{name}" for task in report["tasks"] for name in METRICS[:3]]
    heads = [f"{WHAT[task]} {name}" for task in report["tasks"] for name in METRICS[:3]]
    rows = [
        [
            *(run["name"], run["group"], NONE if run["seed"] < 0 else str(run["seed"])),
            *(NONE if run["iteration"] < 0 else str(run["iteration"]),),
            *(number(run["metrics"].get(key)) for key in keys),
        ]
        for run in report["runs"]
    ]
    return Table("Runs", ["run", "config", "seed", "iteration", *heads], rows, left=2)
