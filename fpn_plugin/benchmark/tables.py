"""A benchmark's tables, and its result in a sentence.

Each function takes the report of :mod:`fpn_plugin.benchmark.measure`, or a part of it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Mapping, Sequence

from fpn_plugin.benchmark.equality import BIT_EQUAL, DIFFERS, NOT_COMPARED
from fpn_plugin.benchmark.measure import (
    FASTER,
    MIN_ROUNDS,
    NO_DIFFERENCE,
    REFUSED,
    SLOWER,
    TOO_FEW_ROUNDS,
    noise_of,
)
from fpn_plugin.evaluation.bootstrap import MIN_IMAGES, TIE, TOO_FEW, UNKNOWN, shown
from fpn_plugin.report.tables import Table

TITLES = {
    "neck": "The pyramid alone: inference",
    "neck_train": "The pyramid alone: forward and backward",
    "backbone": "Network and pyramid: inference",
    "inference": "Full inference",
    "train": "A training iteration",
}
_COUNTS = {
    "model_parameters": ("parameters, M", 1e6, 2),
    "neck_parameters": ("of the pyramid, M", 1e6, 3),
    "backbone_gflops": ("backbone, GFLOPs", 1, 2),
    "neck_gflops": ("of the pyramid", 1, 3),
    "backbone_activations": ("activations, M", 1e6, 1),
    "neck_activations": ("of the pyramid, M", 1e6, 2),
    "neck_peak_bytes": ("pyramid's peak, MB", 1e6, 1),
}
# the most telling section first
_MAIN = ("inference", "train", "backbone", "neck_train", "neck")
_PHRASES = {
    "neck": "the pyramid's inference",
    "neck_train": "the pyramid's forward and backward",
    "backbone": "inference of network and pyramid",
    "inference": "full inference",
    "train": "a training iteration",
}
_TASKS = {"bbox": "box", "segm": "mask"}
_MOST = 3  # pairs in the sentence


def headline(report: Mapping[str, Any]) -> str:
    """What came out, in a sentence: how much faster, on which machine, with which outputs."""
    sections = [name for name in _MAIN if report["timings"].get(name, {}).get("times")]
    if not sections:
        return "Counts alone: nothing was timed."
    section = sections[0]
    data, settings = report["timings"][section], report["settings"]
    height, width = settings["size"]
    images = "an image" if settings["batch"] == 1 else f"{settings['batch']} images"
    lead = f"On {_machine(report)}, in {_PHRASES[section]} of {images} of {height} × {width}, "
    rows = _main_ratios(report, data)
    if not rows:
        times = [
            f"{name} takes {milliseconds(row['seconds'])} ms" for name, row in data["times"].items()
        ]
        return f"{lead}{', '.join(times[:_MOST])}; there is nothing that it was compared with."
    equality = {(row["contestant"], row["reference"]): row for row in data["equality"]}
    texts: dict[str, list[str]] = {}
    for row in rows[:_MOST]:
        outputs = _verdict(equality.get((row["contestant"], row["reference"]), {}))
        texts.setdefault(row["result"], []).append(_clause(row, outputs))
    parts = [_joined(texts[result]) for result in (FASTER, SLOWER) if result in texts]
    if NO_DIFFERENCE in texts:
        parts.append(f"no difference beyond noise is shown by {_joined(texts[NO_DIFFERENCE])}")
    if REFUSED in texts:
        parts.append(f"too noisy for a ratio is {_joined(texts[REFUSED])}")
    if TOO_FEW_ROUNDS in texts:
        few = f"rounds, fewer than {MIN_ROUNDS}, are too few for a verdict on"
        parts.append(f"{rows[0]['rounds']} {few} {_joined(texts[TOO_FEW_ROUNDS])}")
    parts += [f"and {len(rows) - _MOST} more below"] if len(rows) > _MOST else []
    return f"{lead}{'; '.join(parts)}."


def _main_ratios(report: Mapping[str, Any], data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The ratio of each config to the first model that it is compared with: the baseline's."""
    models = {(row["contestant"], row["reference"]) for row in data["equality"]}
    first: dict[str, Mapping[str, Any]] = {}
    for row in data["ratios"]:
        pair = row["contestant"], row["reference"]
        if pair in models and row["contestant"] in report["contestants"]:
            first.setdefault(row["contestant"], row)
    return list(first.values())


