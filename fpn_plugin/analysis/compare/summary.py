"""A comparison in a few honest sentences."""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

WHAT = {"bbox": "box", "segm": "mask"}


def summarise(report: Mapping[str, Any]) -> str:
    """Which config is best, by how much, and whether that can be told."""
    sentences = [_sentence(report, task) for task in report["tasks"]]
    return " ".join([*filter(None, sentences), _on_seeds(report)]).strip()


def ranking(report: Mapping[str, Any], task: str) -> list[tuple[str, float]]:
    """The configs with their mean AP, the best first; without those that have none."""
    found = [
        (group["name"], group["metrics"].get(f"{task}/AP", {}).get("mean", math.nan))
        for group in report["groups"]
    ]
    return sorted((one for one in found if not math.isnan(one[1])), key=lambda one: -one[1])


def interval(pair: Mapping[str, float]) -> str:
    """ "+1.2 (-0.3 … +2.7)"."""
    return f"{pair['value']:+.1f} ({pair['low']:+.1f} … {pair['high']:+.1f})"


def _sentence(report: Mapping[str, Any], task: str) -> str:
    ranks = ranking(report, task)
    if not ranks:
        return f"No {WHAT[task]} AP is known."
    best, value = ranks[0]
    if len(ranks) == 1:
        return f"There is one config with a {WHAT[task]} AP, {best}: {value:.1f}."
    lead = f"Of {len(ranks)} configs, {best} has the highest {WHAT[task]} AP, {value:.1f}"
    names = [name for name, _ in ranks[1:]]
    baseline = report["baseline"]
    other = baseline if baseline in names else names[0]
    told = [_against(report, task, best, other)]
    if other != names[0]:
        told.append(_against(report, task, best, names[0]))
    return f"{lead}: {'; '.join(told)}."


def _against(report: Mapping[str, Any], task: str, best: str, other: str) -> str:
    pair = report["pairs"].get(task, {}).get(best, {}).get(other)
    if pair is None:
        values = dict(ranking(report, task))
        gap = values[best] - values[other]
        return f"{gap:.1f} above {other}, and whether that is chance cannot be told"
    if pair["told"]:
        return (
            f"{pair['value']:.1f} above {other} (95% interval {pair['low']:.1f} …"
            f" {pair['high']:.1f})"
        )
    return f"no difference from {other} can be told, {interval(pair)}"


def _has_seeds(seeds: Sequence[int]) -> bool:
    """Whether there are several; each that was not set, -1, was drawn anew."""
    return len({seed for seed in seeds if seed >= 0}) + sum(seed < 0 for seed in seeds) > 1


def _on_seeds(report: Mapping[str, Any]) -> str:
    """What the interval, which is over images, does not hold: what another seed would give."""
    groups = report["groups"]
    if len(groups) < 2 and len(groups[0]["runs"]) == 1:
        return ""
    task = report["tasks"][0]
    spreads = [
        group["metrics"].get(f"{task}/AP", {}).get("spread", math.nan)
        for group in groups
        if _has_seeds(group["seeds"])
    ]
    known = [one for one in spreads if not math.isnan(one)]
    if not known:
        return (
            "One seed each: what another seed of the training would change is not in these numbers."
        )
    text = f"Seeds of one config spread by up to ±{max(known):.1f}"
    ranks = ranking(report, task)
    if len(ranks) > 1 and ranks[0][1] - ranks[1][1] < max(known):
        text += ", which is more than the two best configs differ by"
    return f"{text}."
