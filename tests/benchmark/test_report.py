"""The report: every section in it, on disk and in the terminal, and what can be read from it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import inspect

from fpn_plugin.benchmark import measure
from fpn_plugin.benchmark.configs import gather_configs
from fpn_plugin.benchmark.inputs import Inputs
from fpn_plugin.benchmark.measure import SCHEMA, measure_section, section_of
from fpn_plugin.benchmark.models import build_models
from fpn_plugin.benchmark.plots import latency_points, neck_shares
from fpn_plugin.benchmark.report import (
    check_folder,
    compare_reports,
    terminal_text,
    write_report,
)
from fpn_plugin.benchmark.tables import ap_summary, headline, outputs_compared, report_tables
from fpn_plugin.benchmark.timing import Plan
from fpn_plugin.report.environment import collect_environment, environment_warnings


def test_every_model_is_in_every_section(report: dict[str, Any]) -> None:
    names = {"baseline base", "fpn", "fpn [bf16]", "bifpn", "bifpn [bf16]"}
    assert set(report["contestants"]) == set(report["counts"]) == names
    for section, data in report["timings"].items():
        assert set(data["times"]) == names, section
        assert all(row["peak_bytes"] > 0 for row in data["times"].values())
        references = {"fpn": ["baseline base"], "fpn [bf16]": ["baseline base", "fpn"]}
        for name, expected in references.items():
            rows = [row for row in data["ratios"] if row["contestant"] == name]
            assert [row["reference"] for row in rows] == expected
            assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    assert report["failures"] == []
    phases = report["timings"]["train"]["times"]["fpn"]["phases"]
    assert set(phases) == {"forward", "backward", "step"}


def test_the_pyramids_share_of_the_whole(report: dict[str, Any]) -> None:
    shares = neck_shares(report)
    assert set(shares) == set(report["contestants"])
    assert shares["fpn"]["pyramid"] == report["timings"]["neck"]["times"]["fpn"]["seconds"]
    seconds = {"neck": 1.0, "backbone": 3.0}
    timings = {name: {"times": {"a": {"seconds": value}}} for name, value in seconds.items()}
    assert neck_shares({"timings": timings}) == {"a": {"network": 2.0, "pyramid": 1.0}}


def test_files(report: dict[str, Any], tmp_path: Path) -> None:
    run = {
        **{"folder": "somewhere", "contestant": "bifpn", "dataset": ["own_val"]},
        "AP": {"bbox": 12.5, "segm": 9.0},
    }
    report = {**report, "runs": [run], "notes": ["<b>bold & bad</b>"], "failures": ["<i>"]}
    page = write_report(report, str(tmp_path / "out"))
    folder = page.parent
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["schema"] == SCHEMA
    text = (folder / "report.md").read_text()
    assert "## Counts" in text and "| fpn " in text and "![" in text
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["latency_ap.png", "ratios.png", "share.png"]
    html = page.read_text()
    assert html.count("<svg") == 3 and "prefers-color-scheme: dark" in html
    plain = re.sub(r"xmlns(:\w+)?=\"[^\"]+\"|url\(#\w+\)", "", html)
    assert not re.search(r"https?:|<script|<link|src=\"(?!data:)|@import|url\(", plain)
    assert html.index(headline(report)[:30]) < html.index("<svg") < html.index("<table")
    for name in report["contestants"]:
        assert name in html
    assert "&lt;b&gt;bold &amp; bad" in html and "<i>" not in html
    seconds = report["timings"]["inference"]["times"]["bifpn"]["seconds"]
    assert latency_points(report) == {"bifpn, bbox": (seconds, 12.5), "bifpn, segm": (seconds, 9.0)}
    other = {**run, "dataset": ["trees_val"]}
    assert latency_points({**report, "runs": [run, other]}) == {}  # of other test sets
    with pytest.raises(FileExistsError, match=re.escape(f"--report {str(folder)!r}")):
        check_folder(str(folder), overwrite=False)
    check_folder(str(folder), overwrite=True)
    check_folder(str(tmp_path / "new"), overwrite=False)
    with pytest.raises(NotADirectoryError):
        check_folder(str(page), overwrite=True)


WIDE = {"value": None, "low": None, "high": None, "width": 0.4}
COPY = {"value": 1.0, "low": 0.96, "high": 1.03, "width": 0.07}


@pytest.mark.parametrize(
    "low, high, noise, result",
    [
        (1.20, 1.40, {}, "faster"),
        (0.80, 0.90, {}, "slower"),
        (0.97, 1.10, {}, "no difference"),
        (1.004, 1.02, {}, "no difference"),  # 1.00 as shown
        (1.01, 1.05, {}, "faster"),
        (1.03, 1.09, COPY, "no difference"),  # a copy of a model was off by 1 / 0.96
        (1.06, 1.09, COPY, "faster"),
        (0.93, 0.95, COPY, "slower"),
        (1.30, 1.39, WIDE, "no difference"),
        (1.41, 1.60, WIDE, "faster"),
    ],
)
def test_results_are_beyond_noise(low: float, high: float, noise: Any, result: str) -> None:
    ratio = {"value": (low + high) / 2, "low": low, "high": high, "rounds": 6}
    assert measure.result_of(ratio, noise) == result
    assert measure.result_of({**ratio, "rounds": 5}, noise) == "too few rounds"
    assert measure.result_of({"value": None}, noise) == "refused"


def test_the_result_in_a_sentence(report: dict[str, Any]) -> None:
    report = copy.deepcopy(report)
    assert "1 rounds, fewer than 6, are too few for a verdict on fpn against" in headline(report)
    rows = report["timings"]["inference"]["ratios"]
    numbers = {"value": 2.0, "low": 1.5, "high": 2.5, "result": "faster"}
    values = {"fpn": numbers, "fpn [bf16]": {**numbers, "result": "slower"}}
    values |= {"bifpn": {**numbers, "result": "no difference"}}
    for row in rows:
        row.update(values.get(row["contestant"], {**numbers, "value": None, "result": "refused"}))
    cpu, threads = report["machine"]["cpu"], report["machine"]["threads"]
    outputs = {
        (row["contestant"], row["reference"]): row["verdict"]
        for row in report["timings"]["inference"]["equality"]
    }["fpn", "baseline base"]
    assert headline(report) == (
        f"On {cpu} ({threads} thread{'s' * (threads > 1)}), in full inference of 2 images of"
        " 64 × 128, fpn is 2.00 times as fast as baseline base (95% interval 1.50 … 2.50; outputs"
        f" {outputs}); fpn [bf16] is slower, 2.00 times as fast as baseline base (95% interval"
        " 1.50 … 2.50; outputs within what bfloat16 rounds); no difference beyond noise is shown by"
        " bifpn against baseline base (2.00 times as fast, 95% interval 1.50 … 2.50; outputs not"
        " compared: other weights); and 1 more below."
    )
    assert ap_summary(report) == "AP was not compared (--weights with --dataset does that)."
    text = outputs_compared(report)
    assert text.startswith("Outputs of random weights (--seed 0) on noise were compared ")
    assert text.endswith(" times they were not, as the models differ by design.")
    for data in report["timings"].values():
        data["equality"] = [row for row in data["equality"] if row["verdict"] == "not compared"]
    assert outputs_compared(report).startswith("No outputs were compared: the models of all ")


def test_the_page_fits_a_narrow_window(report: dict[str, Any], tmp_path: Path) -> None:
    inspection = inspect(write_report(report, str(tmp_path / "out")), 420)
    assert inspection.complaints == []
    assert inspection.needed <= inspection.width == 420
    assert len(inspection.drawings) == 2  # the ratios, and the pyramid's share
    assert all(300 < drawing <= 420 for drawing in inspection.drawings)


def test_terminal(report: dict[str, Any]) -> None:
    text = terminal_text(report)
    assert all(table.title in text for table in report_tables(report))
    assert "· backward" in text and "not compared: other weights" in text


def test_what_differs_is_not_timed(
    configs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs((64, 64))
    models = build_models(gather_configs([configs["fpn"]], baseline=configs["base"]), inputs)
    models["fpn"].model.backbone.fpn_output2.weight.data.mul_(1.01)
    timed: list[str] = []
    real = measure.time_interleaved
    monkeypatch.setattr(
        measure, "time_interleaved", lambda works, *rest: timed.extend(works) or real(works, *rest)
    )
    section = section_of("neck", models, inputs, trained=False)
    measured = measure_section(section, "cpu", Plan(1, 1, 0.001, 0))
    assert timed == ["baseline base"] and measured["ratios"] == []
    text = (
        "neck: the outputs of fpn differ from those of baseline base by more than rounding: p2 is"
    )
    assert measured["failures"][0].startswith(text)
    report = {"timings": {"neck": measured}, "settings": {"weights": "", "seed": 0}}
    assert outputs_compared(report) == (
        "Outputs of random weights (--seed 0) on noise were compared once: 1 differs."
    )


def test_compare(report: dict[str, Any]) -> None:
    assert compare_reports(report, report, 0.01) == ([], [])
    old = copy.deepcopy(report)
    old["counts"]["bifpn"]["neck_gflops"] /= 1.05
    old["counts"]["fpn"]["neck_peak_bytes"] /= 1.05
    old["counts"]["gone"] = dict(old["counts"]["fpn"])
    for row in old["timings"]["neck"]["ratios"]:
        row["value"] *= 1000
    (regression,), warnings = compare_reports(old, report, 0.01)
    assert regression.startswith("bifpn: neck_gflops grew from") and "+5.0%" in regression
    assert warnings[0] == "gone is in the old report only"
    assert warnings[1].startswith("neck: fpn was")  # times are no regression
    assert compare_reports(old, report, 0.06)[0] == []
    old["counts"]["fpn"]["neck_peak_bytes"] /= 1.1
    assert len(compare_reports(old, report, 0.01)[0]) == 2


def test_reports_that_cannot_be_compared(report: dict[str, Any]) -> None:
    other = {**report, "settings": {**report["settings"], "size": [1, 2]}}
    with pytest.raises(ValueError, match=r"--compare: .* size \[1, 2\]"):
        compare_reports(other, report, 0.01)
    with pytest.raises(ValueError, match="--compare: .* no counts"):
        compare_reports({**report, "counts": {}}, report, 0.01)


def test_environment() -> None:
    environment = collect_environment("cpu")
    assert environment["threads"] >= 1 and environment["versions"]["torch"]
    json.dumps(environment)
    assert environment_warnings({**environment, "load_average": 0.0, "commit": "abc"}) == []
    busy = {**environment, "load_average": 3.0 * environment["cores"], "commit": "abc+dirty"}
    warnings = environment_warnings(busy)
    assert "busy" in warnings[0] and "uncommitted" in warnings[1]