def _machine(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    if "gpu" in machine:
        return str(machine["gpu"])
    return f"{machine['cpu']} ({_count(machine['threads'], 'thread')})"


def _clause(row: Mapping[str, Any], outputs: str) -> str:
    name, reference, result = row["contestant"], row["reference"], row["result"]
    outputs = f"outputs {outputs}"
    if result == REFUSED:
        return f"{name} against {reference} ({outputs})"
    if result == TOO_FEW_ROUNDS:
        return f"{name} against {reference} ({row['value']:.2f} times as fast; {outputs})"
    interval = f"95% interval {row['low']:.2f} … {row['high']:.2f}; {outputs}"
    if result == FASTER:
        return f"{name} is {row['value']:.2f} times as fast as {reference} ({interval})"
    if result == SLOWER:
        return f"{name} is slower, {row['value']:.2f} times as fast as {reference} ({interval})"
    return f"{name} against {reference} ({row['value']:.2f} times as fast, {interval})"


def _joined(texts: Sequence[str]) -> str:
    return " and ".join(texts) if len(texts) < 3 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _verdict(equality: Mapping[str, Any]) -> str:
    verdict = equality.get("verdict", NOT_COMPARED)
    if verdict == NOT_COMPARED and equality.get("note"):
        return f"{verdict}: {equality['note']}"
    return str(verdict)


def ap_summary(report: Mapping[str, Any]) -> str:
    """Say what AP was compared, and what came out."""
    ap = report["ap"]
    if not ap:
        return "AP was not compared (--weights with --dataset does that)."
    where = f"{_test_images(ap)}"
    if not ap["pairs"]:
        values = [
            f"{name} has {_TASKS[task]} AP {shown(row['metrics'][f'{task}/AP'])}"
            for name, row in ap["models"].items()
            for task in _TASKS
            if f"{task}/AP" in row["metrics"]
        ]
        return f"On {where}, {_joined(values) or 'no model has an AP'}; no two were compared."
    lead = f"On {where}"
    verdicts = {_ap_verdict(row, ap) for row in ap["pairs"]}
    if len(verdicts) == 1 and ap["pairs"][0]["verdict"] == TOO_FEW:
        lead += f", {verdicts.pop()} for a verdict"
        verdicts = set()
    texts = []
    for row in ap["pairs"]:
        text = f"{row['contestant']} has {_TASKS[row['task']]} AP {_ap_of(ap, row, 'contestant')}"
        text += f" and {row['reference']} {_ap_of(ap, row, 'reference')}"
        texts.append(f"{text} ({_ap_verdict(row, ap)})" if verdicts else text)
    more = f"; {len(texts) - _MOST} more below" if len(texts) > _MOST else ""
    return f"{lead}{', ' if verdicts else ': '}{'; '.join(texts[:_MOST])}{more}."


def _test_images(ap: Mapping[str, Any]) -> str:
    images = _count(ap["images"], "image")
    if ap["images"] < ap["total"]:
        images = f"{ap['images']} of the {ap['total']} images"
    return f"{images} of {ap['dataset']} with {_count(ap['objects'], 'object')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ap_of(ap: Mapping[str, Any], row: Mapping[str, Any], whose: str) -> str:
    return shown(ap["models"][row[whose]]["metrics"][f"{row['task']}/AP"])


def _ap_verdict(row: Mapping[str, Any], ap: Mapping[str, Any]) -> str:
    """A verdict on AP in words."""
    if row["verdict"] == TOO_FEW:
        few = "" if row["images"] == ap["images"] else f" of {ap['images']} with a hit"
        return f"too few images ({row['images']}{few})"
    if row["verdict"] == UNKNOWN:
        return UNKNOWN
    interval = f"difference {row['low']:+.1f} … {row['high']:+.1f}"
    return f"{'tie as shown' if row['verdict'] == TIE else row['verdict']}, {interval}"


def outputs_compared(report: Mapping[str, Any]) -> str:
    """Say of which pairs the outputs were compared, on what, and what came out."""
    rows = [row for data in report["timings"].values() for row in data["equality"]]
    if not rows:
        return "No outputs were compared."
    settings = report["settings"]
    weights = settings["weights"] or f"random weights (--seed {settings['seed']})"
    counts = Counter(row["verdict"] for row in rows if row["verdict"] != NOT_COMPARED)
    skipped = len(rows) - sum(counts.values())
    texts = [f"{count} {verdict}" for verdict, count in counts.items()]
    if not counts:
        return f"No outputs were compared: the models of all {len(rows)} pairs differ by design."
    number = sum(counts.values())
    text = f"Outputs of {weights} on noise were compared {_times(number)}: {', '.join(texts)}"
    if skipped:
        text += f"; {_times(skipped)} they were not, as the models differ by design"
    return f"{text}."


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """Everything in a report that fits a table."""
    tables = [_counts_table(report["counts"])] if report["counts"] else []
    for section, data in report["timings"].items():
        tables += timing_tables(TITLES[section], data)
    if report["ap"]:
        tables += [_ap_table(report), _ap_pairs_table(report)]
    if report["runs"]:
        rows = [
            [run["folder"], run["contestant"], ", ".join(run["dataset"]), _format_ap(run["AP"])]
            for run in report["runs"]
        ]
        header = ["folder", "config", "test set", "AP"]
        note = "As the runs recorded it, on all images of their test sets; not measured here."
        tables.append(Table("Training runs", header, rows, note, left=3))
    return [*(table for table in tables if table.rows), _machine_table(report)]


def _counts_table(counts: Mapping[str, Mapping[str, float]]) -> Table:
    header = ["", *(title for title, _, _ in _COUNTS.values())]
    rows = [
        [name, *(f"{row[key] / unit:,.{digits}f}" for key, (_, unit, digits) in _COUNTS.items())]
        for name, row in counts.items()
    ]
    note = (
        "For one image; GFLOPs are 10⁹ multiply-accumulates (fvcore). The peak is that of live"
        " allocations during the pyramid's forward, above its inputs."
    )
    return Table("Counts", header, rows, note)


def timing_tables(title: str, data: Mapping[str, Any]) -> list[Table]:
    """The times of a section, and its ratios if it has any."""
    tables = [_times_table(title, data["times"])]
    return [*tables, _ratios_table(title, data)] if data["ratios"] else tables


def _times_table(title: str, times: Mapping[str, Mapping[str, Any]]) -> Table:
    phases = list(dict.fromkeys(phase for row in times.values() for phase in row["phases"]))
    extra = [
        key for key in ("proposals", "detections") if any(key in row for row in times.values())
    ]
    header = ["", "type", "ms", "spread", "images/s", *(f"{phase}, ms" for phase in phases)]
    rows = [
        [
            name,
            row.get("precision", ""),
            milliseconds(row["seconds"]) + ("" if row["verdict"] == "ok" else " (!)"),
            f"{row['spread']:.0%}",
            f"{row['images_per_second']:.2f}" if "images_per_second" in row else "",
            *(milliseconds(row["phases"].get(phase)) for phase in phases),
            f"{row['peak_bytes'] / 1e6:,.1f}" if "peak_bytes" in row else "",
            f"{row['first_call']:.2f}" if "first_call" in row else "",
            *(f"{row[key]:.0f}" if row.get(key) is not None else "" for key in extra),
        ]
        for name, row in times.items()
    ]
    note = (
        "Medians over the rounds; the spread is the interquartile range over the median, (!) where"
        " it is beyond --max-spread."
    )
    if extra:
        note += " Proposals and detections are those of an image."
    return Table(title, [*header, "peak MB", "first call, s", *extra], rows, note)


def _ratios_table(title: str, data: Mapping[str, Any]) -> Table:
    equality = {(row["contestant"], row["reference"]): row for row in data["equality"]}
    rows = []
    for row in data["ratios"]:
        outputs = _format_equality(equality.get((row["contestant"], row["reference"]), {}))
        result = row.get("result", "")
        rows.append([row["contestant"], row["reference"], *_format_ratio(row), result, outputs])
        for phase, ratio in row["phases"].items():
            cells = _format_ratio({**ratio, "rounds": row.get("rounds", MIN_ROUNDS)})
            rows.append([f"· {phase}", "", *cells, "", ""])
    rows += [
        [row["contestant"], row["reference"], "not timed", "", "", "", _format_equality(row)]
        for row in data["equality"]
        if row["verdict"] == DIFFERS
    ]
    header = ["", "against", "times as fast", "95% interval", "spread", "result", "outputs"]
    note = (
        "The median over the rounds of the other's time over its own, with its bootstrap interval."
        " Outputs: the relative difference, the largest one in full precision and the root mean"
        " square in half; docs/performance.md has the bounds."
    )
    noise = data.get("noise")
    if noise:
        number, interval, _ = _format_ratio(noise)
        note += (
            f" {noise['reference']} against a copy of itself: {number} ({interval}); a result is"
            f" {FASTER} or {SLOWER} only beyond a factor of {noise_of(noise):.2f}, else"
            f" {NO_DIFFERENCE}."
        )
    return Table(f"{title}: ratios", header, rows, note)


def _format_ratio(row: Mapping[str, Any]) -> list[str]:
    if row["value"] is None:
        return ["too wide", f"±{row['width'] / 2:.0%}", f"{row['spread']:.0%}"]
    interval = f"{row['low']:.2f} … {row['high']:.2f}"
    if row.get("rounds", MIN_ROUNDS) < MIN_ROUNDS:
        interval = "–"
    return [f"{row['value']:.2f}×", interval, f"{row['spread']:.0%}"]


def _format_equality(row: Mapping[str, Any]) -> str:
    verdict = _verdict(row) if row else ""
    if not row or row["verdict"] in (BIT_EQUAL, DIFFERS, NOT_COMPARED):
        parts = [verdict]  # why outputs differ is among the failures
    else:
        parts = [f"{verdict}: {row['relative']:.1e}"]
        if row["rounding"] is not None:
            parts.append(f"autocast alone {row['rounding']:.1e}")
        parts += [row["note"]] if row["note"] else []
    if row and row["detections"] is not None and row["verdict"] not in (DIFFERS, NOT_COMPARED):
        parts.append(f"{row['detections']:.0%} of {_count(row['of'], 'detection')} the same")
    return ", ".join(parts)


def _ap_table(report: Mapping[str, Any]) -> Table:
    """AP of each model beside its time."""
    ap, (section, times) = report["ap"], _speed(report, "times")
    tasks = [
        task
        for task in _TASKS
        if any(f"{task}/AP" in row["metrics"] for row in ap["models"].values())
    ]
    keys = [f"{task}/{name}" for task in tasks for name in ("AP", "AP50")]
    heads = [f"{_TASKS[task]} {name}" for task in tasks for name in ("AP", "AP50")]
    columns: list[tuple[str, list[str]]] = [("", list(ap["models"]))]
    models = list(ap["models"].values())
    for head, key in zip(heads, keys):
        values = [row["metrics"].get(key) for row in models]
        columns.append((head, ["–" if value is None else shown(value) for value in values]))
    if section:
        cells = [milliseconds(times[n]["seconds"]) if n in times else "–" for n in ap["models"]]
        columns.append((f"ms, {_PHRASES[section]}", cells))
    columns.append(("AP at", ["{}…{}".format(*row["size"]) for row in models]))
    if any(row["note"] for row in models):
        columns.append(("", [row["note"] for row in models]))
    header, *_ = zip(*columns)
    rows = [list(row) for row in zip(*(cells for _, cells in columns))]
    height, width = report["settings"]["size"]
    note = (
        f"{ap['limit']} detections of a category in an image count. AP at: the sides to which"
        " images are resized (INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST)"
    )
    note += f"; times are for {height} × {width}." if section else "."
    return Table(f"AP on {_test_images(ap)}", header, rows, note)


def _ap_pairs_table(report: Mapping[str, Any]) -> Table:
    """The differences in AP beside the ratios of times."""
    ap, (section, ratios) = report["ap"], _speed(report, "ratios")
    by_pair = {(row["contestant"], row["reference"]): row for row in ratios}
    rows = []
    for row in ap["pairs"]:
        ratio = by_pair.get((row["contestant"], row["reference"]))
        unknown = row["verdict"] in (TOO_FEW, UNKNOWN)
        rows.append(
            [
                *(row["contestant"], row["reference"], _TASKS[row["task"]]),
                *(_ap_of(ap, row, "contestant"), _ap_of(ap, row, "reference")),
                "–" if row["verdict"] == UNKNOWN else f"{row['value']:+.2f}",
                "–" if unknown else f"{row['low']:+.2f} … {row['high']:+.2f}",
                _ap_verdict(row, ap).partition(", difference")[0],
                f"{_format_ratio(ratio)[0]} ({ratio['result']})" if ratio else "–",
            ]
        )
    note = (
        f"Paired bootstrap: {ap['resamples']} draws of the {ap['images']} images. No verdict with"
        f" fewer than {MIN_IMAGES} images in which one of the two finds an object, and a tie where"
        " both APs are shown as the same number. The weights are one training's: what another seed"
        " would give is not in it."
    )
    speed = f"times as fast, {_PHRASES[section]}" if section else "times as fast"
    header = ["", "against", "of", "AP", "the other's", "difference", "95% interval"]
    return Table("AP: differences", [*header, "verdict", speed], rows, note, left=3)


def _speed(report: Mapping[str, Any], what: str) -> tuple[str, Any]:
    """The "times" or "ratios" of the most telling section for inference, and its name."""
    for section in ("inference", "backbone", "neck"):
        if section in report["timings"]:
            return section, report["timings"][section][what]
    return "", {}


def _format_ap(ap: Mapping[str, float]) -> str:
    return ", ".join(f"{task} {value:.1f}" for task, value in ap.items())


def milliseconds(seconds: float | None) -> str:
    """Format as milliseconds; "" for None."""
    return "" if seconds is None else f"{seconds * 1e3:,.{2 if seconds < 0.1 else 1}f}"


def _machine_table(report: Mapping[str, Any]) -> Table:
    settings = report["settings"]
    height, width = settings["size"]
    run = {
        "image": f"{height} x {width}, {settings['batch']} at a time, on {settings['device']}",
        "seed": settings["seed"],
        "weights": settings["weights"] or "from the seed, the same for all",
    }
    rows = [
        [key.replace("_", " "), _format_value(value)]
        for key, value in {**run, **report["machine"]}.items()
    ]
    return Table("Machine and settings", ["", "value"], rows, left=2)


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
