"""A comparison's tables, and its summary in a few sentences.

Each function takes the report of :mod:`fpn_plugin.compare.comparison`.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, Callable, Mapping, Sequence

from fpn_plugin.evaluation.bootstrap import (
    IMAGES_AND_SEEDS,
    MIN_IMAGES,
    TIE,
    TOO_FEW,
    has_several_seeds,
    shown,
)
from fpn_plugin.evaluation.scores import METRICS
from fpn_plugin.report.tables import Table

TASK_NAMES = {"bbox": "box", "segm": "mask"}
_METRIC_NAMES = dict(zip(METRICS, ("AP", "AP50", "AP75", "small", "medium", "large")))
_UNKNOWN = "–"
_MAX_METRICS = 12  # columns; more metrics become rows
_MAX_SIDE_BY_SIDE = 3  # configs with a column of values each; with more, each value has a row
_MAX_NAMED = 5  # configs that columns are named after; with more, columns have numbers


def all_tables(report: Mapping[str, Any]) -> list[Table]:
    """All tables that have content."""
    tables: list[Table | None] = []
    for task in report["tasks"]:
        tables += [_ap(report, task), _significance(report, task), _pairs(report, task)]
        tables += [_by_bin(report, task), _by_category(report, task)]
    tables += [_differences(report), _costs(report), _runs(report)]
    return [table for table in tables if table is not None and table.rows]


def number(value: float | None, digits: int = 1) -> str:
    """A dash for an unknown value."""
    return _UNKNOWN if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _with_spread(group: Mapping[str, Any], key: str) -> str:
    """A metric's "mean ± standard deviation"."""
    metric = group["metrics"].get(key)
    if metric is None:
        return _UNKNOWN
    spread = metric["spread"]
    return number(metric["mean"]) + ("" if math.isnan(spread) else f" ± {spread:.1f}")


def mean(group: Mapping[str, Any], key: str) -> float:
    """A metric's mean; nan if it is unknown."""
    return group["metrics"].get(key, {}).get("mean", math.nan)


def summarise(report: Mapping[str, Any]) -> str:
    """Say which config is best, by how much, and whether that is significant."""
    sentences = [_best_config(report, task) for task in report["tasks"]]
    return " ".join([*sentences, _spread_of_seeds(report)]).strip()


def _best_config(report: Mapping[str, Any], task: str) -> str:
    ranks, name = _ranking(report, task), TASK_NAMES[task]
    if not ranks:
        return f"No {name} AP is known."
    best, value = ranks[0]
    if len(ranks) == 1:
        return f"There is one config with a {name} AP, {best}: {value:.1f}."
    second, others = ranks[1][0], [name for name, _ in ranks[1:]]
    compared = [report["baseline"]] if report["baseline"] in others else []
    compared += [second] if second not in compared else []
    tied = [config for config, other in ranks if shown(other) == shown(value)]
    lead = f"Of {len(ranks)} configs, {best} has the highest {name} AP, {value:.1f}"
    if len(tied) > 1:
        lead = f"{' and '.join(tied)} tie for the highest {name} AP, {value:.1f}"
        compared = [config for config in compared if config not in tied]
    pair = report["pairs"].get(task, {}).get(best, {}).get(second)
    if pair and pair["verdict"] == TOO_FEW:
        return (
            f"No config is best in {name} AP, {best} with {value:.1f} or {second} with"
            f" {ranks[1][1]:.1f}: {_too_few(pair, report)}."
        )
    texts = [_against(report, task, best, config) for config in compared]
    return f"{lead}: {'; '.join(texts)}." if texts else f"{lead}."


def _ranking(report: Mapping[str, Any], task: str) -> list[tuple[str, float]]:
    """The configs with their mean AP, the best first; without those that have none."""
    means = [(group["name"], mean(group, f"{task}/AP")) for group in report["groups"]]
    known = [(name, value) for name, value in means if not math.isnan(value)]
    return sorted(known, key=lambda rank: -rank[1])


