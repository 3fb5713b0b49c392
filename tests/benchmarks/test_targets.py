"""The targets on a GPU: which ratio is read as what, and a rehearsal of the tests there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import targets
from floors import alone_name
from targets import PARTS, TARGETS, Target, row_of, run_part, targets_table, verdict

from fpn_plugin.benchmark.measure import COUNTS
from fpn_plugin.benchmark.options import argument_parser, split_names
from fpn_plugin.benchmark.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]


def ratio(contestant: str, reference: str, value: float | None) -> dict[str, Any]:
    ends = {"low": value and value - 0.1, "high": value and value + 0.1}
    return {"contestant": contestant, "reference": reference, "value": value, **ends}


def outcome(section: str, *ratios: dict[str, Any]) -> dict[str, Any]:
    names = {row[key] for row in ratios for key in ("contestant", "reference")}
    precision = {name: "float16" if "amp" in name else "float32" for name in names}
    times = {name: {"seconds": 0.25, "precision": precision[name]} for name in names}
    return {"report": {"timings": {section: {"times": times, "ratios": list(ratios)}}}}


def test_the_best_is_taken() -> None:
    target = Target("x", "p", "train", "baseline", 1.4)
    fast = [ratio("fpn", "baseline y", 1.3), ratio("fpn [compiled]", "baseline y", 1.6)]
    row = row_of(target, outcome("train", *fast, ratio("fpn [compiled]", "fpn", 9.0)))
    assert (row["by"], row["value"], row["verdict"]) == ("fpn [compiled]", 1.6, "met")
    assert targets_table([row]).rows == [
        ["x", "≥ 1.4", "1.60", "1.50 to 1.70", "250 ms, fpn [compiled]", "met"]
    ]
    refused = row_of(target, outcome("train", ratio("fpn", "baseline y", None)))
    assert refused["verdict"].startswith("refused") and "value" not in refused
    left_out = row_of(target, {"failure": "left out: it is not installed"})
    assert targets_table([left_out]).rows[0][-1] == "left out: it is not installed"


def test_precision_and_a_time_that_is_to_be_low() -> None:
    target = Target("x", "p", "neck", "effdet", 3.0, precision="float32")
    both = [ratio("bifpn", "effdet BiFpn", 2.0), ratio("bifpn [amp]", "effdet BiFpn", 4.0)]
    assert row_of(target, outcome("neck", *both))["by"] == "bifpn"
    assert row_of(Target("x", "p", "neck", "effdet", 3.0), outcome("neck", *both))["value"] == 4
    low = Target("x", "p", "neck", "", 1.1, at_most=True)
    alone = [
        ratio("fpn", alone_name("fpn"), 0.8),
        ratio("fpn [amp]", alone_name("fpn [amp]"), 0.95),
    ]
    row = row_of(low, outcome("neck", *alone, ratio("fpn [amp]", "fpn", 2.0)))
    assert row["value"] == pytest.approx(1 / 0.95) and row["low"] < row["value"] < row["high"]
    assert row["by"] == "fpn [amp]" and row["verdict"] == "met, within the interval"


@pytest.mark.parametrize(
    "value, low, high, text",
    [
        (1.5, 1.45, 1.6, "met"),
        (1.5, 1.3, 1.6, "met, within the interval"),
        (1.3, 1.2, 1.5, "missed, within the interval"),
        (1.3, 1.2, 1.35, "missed"),
    ],
)
def test_verdicts(value: float, low: float, high: float, text: str) -> None:
    assert verdict(Target("x", "p", "train", "b", 1.4), value, low, high) == text
    assert verdict(Target("x", "p", "train", "b", None), value, low, high) == ""


def test_every_part_is_measured_for_a_target() -> None:
    assert {target.part for target in TARGETS} == set(PARTS)
    bounds = [target.bound for target in TARGETS if target.bound]
    assert sorted(bounds) == [1.1, 1.4, 1.4, 1.6, 1.6, 3.0]
    for target in TARGETS:
        assert target.section in PARTS[target.part].what.split(",")


@pytest.mark.parametrize("name", PARTS)
def test_the_command_of_a_part(name: str, configs: dict[str, str]) -> None:
    for tiny in ({}, configs):
        command = PARTS[name].command("cuda", tiny, "report")
        parser = argument_parser("")
        for flag in ("--peers", "--sweep"):  # what run.py adds
            parser.add_argument(flag, default="")
        parser.add_argument("--floors", action="store_true")
        args = parser.parse_args(command[2:])
        assert Path(args.config_file[0]).is_file() and args.device == "cuda"
        assert split_names("--what", args.what, [COUNTS, *WORKLOADS.names()])
        assert args.image_size == (
            [64, 96] if tiny else [512, 512] if name == "bifpn" else [800, 1333]
        )
        assert args.batch == (2 if tiny else 8) or name.endswith("batch 1")
        has_baseline = args.baseline != "none"
        assert has_baseline == ("batch" in name) == ("AMP" in args.baseline_opts)


def test_a_part_that_fails_or_takes_too_long(tmp_path: Path) -> None:
    part = PARTS["training, batch 1"]

    def run(code: str, limit: float = 60) -> dict[str, Any]:
        return run_part(part, [sys.executable, "-c", code], tmp_path / "report.json", limit)

    assert run("raise SystemExit(2)")["failure"] == "exit code 2: a ratio was refused"
    assert run("import time; time.sleep(60)", 0.5)["failure"] == "stopped after 0 s"
    done = run("open('%s', 'w').write('{}')" % (tmp_path / "report.json"))
    assert done["report"] == {} and "failure" not in done
    missing = targets.Part("fpn", 1, "train", (), "", needs="no_such_package")
    assert "no_such_package is not installed" in run_part(missing, [], tmp_path, 1)["failure"]


def test_a_preset_is_what_is_measured() -> None:
    text = (ROOT / "configs" / "presets" / "fast_gpu.yaml").read_text()
    keys = {key.rpartition(".")[2] for key in targets.FAST.split()[::2]} - {"ENABLED"}
    in_preset = set(re.findall(r"(\w+): True", text)) - {"ENABLED", "PIN_MEMORY"}
    assert keys == in_preset and "AMP" in text  # benchmarks have no loader


# one of each test that a GPU has, as far as seconds allow: a typing error costs time there
REHEARSED = [
    "test_pyramids.py::test_equal_to_the_cpu[topology bifpn]",
    "test_pyramids.py::test_half_precision[fuse asff-bf16]",
    "test_pyramids.py::test_compiled[fuse fast_normalized]",
    "test_pyramids.py::test_a_copy_on_the_device_leaves_the_first",
    "test_training.py::test_a_detector_as_on_the_cpu",
    "test_training.py::test_mixed_precision[bf16]",
    "test_training.py::test_resume[RetinaNet]",
    "test_training.py::test_a_step_that_is_not_finite",
]


def test_a_rehearsal(tmp_path: Path) -> None:
    tests = [f"tests/gpu/{name}" for name in REHEARSED]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *tests,
        "--device",
        "cpu",
        f"--basetemp={tmp_path / 't'}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{len(REHEARSED)} passed" in done.stdout or "." * len(REHEARSED) in done.stdout
