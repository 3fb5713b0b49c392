"""`fpn show --all`: what the whole catalogue costs on a config's network."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.config import CfgNode

from fpn_plugin.benchmark.catalogue import preset_files
from fpn_plugin.cli import show
from fpn_plugin.pyramid.topologies import TOPOLOGIES
from fpn_plugin.visualize.complexity import measure

SMALL = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
SMALL += ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.WEIGHTS", ""]


def table(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, list[str]], str]:
    """The rows by their first words, and what is printed after them."""
    show.run(show.parse_args(["--all", "--size", "64", "64", *words]))
    text = capsys.readouterr().out
    rows, _, notes = text.partition("  ---")[2].partition("\n\n")
    return {line.split()[0]: line.split() for line in rows.splitlines()[1:]}, notes


def test_all_on_detectron2s_own_config_with_times(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--latency", "--rounds", "1", "--config-file"]
    rows, notes = table(capsys, *words, "COCO-Detection/retinanet_R_50_FPN_1x.yaml", *SMALL)
    assert set(rows) == set(preset_files()) >= set(TOPOLOGIES.names())
    assert rows.pop("bifusion")[1:] == ["–"] and "bifusion: MODEL.FPN.IN_FEATURES: the" in notes
    times = [float(row[-3 if "(" in row[-1] else -2]) for row in rows.values()]
    assert times == sorted(times) and rows["fpn"][-1] == "(1.00…1.00)"
    assert rows["fpn"][1:3] == ["(this", "config)"]
    assert rows["fpn"][3:6] == ["p3", "…", "p7"] and rows["simple"][1] == "p2"
    assert "medians, in turns" in notes


def test_what_a_network_cannot_have_is_a_row_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "_BASE_: [COCO-Detection/fcos_R_50_FPN_1x.yaml, pyramids/bifpn.yaml]\n"
        "MODEL: {FPN: {IN_FEATURES: [res5], REPEATS: 1}, RESNETS: {OUT_FEATURES: [res5]}}\n"
    )
    rows, notes = table(capsys, "--config-file", str(mine), *SMALL)
    without = [name for name, row in rows.items() if row[1:] == ["–"]]
    assert list(rows)[-len(without) :] == without
    assert {"asff", "csp_pan", "hrfpn", "simple"} <= set(without)
    assert "asff: MODEL.FPN.TOPOLOGY: 'asff' needs at least 2 levels" in notes
    assert "simple: MODEL.FPN.IN_FEATURES: the network gives no 'res4', but res5" in notes
    # its own pyramid is none of the catalogue's, and costs what `fpn show` says of it
    cfg: CfgNode = show.load_model_config(str(mine), SMALL)
    cost = measure(show.build(cfg), (64, 64)).pyramid
    assert rows["this"][:2] == ["this", "config"] and f"{cost.parameters:,}" in rows["this"]
    assert f"{cost.flops / 1e9:.2f}" in rows["this"]


def test_flags_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--latency"], ["--all", "--draw", "x.svg"], ["--all", "--rounds", "0"]):
        with pytest.raises(SystemExit):
            show.parse_args(["--config-file", "x.yaml", *words])
    assert "--latency: it goes with --all" in capsys.readouterr().err