def _against(report: Mapping[str, Any], task: str, best: str, other: str) -> str:
    pair = report["pairs"].get(task, {}).get(best, {}).get(other)
    values = dict(_ranking(report, task))
    lead = f"{values[best] - values[other]:.1f} above {other}"
    if pair is None:
        return f"{lead}, of unknown significance"
    if pair["verdict"] == TOO_FEW:
        return f"{lead}, without a verdict: {_too_few(pair, report)}"
    value, low, high = pair["value"], pair["low"], pair["high"]
    if pair["significant"]:
        return f"{lead} (95% interval over {pair['over']} {low:.1f} … {high:.1f})"
    return f"the difference to {other} is inconclusive, {value:+.1f} ({low:+.1f} … {high:+.1f})"


def _too_few(pair: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Why there is no verdict."""
    if pair["images"] == report["images"]:
        return f"too few images ({pair['images']})"
    return f"too few images ({pair['images']} of {report['images']} with a hit)"


def _spread_of_seeds(report: Mapping[str, Any]) -> str:
    """Say what another seed would change, which the interval, over images, does not hold."""
    groups = report["groups"]
    if len(groups) < 2 and len(groups[0]["runs"]) == 1:
        return ""
    texts, close = [], []
    for task in report["tasks"]:
        metrics = [g["metrics"] for g in groups if has_several_seeds(g["seeds"])]
        spreads = [each.get(f"{task}/AP", {}).get("spread", math.nan) for each in metrics]
        known = [spread for spread in spreads if not math.isnan(spread)]
        if not known:
            continue
        texts.append(f"±{max(known):.1f} in {TASK_NAMES[task]} AP")
        ranks = _ranking(report, task)
        if len(ranks) > 1 and ranks[0][1] - ranks[1][1] < max(known):
            close.append(TASK_NAMES[task])
    if not texts:
        return (
            "One seed each: what another seed of the training would change is not in these numbers."
        )
    text = f"Seeds of one config spread by up to {' and '.join(texts)}"
    if close:
        text += f", which is more than the two best configs differ by in {' and '.join(close)} AP"
    if single := [g["name"] for g in groups if not has_several_seeds(g["seeds"])]:
        text += f". One seed alone: {', '.join(single)}"
    return f"{text}."


def _title(task: str, rest: str = "") -> str:
    return f"{TASK_NAMES[task].capitalize()} AP{rest}"


def _best(
    columns: Mapping[int, Sequence[float]],
    choose: Callable[[Sequence[float]], float] = max,
    digits: int = 1,
) -> set[tuple[int, int]]:
    """Row and column of the one best value of each column as it is shown, with so many digits.

    Where several are the best, or all that are known, none is.
    """
    best = set()
    for column, values in columns.items():
        numbers = [math.nan if math.isnan(value) else round(value, digits) for value in values]
        known = [value for value in numbers if not math.isnan(value)]
        if len(known) > 1 and known.count(choose(known)) == 1:
            best.add((numbers.index(choose(known)), column))
    return best


def _best_metrics(
    report: Mapping[str, Any], keys: Sequence[str], first: int
) -> set[tuple[int, int]]:
    """Row and column of each metric's best value, where there are images enough for one.

    Args:
        first: the column of the first key.
    """
    columns = {
        column: [mean(group, key) for group in report["groups"]]
        for column, key in enumerate(keys, first)
        if _support(report, key, "images") >= MIN_IMAGES and not _inconclusive(report, key)
    }
    return _best(columns)


def _inconclusive(report: Mapping[str, Any], key: str) -> bool:
    """Whether a metric is a task's AP, and the best one is not significantly above the next."""
    task, _, metric = key.partition("/")
    ranks = _ranking(report, task)
    if metric != METRICS[0] or len(ranks) < 2:
        return False
    pair = report["pairs"].get(task, {}).get(ranks[0][0], {}).get(ranks[1][0])
    return not pair or not pair["significant"]


def _support(report: Mapping[str, Any], key: str, what: str) -> int:
    """The "objects" or "images" that a metric such as "bbox/APs" rests on; 0 if unknown."""
    return report.get("support", {}).get(key.partition("/")[2], {}).get(what, 0)


_BOLD = (
    "Bold: the highest number of a column as shown, if no other is the same and"
    f" {MIN_IMAGES} images or more have such objects. AP itself is bold only if it is significantly"
    " above the next; the others have no interval."
)


def _ap(report: Mapping[str, Any], task: str) -> Table:
    groups = report["groups"]
    keys = [f"{task}/{name}" for name in METRICS]
    rows = [
        [group["name"], str(len(group["runs"])), *(_with_spread(group, key) for key in keys)]
        for group in groups
    ]
    several = any(len(group["runs"]) > 1 for group in groups)
    note = "small: below 32² pixels, large: above 96²."
    if report.get("support"):
        counts = [
            f"{_support(report, key, 'objects')} {_METRIC_NAMES[key.partition('/')[2]]}"
            for key in keys[3:]
        ]
        note += f" Objects: {', '.join(counts)}."
    note += " Mean of the runs ± their standard deviation." if several else ""
    header = ["config", "runs", *_METRIC_NAMES.values()]
    best = _best_metrics(report, keys, 2)
    return Table(_title(task), header, rows, f"{note} {_BOLD}" if best else note, best)


def _significance(report: Mapping[str, Any], task: str) -> Table:
    baseline = report["baseline"]
    pairs = {
        name: others[baseline]
        for name, others in report["pairs"].get(task, {}).items()
        if baseline in others
    }
    rows = [
        [
            name,
            _UNKNOWN if math.isnan(pair["value"]) else f"{pair['value']:+.2f}",
            _UNKNOWN if math.isnan(pair["low"]) else f"{pair['low']:+.2f} … {pair['high']:+.2f}",
            _share(pair, 1),
            verdict_text(report, task, name, baseline),
        ]
        for name, pair in pairs.items()
    ]
    note = (
        f"Paired bootstrap: {report['resamples']} draws of {report['images']} images with"
        " replacement, the same for all runs; AP is the mean of a config's runs. Interval and"
        f" verdict are about other images of this kind{_of_seeds(pairs)}. There is none with fewer"
        f" than {MIN_IMAGES} images in which one of the two finds an object, and a tie where both"
        " APs are shown as the same number."
    )
    if len(rows) > 2:
        note += (
            " Not corrected for multiple comparisons: of twenty configs that are equal, about one"
            " comes out as significant."
        )
    header = ["config", "difference", "95% interval", "better in", "verdict"]
    return Table(_title(task, f" against {baseline}"), header, rows, note)


def _of_seeds(pairs: Mapping[str, Mapping[str, Any]]) -> str:
    """What intervals say of other seeds."""
    seeded = [pair["over"] == IMAGES_AND_SEEDS for pair in pairs.values()]
    if all(seeded):
        return " and other seeds"
    rest = "what other seeds would give is not in them"
    return (
        f" and, of configs with several seeds, about other seeds; else {rest}"
        if any(seeded)
        else f": {rest}"
    )


def _share(pair: Mapping[str, Any], digits: int) -> str:
    better = pair["better"]
    return _UNKNOWN if math.isnan(better) else f"{100 * better:.{digits}f}%"


def verdict_text(report: Mapping[str, Any], task: str, name: str, other: str) -> str:
    """The verdict on a config against another in words, with what the seeds say of it."""
    pair = report["pairs"][task][name][other]
    verdict = str(pair["verdict"])
    if verdict == TOO_FEW:
        return _too_few(pair, report)
    if verdict == TIE:
        return "tie as shown"
    if not pair["significant"]:
        return verdict
    both = [group for group in report["groups"] if group["name"] in (name, other)]
    if not all(has_several_seeds(group["seeds"]) for group in both):
        return f"{verdict} (one seed: a hint)"
    return verdict


def _pairs(report: Mapping[str, Any], task: str) -> Table | None:
    pairs = report["pairs"].get(task, {})
    known = any(not math.isnan(pair["better"]) for row in pairs.values() for pair in row.values())
    if len(pairs) < 3 or not known:
        return None
    names = list(pairs)
    heads = names if len(names) <= _MAX_NAMED else [str(i) for i, _ in enumerate(names, 1)]
    labels = names if heads == names else [f"{i} {name}" for i, name in enumerate(names, 1)]
    rows = [
        [
            label,
            *(_UNKNOWN if column == row else _share(row_pairs[column], 0) for column in names),
        ]
        for label, (row, row_pairs) in zip(labels, pairs.items(), strict=True)
    ]
    title = _title(task, ": how often the row is better than the column")
    return Table(title, ["config", *heads], rows)


def _by_bin(report: Mapping[str, Any], task: str) -> Table:
    names = {f"{task}/AP@{name}": name for name in report["objects"]}
    note = (
        "Bins: sides in pixels, the square root of an object's area. COCO's rules with these areas."
    )
    return _by_key(report, _title(task, " by size"), names, note)


def _by_category(report: Mapping[str, Any], task: str) -> Table:
    start = f"{task}/AP-"
    names = {
        key: key[len(start) :]
        for group in report["groups"]
        for key in group["metrics"]
        if key.startswith(start)
    }
    table = _by_key(report, _title(task, " by category"), names)
    return table if len(names) <= max(_MAX_METRICS, len(report["groups"])) else _transposed(table)


def _by_key(
    report: Mapping[str, Any], title: str, names: Mapping[str, str], note: str = ""
) -> Table:
    """A row for each config and a column for each metric, below a row with their objects.

    Args:
        names: of the columns, by metric.
    """
    groups = report["groups"] if names else []
    rows = [[group["name"], *(_with_spread(group, key) for key in names)] for group in groups]
    best = _best_metrics(report, list(names), 1)
    if rows and report.get("support"):
        objects = [str(_support(report, key, "objects")) for key in names]
        rows = [["objects", *objects], *rows]
        best = {(row + 1, column) for row, column in best}
    note = f"{note} {_BOLD}".strip() if best else note
    return Table(title, ["config", *names.values()], rows, note, best)


def _transposed(table: Table) -> Table:
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
        [group["name"], *(number(column[i], 2) for column in values.values())]
        for i, group in enumerate(groups)
    ]
    height, width = report["size"]
    note = (
        f"GFLOPs: 10⁹ multiply-accumulates of the backbone with its pyramid, an image of {height} ×"
        f" {width}. Parameters of the whole detector."
    )
    if report["latency"]:
        note += (
            f" Time: {report['latency']}, from the benchmark. None is marked: which config is"
            " faster is in its ratios, which have intervals."
        )
    header = ["config", "million parameters", "GFLOPs", "milliseconds"]
    if not report["latency"]:
        header, rows = header[:-1], [row[:-1] for row in rows]
    counted = dict(enumerate(list(values.values())[:2], 1))
    return Table("Costs", header, rows, note, _best(counted, min, digits=2))


