#!/usr/bin/env python3
"""The targets on a GPU, beside what is measured: tests/benchmarks/run.py in parts, and one table.

targets.py --output DIR --limit 300                the GPU; writes DIR/targets.md and targets.json
targets.py --output DIR --device cpu --tiny        a rehearsal of all parts, in which no number counts

A part that fails or takes longer than its share of --limit is named in the table, and the others
run. Exit code 1: one did.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from benchmark_configs import write_configs  # noqa: E402
from floors import alone_name, floors_table  # noqa: E402

from fpn_plugin.benchmark.report import without_nan  # noqa: E402
from fpn_plugin.report.tables import Table  # noqa: E402

MASK_RCNN = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
D0 = ROOT / "configs/COCO-Detection/retinanet_R_50_BiFPN_D0_1x.yaml"
# configs/presets/fast_gpu.yaml, as far as a model alone has it
FAST = "MODEL.CHANNELS_LAST True SOLVER.AMP.ENABLED True SOLVER.FUSED True TEST.FOLD_NORMS True"
NECK = "MODEL.CHANNELS_LAST True TEST.FOLD_NORMS True"
COMPILED = "MODEL.COMPILE pyramid"
AMP = "SOLVER.AMP.ENABLED True"
QUICK = ["--rounds", "1", "--min-sample", "0", "--max-spread", "1e9"]
EFFDET = "effdet"


@dataclass(frozen=True)
class Part:
    """One call of tests/benchmarks/run.py.

    Attributes:
        config: "fpn", with Detectron2's own in mixed precision as baseline, or "bifpn", without.
        what: the sections.
        words: more of the command line.
        opts: `KEY VALUE …` of the config.
        needs: a package, without which the part is left out.
    """

    config: str
    batch: int
    what: str
    words: Sequence[str]
    opts: str
    needs: str = ""

    def command(self, device: str, tiny: Mapping[str, str], report: str) -> list[str]:
        """Its command line.

        Args:
            tiny: the files of a rehearsal by name; none for the real ones.
        """
        config = tiny.get(self.config) or str(MASK_RCNN if self.config == "fpn" else D0)
        with_baseline = self.config == "fpn" and "neck" not in self.what
        words = ["--config-file", config, "--device", device, "--what", self.what, *self.words]
        words += ["--batch", str(min(self.batch, 2) if tiny else self.batch), "--quiet"]
        words += ["--baseline", tiny.get("base", "auto") if with_baseline else "none"]
        words += ["--baseline-opts", AMP] if with_baseline else []
        real = ("800", "1333") if self.config == "fpn" else ("512", "512")
        words += ["--image-size", *(("64", "96") if tiny else real), "--report", report]
        words += QUICK if tiny else ["--rounds", "8"]
        return [sys.executable, str(ROOT / "tests/benchmarks/run.py"), *words, *self.opts.split()]


_LEVERS = ("--variant", f"compiled: {COMPILED}")
_PRECISIONS = (
    *_LEVERS,
    "--variant",
    f"amp: {AMP}",
    "--variant",
    f"amp, compiled: {AMP} {COMPILED}",
)
PARTS = {
    "training, batch 8": Part("fpn", 8, "train", _LEVERS, FAST),
    "inference, batch 8": Part("fpn", 8, "inference", _LEVERS, FAST),
    "training, batch 1": Part("fpn", 1, "train", _LEVERS, FAST),
    "inference, batch 1": Part("fpn", 1, "inference", _LEVERS, FAST),
    "fpn": Part("fpn", 8, "counts,neck,backbone", ("--floors", *_LEVERS), FAST),
    "bifpn": Part(
        "bifpn",
        8,
        "counts,neck,neck_train",
        ("--peers", EFFDET, "--floors", *_PRECISIONS),
        NECK,
        EFFDET,
    ),
}


@dataclass(frozen=True)
class Target:
    """A ratio of times that is to be reached.

    Attributes:
        text: what is measured.
        part: of PARTS.
        section: of its report.
        reference: how the name of what it is compared with begins; its convolutions if `at_most`.
        bound: the ratio; None where none was set.
        at_most: whether it is the time over the reference's, which may be `bound` at most; else the
            reference's time over it, which must be that much at least.
        precision: that the config must have; "" for any.
    """

    text: str
    part: str
    section: str
    reference: str
    bound: float | None
    at_most: bool = False
    precision: str = ""


DETECTRON2 = "Detectron2's, in its own mixed precision"
TARGETS = [
    *(
        Target(f"Mask R-CNN R50-FPN, {part}, beside {DETECTRON2}", part, section, "baseline", bound)
        for section, bound in (("train", 1.4), ("inference", 1.6))
        for part in PARTS
        if PARTS[part].what == section
    ),
    Target("fpn's time over its convolutions'", "fpn", "neck", "", 1.1, at_most=True),
    *(
        Target(f"bifpn{what}, {precision or 'any precision'}, beside effdet's in float32", "bifpn", section, EFFDET, bound, False, precision)
        for section, what in (("neck", ""), ("neck_train", " forward and backward"))
        for precision, bound in (("float32", 3.0 if section == "neck" else None), ("", None))
    ),
]  # fmt: skip


def row_of(target: Target, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: the best of the config and its variants.

    Args:
        outcome: of the part: "report", or "failure": why there is none.
    """
    row: dict[str, Any] = {"what": target.text, "target": target.bound, "at_most": target.at_most}
    if "report" not in outcome:
        return {**row, "verdict": outcome["failure"]}
    data = outcome["report"]["timings"][target.section]
    found = []
    for ratio in data["ratios"]:
        name = ratio["contestant"]
        prefix = alone_name(name) if target.at_most else target.reference
        same = target.precision in ("", data["times"][name]["precision"])
        if not (same and ratio["reference"].startswith(prefix) and ratio["value"]):
            continue
        values = [ratio[key] for key in ("value", "low", "high")]
        if target.at_most:
            values = [1 / values[0], 1 / values[2], 1 / values[1]]
        found.append((values, name, data["times"][name]["seconds"]))
    if not found:
        return {**row, "verdict": "refused: see the part's messages"}
    (value, low, high), name, seconds = (min if target.at_most else max)(found)
    row.update(value=value, low=low, high=high, by=name, seconds=seconds)
    return {**row, "verdict": verdict(target, value, low, high)}


