"""The table of fusion weights, and the checkpoints that it is read from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import CHANNELS, small_pyramid
from torch import nn

from fpn_plugin.cli.main import main
from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.graph import Graph, node, op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.visualize.fusion_weights import fusion_table, fusion_weights, load_backbone

CONFIG = """
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  BACKBONE: {NAME: build_pyramid_backbone}
  BOTTOM_UP: {WEIGHTS: there-is-no-such-file.pth}
  RESNETS: {OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], EXTRA_LEVELS: maxpool}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6]}
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5]}
"""
NOTES = {
    **dict.fromkeys(("sum", "avg", "max", "product", "stack"), "nothing is learned"),
    "concat": "a convolution of all inputs",
    **dict.fromkeys(
        ("global_attention", "asff", "gate", "attention", "freq"), "depends on the input"
    ),
}


def test_every_fusion_is_listed_with_its_weights() -> None:
    nodes = [
        node(name, 4, ["res4", "res5"], fuse=name, block="conv1x1") for name in FUSIONS.names()
    ]
    nodes.append(node("last", 4, FUSIONS.names(), fuse="channel_fast"))
    pyramid = Pyramid(Graph({"res4": 4, "res5": 5}, tuple(nodes), ("last",)), CHANNELS, Defaults(4))
    pyramid.get_submodule("weighted_fuse").weights.data = torch.tensor([2.0, -0.5])
    pyramid.get_submodule("channel_softmax_fuse").weights.data = torch.tensor(
        [[0.0] * 4, [0.0, 50.0] * 2]
    )
    fusions = fusion_weights(pyramid)
    assert list(fusions) == [*FUSIONS.names(), "last"]
    assert {name: fusion.note for name, fusion in fusions.items() if fusion.note} == NOTES
    assert all((fusion.weights is None) is bool(fusion.note) for fusion in fusions.values())
    assert fusions["weighted"].means() == [2.0, -0.5] and fusions["sum"].means() == []
    assert fusions["channel_softmax"].means() == pytest.approx([0.25, 0.75])
    assert fusions["last"].inputs == tuple(FUSIONS.names())
    rows = [" ".join(line.split()) for line in fusion_table(pyramid).splitlines()]
    assert rows[0] == "node fusion input weight"
    at = rows.index("weighted weighted res4 2.0000")
    assert rows[at + 1] == "res5 -0.5000"
    at = rows.index("channel_softmax channel_softmax res4 0.2500 ± 0.2500")
    assert rows[at + 1] == "res5 0.7500 ± 0.2500"
    assert "asff asff res4 depends on the input" in rows


def test_a_pyramid_without_fusion_has_no_table() -> None:
    graph = Graph({"res4": 4}, (node("a", 4, ["res4"], block="conv1x1"),), ("a",))
    assert (
        fusion_table(Pyramid(graph, CHANNELS, Defaults(8))) == "no node of the pyramid fuses maps"
    )


@pytest.mark.parametrize("prefix, wrapped", [("", False), ("backbone.", True)])
def test_checkpoints_of_both_kinds_are_read(prefix: str, wrapped: bool, tmp_path: Path) -> None:
    trained, fresh = (small_pyramid(fuse=op("softmax")) for _ in range(2))
    state = {prefix + name: x for name, x in trained.state_dict().items()}
    state["roi_heads.weight"] = torch.zeros(1)
    torch.save({"model": state, "iteration": 3} if wrapped else state, tmp_path / "m.pth")
    load_backbone(fresh, str(tmp_path / "m.pth"))
    assert fusion_table(fresh) == fusion_table(trained)


@pytest.mark.parametrize(
    "module, message",
    [
        (nn.Linear(2, 2), "^--weights: nothing in .*m.pth matches the network"),
        (small_pyramid(), "^--weights: .* other fusions: it has no fpn_merge2_fuse.weights, .*"),
        (
            small_pyramid(fuse=op("channel_fast")),
            r"^--weights: .* does not fit: fpn_merge\d_fuse.weights is \(2, 32\) in the file",
        ),
    ],
)
def test_other_checkpoints_are_an_error(module: nn.Module, message: str, tmp_path: Path) -> None:
    torch.save(module.state_dict(), tmp_path / "m.pth")
    with pytest.raises(ValueError, match=message):
        load_backbone(small_pyramid(fuse=op("softmax")), str(tmp_path / "m.pth"))


def test_a_missing_checkpoint_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="^--weights: there is no file 'none.pth'"):
        load_backbone(small_pyramid(), "none.pth")


def test_show_pyramid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    weights = torch.tensor([1.0, 3.0])
    state = {f"backbone.fpn_merge{level}_fuse.weights": weights for level in (2, 3, 4)}
    torch.save({"model": state, "optimizer": {"state": {}}, "iteration": 7}, tmp_path / "m.pth")
    drawn = tmp_path / "fpn.svg"
    args = ["--config-file", tmp_path / "config.yaml", "--size", 100, 128, "--draw", drawn]
    args += ["--weights", tmp_path / "m.pth", "MODEL.FPN.FUSE_TYPE", "fast_normalized"]
    main(["show", *map(str, args)])
    out = capsys.readouterr().out
    assert "3,344,390 parameters" in out  # 3,344,384 and two weights of each fusion
    assert "128 x 128 pixels" in out and "build_resnet_backbone" in out
    for name in ("fpn_lateral2", "fpn_merge4", "fpn_output5", "top_block.p6"):
        assert name in out and f">{name}<" in drawn.read_text()
    maps = {line[:2]: line for line in out.splitlines() if line[:1] == "p" and line[1:2].isdigit()}
    assert list(maps) == ["p2", "p3", "p4", "p5", "p6"]
    assert maps["p2"].endswith("MODEL.RPN.IN_FEATURES, MODEL.ROI_HEADS.IN_FEATURES")
    assert maps["p6"].endswith(" MODEL.RPN.IN_FEATURES")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    at = lines.index("fpn_merge2 fast_normalized fpn_lateral2 0.2500")
    assert lines[at + 1] == "fpn_merge3 0.7500" and ">0.75<" in drawn.read_text()