def _differences(report: Mapping[str, Any]) -> Table:
    names = [group["name"] for group in report["groups"]]
    title = "What the configs differ in"
    note = "All others are equal, but for the seed, where it runs and what is kept on the way."
    if len(names) <= _MAX_SIDE_BY_SIDE:
        rows = [[key, *map(_text, values)] for key, values in report["differences"].items()]
        return Table(title, ["key", *names], rows, note, left=len(names) + 1)
    rows = []
    for key, values in report["differences"].items():
        owners: dict[str, list[str]] = {}
        for name, value in zip(names, values, strict=True):
            owners.setdefault(_text(value), []).append(name)
        # the baseline's value first
        ordered = sorted(owners.items(), key=lambda owner: report["baseline"] not in owner[1])
        for i, (text, configs) in enumerate(ordered):
            baseline = "" if i else report["baseline"]
            rows.append(["" if i else key, text, _listed(configs, baseline)])
    return Table(title, ["key", "value", "configs"], rows, note, left=3)


def _text(value: Any) -> str:
    """A config's value in a table."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _listed(names: Sequence[str], baseline: str) -> str:
    """Names, the baseline's first; many with the baseline's value are only counted."""
    others = [name for name in names if name != baseline]
    if baseline and len(others) > _MAX_SIDE_BY_SIDE:
        return f"{baseline} and {len(others)} others"
    return ", ".join([baseline] * bool(baseline) + others)


def _runs(report: Mapping[str, Any]) -> Table:
    keys = [f"{task}/{name}" for task in report["tasks"] for name in METRICS[:3]]
    heads = [f"{TASK_NAMES[task]} {name}" for task in report["tasks"] for name in METRICS[:3]]
    rows = [
        [
            *(run["name"], run["group"], _UNKNOWN if run["seed"] < 0 else str(run["seed"])),
            *(_UNKNOWN if run["iteration"] < 0 else str(run["iteration"]),),
            *(number(run["metrics"].get(key)) for key in keys),
        ]
        for run in report["runs"]
    ]
    return Table("Runs", ["run", "config", "seed", "iteration", *heads], rows, left=2)
