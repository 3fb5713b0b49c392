"""The report: every section in it, on disk and in the terminal, and what can be read from it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fpn_plugin.analysis.benchmark.compare import compare
from fpn_plugin.analysis.benchmark.contestants import gather
from fpn_plugin.analysis.benchmark.machine import facts, warnings
from fpn_plugin.analysis.benchmark.plots import latency_points, neck_shares
from fpn_plugin.analysis.benchmark.run import SCHEMA, Settings, benchmark
from fpn_plugin.analysis.benchmark.runs import read_runs
from fpn_plugin.analysis.benchmark.section import run_section
from fpn_plugin.analysis.benchmark.sweep import SWEEPS, fit
from fpn_plugin.analysis.benchmark.tables import tables
from fpn_plugin.analysis.benchmark.timing import Plan
from fpn_plugin.analysis.benchmark.write import check_folder, terminal_text, write_report
from fpn_plugin.analysis.report.bar import Bar

FAST = Plan(1, 1, 0.001, 0, max_spread=1e6)


def test_everyone_is_in_every_section(report: dict[str, Any]) -> None:
    names = {"baseline base", "fpn", "fpn [bf16]", "bifpn", "bifpn [bf16]"}
    assert set(report["contestants"]) == set(report["counts"]) == names
    assert list(report["timings"]) == ["neck", "neck_train", "backbone", "inference", "train"]
    for section, data in report["timings"].items():
        assert names <= set(data["times"]), section
        assert all(row["peak_bytes"] > 0 for row in data["times"].values() if "peak_bytes" in row)
    assert report["failures"] == []
    assert report["timings"]["train"]["times"]["fpn"]["phases"].keys() == {
        *("forward", "backward", "step")
    }


def test_pairs_and_their_equality(report: dict[str, Any]) -> None:
    verdicts = {
        (row["contestant"], row["reference"]): row["verdict"]
        for row in report["timings"]["neck"]["equality"]
    }
    assert verdicts["fpn", "baseline base"] == "equal"
    assert verdicts["fpn [bf16]", "fpn"] == "equal"
    assert verdicts["bifpn", "baseline base"] == "different model"
    peers = ["detectron2 FPN (fpn)", "torchvision FeaturePyramidNetwork (fpn)"]
    for contestant, peer in [
        ("fpn", peers[0]),
        ("fpn", peers[1]),
        ("bifpn", "effdet BiFpn (bifpn)"),
    ]:
        assert verdicts[contestant, peer] == verdicts[f"{contestant} [bf16]", peer] == "equal"
    ratios = {(row["contestant"], row["reference"]) for row in report["timings"]["neck"]["ratios"]}
    assert ratios - set(verdicts) == {
        (name, f"convolutions of {name} alone") for name in report["contestants"]
    }
    for row in report["timings"]["neck"]["ratios"]:
        assert row["low"] <= row["value"] <= row["high"]


def test_why_there_is_no_peer_is_said(report: dict[str, Any]) -> None:
    assert any("fpn has no peer in effdet: MODEL.FPN.TOPOLOGY" in note for note in report["notes"])


def test_the_pyramids_share_of_the_whole(report: dict[str, Any]) -> None:
    times = {section: data["times"] for section, data in report["timings"].items()}
    shares = neck_shares(times)
    assert set(shares) == set(report["contestants"])
    assert shares["fpn"]["pyramid"] == times["neck"]["fpn"]["seconds"]
    made = {"neck": {"a": {"seconds": 1.0}}, "backbone": {"a": {"seconds": 3.0}}}
    assert neck_shares(made) == {"a": {"network": 2.0, "pyramid": 1.0}}


def test_files(report: dict[str, Any], tmp_path: Path) -> None:
    page = write_report(report, str(tmp_path / "out"))
    folder = page.parent
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["schema"] == SCHEMA
    text = (folder / "report.md").read_text()
    assert "## Counts" in text and "| fpn " in text and "![" in text
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["share.png"]
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 1 and "prefers-color-scheme: dark" in html
    assert not re.search(r"https?:|<script|<link|src=\"(?!data:)|@import|url\(", html)
    for name in report["contestants"]:
        assert name in html
    with pytest.raises(FileExistsError, match="--report .* holds a report; give --overwrite"):
        check_folder(str(folder), overwrite=False)
    check_folder(str(folder), overwrite=True)
    check_folder(str(tmp_path / "new"), overwrite=False)
    with pytest.raises(NotADirectoryError):
        check_folder(str(page), overwrite=True)


def test_terminal(report: dict[str, Any]) -> None:
    text = terminal_text(report)
    for title in [table.title for table in tables(report)]:
        assert title in text
    assert "· backward" in text and "different model" in text


def test_html_is_escaped(report: dict[str, Any], tmp_path: Path) -> None:
    made = {**report, "notes": ["<b>bold & bad</b>"], "failures": ["<i>"]}
    html = write_report(made, str(tmp_path)).read_text()
    assert "&lt;b&gt;bold &amp; bad" in html and "<i>" not in html


def test_a_ratio_that_is_too_wide_is_not_told(configs: dict[str, str]) -> None:
    plan = Plan(2, 2, 0.0, 0, max_spread=0.0)
    settings = Settings([configs["fpn"]], baseline=configs["base"], size=(64, 64), plan=plan)
    made = benchmark(Settings(**{**settings.__dict__, "what": ["neck"]}), Bar(quiet=True))
    (row,) = made["timings"]["neck"]["ratios"]
    assert row["value"] is row["low"] is row["high"] is None and row["verdict"] == "too wide"
    assert any(
        "neck: fpn against baseline base is too wide after 2 rounds" in x for x in made["failures"]
    )
    assert "too wide" in terminal_text(made) and "REFUSED neck: fpn" in terminal_text(made)


def test_what_differs_is_not_timed(
    configs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fpn_plugin.analysis.benchmark import section
    from fpn_plugin.analysis.benchmark.entrants import build_all
    from fpn_plugin.analysis.benchmark.inputs import Inputs

    inputs = Inputs((64, 64))
    entrants = build_all(gather([configs["fpn"]], baseline=configs["base"]), inputs)
    entrants["fpn"].model.backbone.fpn_output2.weight.data.mul_(1.01)
    settings = Settings([configs["fpn"]], plan=FAST)
    timed: list[str] = []
    real = section.race
    monkeypatch.setattr(
        section, "race", lambda works, *rest: timed.extend(works) or real(works, *rest)
    )
    found = run_section("neck", entrants, [], inputs, settings, Bar(quiet=True))
    assert timed == ["baseline base"] and found["ratios"] == []
    assert "neck: fpn does not equal baseline base: p2 is off by" in found["failures"][0]


def test_runs(configs: dict[str, str], tmp_path: Path, report: dict[str, Any]) -> None:
    contestants = gather([configs["fpn"], configs["bifpn"]], baseline="none")
    cfg = contestants[1].cfg.clone()
    cfg.MODEL.WEIGHTS = "somewhere.pth"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    lines = [
        {"iteration": 1, "total_loss": 2.0},
        {"bbox/AP": 10.0},
        {"bbox/AP": 12.5, "segm/AP": 9.0},
    ]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    (run,) = read_runs([str(tmp_path)], contestants)
    assert run["contestant"] == "bifpn" and run["AP"] == {"bbox": 12.5, "segm": 9.0}
    points = latency_points({**report, "runs": [run]})
    seconds = report["timings"]["inference"]["times"]["bifpn"]["seconds"]
    assert points == {"bifpn, bbox": (seconds, 12.5), "bifpn, segm": (seconds, 9.0)}
    write_report({**report, "runs": [run]}, str(tmp_path / "out"))
    assert (tmp_path / "out" / "latency_ap.png").is_file()


def test_runs_that_do_not_fit(configs: dict[str, str], tmp_path: Path) -> None:
    contestants = gather([configs["fpn"]], baseline="none")
    with pytest.raises(FileNotFoundError, match="has no metrics.json: it is no run's folder"):
        read_runs([str(tmp_path)], contestants)
    cfg = contestants[0].cfg.clone()
    cfg.MODEL.FPN.OUT_CHANNELS = 99
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "metrics.json").write_text('{"total_loss": 1.0}\n')
    with pytest.raises(ValueError, match="its metrics.json holds no AP"):
        read_runs([str(tmp_path)], contestants)
    (tmp_path / "metrics.json").write_text('{"bbox/AP": 1.0}\n')
    with pytest.raises(
        ValueError, match="the nearest is fpn, which differs in MODEL.FPN.OUT_CHANNELS"
    ):
        read_runs([str(tmp_path)], contestants)


def test_fit_finds_the_power_and_the_line() -> None:
    found = fit([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert found["exponent"] == pytest.approx(1.5) and found["factor"] == pytest.approx(3)
    assert found["r2"] == pytest.approx(1)
    found = fit([1, 2, 3], [5.0, 7.0, 9.0])
    assert (found["start"], found["slope"]) == (pytest.approx(3), pytest.approx(2))
    assert fit([2, 2], [1, 2]) == {}


@pytest.mark.parametrize("kind", SWEEPS)
def test_sweeps(configs: dict[str, str], report: dict[str, Any], tmp_path: Path, kind: str) -> None:
    size = (128, 256) if kind == "size" else (64, 64)
    what: dict[str, Any] = {"size": size, "plan": FAST, "baseline": "none", "what": []}
    made = benchmark(Settings([configs["fpn"]], sweeps=[kind], **what), Bar(quiet=True))
    (one,) = made["sweeps"]
    x = [point["x"] for point in one["points"]]
    assert len(x) >= 3 and x == sorted(set(x))
    flops = [point["gflops"] for point in one["points"]]
    assert flops == sorted(flops) and all(point["bytes"] > 0 for point in one["points"])
    assert one["fits"]["gflops"]["r2"] > 0.9
    if kind == "size":  # maps grow with pixels, and so does all work on them
        assert one["fits"]["gflops"]["exponent"] == pytest.approx(1, abs=0.01)
    html = write_report({**report, "sweeps": [one]}, str(tmp_path)).read_text()
    assert (tmp_path / f"sweep_1_{kind}.png").is_file() and "x^" in html


def test_a_baseline_cannot_be_swept(configs: dict[str, str]) -> None:
    settings = Settings([configs["base"]], baseline="none", what=[], sweeps=["width"], plan=FAST)
    with pytest.raises(ValueError, match="--sweep width: base has MODEL.BACKBONE.NAME"):
        benchmark(settings, Bar(quiet=True))


def test_compare(report: dict[str, Any]) -> None:
    assert compare(report, report, 0.01) == ([], [])
    old = copy.deepcopy(report)
    old["counts"]["bifpn"]["neck_gflops"] /= 1.05
    old["counts"]["fpn"]["neck_peak_bytes"] /= 1.05
    old["counts"]["gone"] = dict(old["counts"]["fpn"])
    regressions, told = compare(old, report, 0.01)
    (text,) = regressions
    assert text.startswith("bifpn: neck_gflops grew from") and "+5.0%" in text
    assert told == ["gone is in the old report only"]
    assert compare(old, report, 0.06)[0] == []
    old["counts"]["fpn"]["neck_peak_bytes"] /= 1.1
    assert len(compare(old, report, 0.01)[0]) == 2


def test_slower_is_only_told(report: dict[str, Any]) -> None:
    old = copy.deepcopy(report)
    for row in old["timings"]["neck"]["ratios"]:
        row["value"] *= 1000
    regressions, told = compare(old, report, 0.01)
    assert regressions == [] and any("neck: fpn was" in text for text in told)


def test_reports_that_cannot_be_compared(report: dict[str, Any]) -> None:
    other = {**report, "settings": {**report["settings"], "size": [1, 2]}}
    with pytest.raises(ValueError, match=r"was made with size \[1, 2\], this one with"):
        compare(other, report, 0.01)
    with pytest.raises(ValueError, match="no counts of the same config"):
        compare({**report, "counts": {}}, report, 0.01)


def test_machine() -> None:
    known = facts("cpu")
    assert known["threads"] >= 1 and known["versions"]["torch"] and known["OMP_WAIT_POLICY"]
    json.dumps(known)
    calm = {**known, "load_average": 0.0, "commit": "abc"}
    assert warnings(calm) == []
    busy = {**known, "load_average": 3.0 * known["cores"], "commit": "abc+dirty"}
    assert "busy" in warnings(busy)[0] and "uncommitted" in warnings(busy)[1]
