"""A report as tables of text, the same for the terminal, Markdown and HTML."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from fpn_plugin.analysis.report.tables import Table

TITLES = {
    "neck": "The pyramid alone: inference",
    "neck_train": "The pyramid alone: forward and backward",
    "backbone": "Network and pyramid: inference",
    "inference": "Full inference",
    "train": "A training iteration",
    "start": "Start: importing in fresh processes",
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


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Everything in a report that fits a table."""
    found = [_counts(report["counts"])] if report["counts"] else []
    for section, data in report["timings"].items():
        found.append(_times(section, data["times"]))
        if data["ratios"]:
            found.append(_ratios(section, data))
    if report["sweeps"]:
        found.append(_sweeps(report["sweeps"]))
    if report["runs"]:
        rows = [[run["folder"], run["contestant"], _aps(run["AP"])] for run in report["runs"]]
        found.append(Table("Training runs", ["folder", "contestant", "AP"], rows))
    return [*found, _machine(report)]


def _counts(counts: Mapping[str, Mapping[str, float]]) -> Table:
    header = ["", *(title for title, _, _ in _COUNTS.values())]
    rows = [
        [name, *(f"{found[key] / unit:,.{digits}f}" for key, (_, unit, digits) in _COUNTS.items())]
        for name, found in counts.items()
    ]
    note = (
        "For one image; GFLOPs are 10⁹ multiply-accumulates (fvcore). The peak is that of live"
        " allocations during the pyramid's forward, above its inputs."
    )
    return Table("Counts", header, rows, note)


def _times(section: str, times: Mapping[str, Mapping[str, Any]]) -> Table:
    phases = list(dict.fromkeys(phase for row in times.values() for phase in row["phases"]))
    extra = [
        key for key in ("proposals", "detections") if any(key in row for row in times.values())
    ]
    header = [
        "",
        "type",
        "ms",
        "floor, ms",
        "spread",
        "images/s",
        *(f"{phase}, ms" for phase in phases),
    ]
    rows = []
    for name, row in times.items():
        rows.append(
            [
                name,
                row.get("precision", ""),
                _milliseconds(row["seconds"]) + ("" if row["verdict"] == "ok" else " (!)"),
                _milliseconds(row.get("floor_seconds")),
                f"{row['spread']:.0%}",
                f"{row['images_per_second']:.2f}" if "images_per_second" in row else "",
                *(_milliseconds(row["phases"].get(phase)) for phase in phases),
                f"{row['peak_bytes'] / 1e6:,.1f}" if "peak_bytes" in row else "",
                f"{row['first_call']:.2f}" if "first_call" in row else "",
                *(f"{row[key]:.0f}" if row.get(key) is not None else "" for key in extra),
            ]
        )
    note = (
        "Medians over the rounds; the spread is the interquartile range over the median, (!) where"
        " it is beyond --max-spread. The floor: its operations at the rate of a"
        " large matrix product of that type."
    )
    if extra:
        note += " Proposals and detections are those of an image."
    return Table(TITLES[section], [*header, "peak MB", "first call, s", *extra], rows, note)


def _ratios(section: str, data: Mapping[str, Any]) -> Table:
    rows = []
    by_pair = {(row["contestant"], row["reference"]): row for row in data["equality"]}
    for row in data["ratios"]:
        equal = by_pair.get((row["contestant"], row["reference"]), {})
        rows.append([row["contestant"], row["reference"], *_told(row), _equal(equal)])
        for phase, inner in row["phases"].items():
            rows.append([f"· {phase}", "", *_told(inner), ""])
    refused = [row for row in data["equality"] if row["verdict"] == "not equal"]
    rows += [
        [row["contestant"], row["reference"], "not timed", "", "", _equal(row)] for row in refused
    ]
    header = ["", "against", "times as fast", "95% interval", "spread", "outputs"]
    note = (
        "The median over the rounds of the other's time over its own, with its bootstrap interval."
        " Outputs: the relative difference, the largest one in full precision and the root mean"
        " square in half."
    )
    return Table(f"{TITLES[section]}: ratios", header, rows, note)


def _told(row: Mapping[str, Any]) -> list[str]:
    if row["value"] is None:
        return ["too wide", f"±{row['width'] / 2:.0%}", f"{row['spread']:.0%}"]
    interval = f"{row['low']:.2f} … {row['high']:.2f}"
    return [f"{row['value']:.2f}×", interval, f"{row['spread']:.0%}"]


def _equal(row: Mapping[str, Any]) -> str:
    verdict = row.get("verdict", "")
    if verdict in ("", "different model"):
        return verdict
    if verdict == "not equal":
        return verdict  # why is said where it is refused
    return f"{verdict}, {row['relative']:.1e}" + (f" ({row['note']})" if row["note"] else "")


def _sweeps(sweeps: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            f"{one['contestant']}: {one['kind']}",
            one["against"],
            *(_power(one["fits"][what]) for what in ("gflops", "seconds", "bytes")),
        ]
        for one in sweeps
    ]
    header = ["", "x", "operations", "seconds", "peak bytes"]
    note = "The power of x that cost grows with, fitted to the logarithms, and how well (R²)."
    return Table("Scaling of the pyramid", header, rows, note)


def _power(fit: Mapping[str, float]) -> str:
    return f"x^{fit['exponent']:.2f} ({fit['r2']:.2f})" if fit else "one point"


def _aps(found: Mapping[str, float]) -> str:
    return ", ".join(f"{task} {value:.1f}" for task, value in found.items())


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.{2 if seconds < 0.1 else 1}f}"


def _machine(report: Mapping[str, Any]) -> Table:
    settings = report["settings"]
    height, width = settings["size"]
    run = {
        "image": f"{height} x {width}, {settings['batch']} at a time, on {settings['device']}",
        "seed": settings["seed"],
        "weights": settings["weights"] or "from the seed, the same for all",
    }
    rows = [
        [key.replace("_", " "), _value(value)]
        for key, value in {**run, **report["machine"]}.items()
    ]
    return Table("Machine and settings", ["", "value"], rows)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
