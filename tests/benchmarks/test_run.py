"""The developers' benchmark: peers, floors, sweeps and start-up, and the report of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import floors
import pytest
import startup
from startup import FLOOR, OURS, THEIRS, import_work
from sweeps import SWEEPS, fit

from fpn_plugin.benchmark.equality import BIT_EQUAL, FLOAT32
from fpn_plugin.benchmark.timing import no_lap

FAST = ["--rounds", 1, "--max-spread", 1e9, "--min-sample", 0, "--quiet"]


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The script in this process; its exit code."""
    spec = importlib.util.spec_from_file_location("run", Path(__file__).with_name("run.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, args)])
    return module.main()


def test_peers_and_floors(
    configs: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        floors, "ceilings", lambda device: {"float32_gflops": 50.0, "copy_gbytes": 9.0}
    )
    args = ["--config-file", configs["fpn"], "--config-file", configs["bifpn"], *FAST]
    args += ["--baseline", "none", "--image-size", 64, 64, "--batch", 2, "--report", tmp_path]
    args += ["--what", "counts,neck,neck_train", "--peers", "effdet,detectron2", "--floors"]
    args += ["--variant", "cl: MODEL.CHANNELS_LAST True"]
    assert call(monkeypatch, *args) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    alone = {name: f"convolutions of {name} alone" for name in report["contestants"]}
    for section in ("neck", "neck_train"):
        data = report["timings"][section]
        equal = {
            (row["contestant"], row["reference"])
            for row in data["equality"]
            if row["verdict"] in (BIT_EQUAL, FLOAT32)
        }
        assert equal == {
            *(("fpn [cl]", "fpn"), ("bifpn [cl]", "bifpn")),
            *(("fpn", "detectron2 FPN (fpn)"), ("fpn [cl]", "detectron2 FPN (fpn)")),
            *(("bifpn", "effdet BiFpn (bifpn)"), ("bifpn [cl]", "effdet BiFpn (bifpn)")),
        }
        pairs = {(row["contestant"], row["reference"]) for row in data["ratios"]}
        # convolutions alone are timed, but give nothing to compare
        assert pairs - equal == (set(alone.items()) if section == "neck" else set())
    assert any("fpn has no peer in effdet: MODEL.FPN.TOPOLOGY" in x for x in report["notes"])
    times = report["timings"]["neck"]["times"]
    assert times[alone["fpn"]]["convolutions"] == 8
    gflops = report["counts"]["fpn"]["neck_gflops"]
    assert times["fpn"]["floor_seconds"] == pytest.approx(2 * gflops / 50)
    assert times["fpn"]["gflops"] == pytest.approx(2 * gflops / times["fpn"]["seconds"])
    # two maps read and written by 1x1 and 3x3 convolutions: more than the maps of the result
    assert times[alone["fpn"]]["gigabytes"] > 2 * 16 * 64 * 64 / 16 * 4 / 1e9
    moved = times[alone["fpn"]]["gigabytes"] / times["fpn"]["seconds"]
    assert times["fpn"]["gbytes"] == pytest.approx(moved)
    assert "## Floors" in (tmp_path / "report.md").read_text()


def test_sweeps(configs: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    points = {"WIDTHS": (8, 16, 32), "REPEATS": (1, 2, 3), "SCALES": (0.5, 1.0, 2.0)}
    for name, values in points.items():
        monkeypatch.setattr(f"sweeps.{name}", values)
    args = ["--config-file", configs["fpn"], "--baseline", "none", "--image-size", 64, 128, *FAST]
    args += ["--what", "counts", "--sweep", ",".join(SWEEPS), "--report", tmp_path]
    assert call(monkeypatch, *args) == 0
    sweeps = json.loads((tmp_path / "report.json").read_text())["sweeps"]
    assert [swept["kind"] for swept in sweeps] == list(SWEEPS)
    for number, swept in enumerate(sweeps, 1):
        x = [point["x"] for point in swept["points"]]
        assert len(x) == 3 and x == sorted(set(x))
        gflops = [point["gflops"] for point in swept["points"]]
        assert gflops == sorted(gflops) and all(point["bytes"] > 0 for point in swept["points"])
        assert swept["fits"]["gflops"]["r2"] > 0.9
        if swept["kind"] == "size":  # maps grow with pixels, and so does all work on them
            assert swept["fits"]["gflops"]["exponent"] == pytest.approx(1, abs=0.01)
        assert (tmp_path / f"sweep_{number}_{swept['kind']}.png").is_file()
    assert "## Scaling of the pyramid" in (tmp_path / "report.md").read_text()


def test_fit_finds_the_power_and_the_line() -> None:
    fitted = fit([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert fitted["exponent"] == pytest.approx(1.5) and fitted["factor"] == pytest.approx(3)
    assert fitted["r2"] == pytest.approx(1)
    fitted = fit([1, 2, 3], [5.0, 7.0, 9.0])
    assert (fitted["start"], fitted["slope"]) == (pytest.approx(3), pytest.approx(2))
    assert fit([2, 2], [1, 2]) == {}


def test_startup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(startup, "import_work", lambda line: lambda lap: ran.append(line))
    args = ["--startup", "--rounds", 2, "--max-spread", 1e9, "--min-sample", 0, "--quiet"]
    assert call(monkeypatch, *args, "--report", tmp_path / "out") == 0
    assert ran[-6:] == [THEIRS, FLOOR, OURS, OURS, FLOOR, THEIRS]  # interleaved
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["startup"]["ratios"]
    pairs = [(row["contestant"], row["reference"]) for row in rows]
    assert pairs == [(OURS, THEIRS), (OURS, FLOOR)]
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    texts = [capsys.readouterr().out]
    texts += [(tmp_path / "out" / f"report.{suffix}").read_text() for suffix in ("md", "html")]
    for text in texts:
        assert startup.TITLE in text and all(line in text for line in (OURS, THEIRS, FLOOR))


def test_an_import_in_a_process_of_its_own() -> None:
    import_work("import json")(no_lap)
    with pytest.raises(subprocess.CalledProcessError):
        import_work("import no_such_module")(no_lap)


def test_ceilings() -> None:
    rates = floors.ceilings("cpu", sizes=[64], megabytes=1)
    assert list(rates) == ["float32_gflops", "bfloat16_gflops", "copy_gbytes"]
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize(
    "config, args, error, text",
    [
        ("fpn", ["--peers", "effdat"], KeyError, "--peers: unknown name 'effdat'.*'effdet'"),
        ("fpn", ["--sweep", "colour"], KeyError, "--sweep: unknown name 'colour'"),
        ("base", ["--sweep", "width"], ValueError, "--sweep width: base .*MODEL.BACKBONE.NAME"),
    ],
)
def test_mistakes(
    configs: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    config: str,
    args: list[str],
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error, match=text):
        call(monkeypatch, "--config-file", configs[config], "--baseline", "none", *args)