def verdict(target: Target, value: float, low: float, high: float) -> str:
    """Whether a target is met, and whether the interval leaves that open."""
    if target.bound is None:
        return ""
    is_met = value <= target.bound if target.at_most else value >= target.bound
    text = "met" if is_met else "missed"
    return f"{text}, within the interval" if low < target.bound < high else text


def targets_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows, as text."""

    def cells(row: Mapping[str, Any]) -> Iterator[str]:
        yield row["what"]
        sign = "≤" if row["at_most"] else "≥"
        yield f"{sign} {row['target']:g}" if row["target"] else ""
        yield f"{row['value']:.2f}" if "value" in row else ""
        yield f"{row['low']:.2f} to {row['high']:.2f}" if "value" in row else ""
        yield f"{1000 * row['seconds']:.3g} ms, {row['by']}" if "value" in row else ""
        yield row["verdict"]

    header = ["", "target", "measured", "95% interval", "by", ""]
    return Table("Targets", header, [list(cells(row)) for row in rows])


def run_part(part: Part, command: Sequence[str], report: Path, limit: float) -> dict[str, Any]:
    """Its "report", and "failure": what went wrong, if anything did."""
    if part.needs and not importlib.util.find_spec(part.needs):
        return {"failure": f"left out: {part.needs} is not installed"}
    start = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment(), timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return {"failure": f"stopped after {limit:.0f} s"}
    outcome: dict[str, Any] = {"seconds": time.monotonic() - start}
    if code:
        outcome["failure"] = f"exit code {code}" + ": a ratio was refused" * (code == 2)
    if report.is_file():
        outcome["report"] = json.loads(report.read_text())
    return outcome


def environment() -> dict[str, str]:
    """With this checkout before what is installed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


def write(outcomes: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> str:
    """Write both files, anew after each part; the text for people."""
    rows = [row_of(target, outcomes[target.part]) for target in TARGETS if target.part in outcomes]
    reports = {name: outcome["report"] for name, outcome in outcomes.items() if "report" in outcome}
    machine = next((report["machine"] for report in reports.values()), {})
    where = machine.get("gpu") or machine.get("cpu", "no part has a report")
    tables = [targets_table(rows)]
    for name, report in reports.items():
        if (table := floors_table(report)).rows:
            tables.append(table)
    lines = [
        f"# Targets, {where}",
        "",
        ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items()),
        "",
    ]
    if args.tiny:
        lines += ["A rehearsal with tiny models: no number here counts.", ""]
    for table in tables:
        lines += [f"## {table.title}", "", table.text("github"), "", table.note, ""]
    for name, outcome in outcomes.items():
        lines += [f"{name}: {outcome['failure']}", ""] if "failure" in outcome else []
        for text in outcome.get("report", {}).get("failures", []):
            lines += [f"{name}: REFUSED {text}", ""]
    args.output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    (args.output / "targets.md").write_text(text, encoding="utf-8")
    content = {"rows": rows, "machine": machine, "parts": outcomes}
    json_text = json.dumps(without_nan(content), indent=1, allow_nan=False)
    (args.output / "targets.json").write_text(json_text, encoding="utf-8")
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="a rehearsal")
    add("--limit", type=float, default=420, metavar="S", help="seconds for all (default: 420)")
    add("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    outcomes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_configs(Path(folder)) if args.tiny else {}
        end = time.monotonic() + args.limit
        for number, name in enumerate(args.only):
            report = Path(folder, str(number))
            limit = (end - time.monotonic()) / (len(args.only) - number)
            print(f"== {name}, at most {limit:.0f} s", flush=True)
            command = PARTS[name].command(args.device, tiny, str(report))
            outcomes[name] = run_part(PARTS[name], command, report / "report.json", limit)
            text = write(outcomes, args)
    print(text)
    return int(any("failure" in each for each in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
