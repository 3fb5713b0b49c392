"""Other packages' pyramids: equal where there is one, and a reason where there is none."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from peers import PEERS, NoPeer, OurPyramid

from fpn_plugin import PyramidBackbone
from fpn_plugin.benchmark.configs import load
from fpn_plugin.benchmark.equality import DIFFERS, compare_outputs
from fpn_plugin.benchmark.models import neck_of

SIZE = (128, 128)
# the heads follow whatever the pyramid gives
HEADS = ["MODEL.RPN.IN_FEATURES", "auto", "MODEL.ROI_HEADS.IN_FEATURES", "auto"]
HEADS += ["MODEL.ANCHOR_GENERATOR.SIZES", "auto"]
WIDTHS = {"res2": 64, "res3": 128, "res4": 256, "res5": 512}


def our_pyramid(configs: dict[str, str], name: str, *opts: str) -> OurPyramid:
    cfg = load(configs[name], [*HEADS, *opts], "cpu")
    torch.manual_seed(0)
    return OurPyramid(PyramidBackbone(cfg, ShapeSpec(channels=3)).eval(), cfg, SIZE)


def maps(ours: OurPyramid) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(2, WIDTHS[name], SIZE[0] >> level, SIZE[1] >> level)
        for name, level in ours.inputs.items()
    }


SIMPLE = ["MODEL.FPN.TOPOLOGY", "simple", "MODEL.FPN.NORM", "LN"]
SIMPLE += ["MODEL.FPN.IN_FEATURES", "('res4',)", "MODEL.RPN.IN_FEATURES", "('p2', 'p3')"]
SIMPLE += ["MODEL.ROI_HEADS.IN_FEATURES", "('p2', 'p3')"]
AVERAGE = ["MODEL.FPN.FUSE_TYPE", "avg", "MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "32"]
THREE = ["MODEL.FPN.IN_FEATURES", "('res3', 'res4', 'res5')"]


@pytest.mark.parametrize(
    "peer, config, opts",
    [
        ("effdet", "bifpn", []),
        ("effdet", "bifpn", THREE),
        ("effdet", "bifpn", ["MODEL.FPN.TOPOLOGY", "qufpn", "MODEL.FPN.REPEATS", "1"]),
        ("detectron2", "fpn", []),
        ("detectron2", "fpn", AVERAGE),
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
    ours = our_pyramid(configs, config, *opts)
    module = PEERS.get(peer)(ours).module
    inputs = maps(ours)
    equality = compare_outputs(module(inputs), neck_of(ours.backbone)(inputs))
    assert equality.verdict != DIFFERS, equality
    assert list(inputs) == list(ours.inputs)  # not changed


@pytest.mark.parametrize(
    "peer, config, opts, text",
    [
        ("effdet", "fpn", [], "MODEL.FPN.TOPOLOGY is 'fpn'; it supports 'bifpn', 'qufpn'"),
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
        PEERS.get(peer)(our_pyramid(configs, config, *opts))


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
        PEERS.get(peer)(our_pyramid(configs, config))


def test_every_peer_is_tested() -> None:
    text = Path(__file__).read_text()
    assert all(f'("{name}", ' in text for name in PEERS.names())
