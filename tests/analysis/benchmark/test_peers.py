"""Other packages' pyramids: equal where there is one, and a reason where there is none."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec

from fpn_plugin import PyramidBackbone
from fpn_plugin.analysis.benchmark.contestants import load
from fpn_plugin.analysis.benchmark.equality import EQUAL, compare_outputs
from fpn_plugin.analysis.benchmark.neck import neck_of
from fpn_plugin.analysis.benchmark.peers import PEERS, NoPeer, Ours

SIZE = (128, 256)
# the heads follow whatever the pyramid gives
HEADS = ["MODEL.RPN.IN_FEATURES", "auto", "MODEL.ROI_HEADS.IN_FEATURES", "auto"]
HEADS += ["MODEL.ANCHOR_GENERATOR.SIZES", "auto"]
WIDTHS = {"res2": 64, "res3": 128, "res4": 256, "res5": 512}


def ours(configs: dict[str, str], name: str, *opts: str) -> Ours:
    cfg = load(configs[name], [*HEADS, *opts], "cpu")
    torch.manual_seed(0)
    return Ours(PyramidBackbone(cfg, ShapeSpec(channels=3)).eval(), cfg, SIZE)


def maps(made: Ours) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(2, WIDTHS[name], SIZE[0] >> level, SIZE[1] >> level)
        for name, level in made.inputs.items()
    }


SIMPLE = [
    "MODEL.FPN.TOPOLOGY",
    "simple",
    "MODEL.FPN.NORM",
    "LN",
    "MODEL.FPN.IN_FEATURES",
    "('res4',)",
]
SIMPLE += ["MODEL.RPN.IN_FEATURES", "('p2', 'p3')", "MODEL.ROI_HEADS.IN_FEATURES", "('p2', 'p3')"]
THREE = ["MODEL.FPN.IN_FEATURES", "('res3', 'res4', 'res5')"]


@pytest.mark.parametrize(
    "peer, config, opts",
    [
        ("effdet", "bifpn", []),
        ("effdet", "bifpn", THREE),
        ("effdet", "bifpn", ["MODEL.FPN.TOPOLOGY", "qufpn", "MODEL.FPN.REPEATS", "1"]),
        ("detectron2", "fpn", []),
        (
            "detectron2",
            "fpn",
            ["MODEL.FPN.FUSE_TYPE", "avg", "MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "32"],
        ),
        ("detectron2", "fpn", ["MODEL.FPN.EXTRA_LEVELS", "conv_c5"]),
        ("detectron2", "fpn", ["MODEL.FPN.EXTRA_LEVELS", "conv_p5", *THREE]),
        ("detectron2", "fpn", ["MODEL.FPN.EXTRA_LEVELS", "none"]),
        ("detectron2", "fpn", SIMPLE),
        ("torchvision", "fpn", []),
        ("torchvision", "fpn", ["MODEL.FPN.EXTRA_LEVELS", "conv_c5", *THREE]),
        ("torchvision", "fpn", ["MODEL.FPN.EXTRA_LEVELS", "none"]),
    ],
)
@torch.no_grad()
def test_equal(configs: dict[str, str], peer: str, config: str, opts: list[str]) -> None:
    made = ours(configs, config, *opts)
    module = PEERS.get(peer)(made).module
    given = maps(made)
    found = compare_outputs(module(given), neck_of(made.backbone)(given))
    assert found.verdict == EQUAL, found
    assert list(given) == list(made.inputs)  # not changed


@pytest.mark.parametrize(
    "peer, config, opts, text",
    [
        ("effdet", "fpn", [], "MODEL.FPN.TOPOLOGY is 'fpn', and it knows 'bifpn', 'qufpn'"),
        ("effdet", "bifpn", ["MODEL.FPN.FUSE_TYPE", "softmax"], "MODEL.FPN.FUSE_TYPE is 'softmax'"),
        ("detectron2", "bifpn", [], "MODEL.FPN.TOPOLOGY is 'bifpn'"),
        ("detectron2", "fpn", ["MODEL.FPN.REPEATS", "2"], "MODEL.FPN.REPEATS is 2"),
        ("torchvision", "fpn", ["MODEL.FPN.NORM", "BN"], "MODEL.FPN.NORM is 'BN'"),
        ("torchvision", "fpn", ["MODEL.FPN.EXTRA_LEVELS", "conv_p5"], "EXTRA_LEVELS is 'conv_p5'"),
        ("mmdet", "fpn", ["MODEL.FPN.UPSAMPLE", "bilinear"], "MODEL.FPN.UPSAMPLE is 'bilinear'"),
    ],
)
def test_no_peer(
    configs: dict[str, str], peer: str, config: str, opts: list[str], text: str
) -> None:
    with pytest.raises(NoPeer, match=text):
        PEERS.get(peer)(ours(configs, config, *opts))


@pytest.mark.parametrize(
    "peer, config, package", [("mmdet", "fpn", "mmdet"), ("effdet", "bifpn", "effdet")]
)
def test_a_package_that_is_not_installed(
    configs: dict[str, str], monkeypatch: pytest.MonkeyPatch, peer: str, config: str, package: str
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=f"--peers {peer} needs .*install"):
        PEERS.get(peer)(ours(configs, config))


def test_every_peer_is_tested() -> None:
    text = Path(__file__).read_text()
    assert all(f'("{name}", ' in text for name in PEERS.names())
