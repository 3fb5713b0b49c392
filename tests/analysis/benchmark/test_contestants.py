"""Who takes part: configs, variants, baselines, and the messages where something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fpn_plugin.analysis.benchmark.contestants import (
    find_baseline,
    gather,
    load,
    short_names,
    zoo_name,
)

ROOT = Path(__file__).parents[3]
MASK = str(ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")


@pytest.mark.parametrize(
    "opts, name",
    [
        ([], "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"),
        (["MODEL.MASK_ON", "False"], "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
        (["MODEL.KEYPOINT_ON", "True"], "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"),
        (
            [
                "MODEL.ROI_HEADS.NAME",
                "CascadeROIHeads",
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
                "True",
            ],
            "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
        ),
        (
            ["MODEL.META_ARCHITECTURE", "PanopticFPN"],
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
        ),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
    ],
)
def test_the_baseline_has_the_same_head(opts: list[str], name: str) -> None:
    cfg = load(MASK, opts, "cpu")
    assert zoo_name(cfg) == name
    baseline = load(find_baseline(name), [], "cpu")
    assert baseline.MODEL.META_ARCHITECTURE == cfg.MODEL.META_ARCHITECTURE
    assert baseline.MODEL.BACKBONE.NAME.endswith("resnet_fpn_backbone")


def test_no_baseline_for_an_unknown_head() -> None:
    cfg = load(MASK, ["MODEL.META_ARCHITECTURE", "Mine"], "cpu")
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE: 'Mine' .* --baseline none"):
        zoo_name(cfg)


def test_baseline_is_as_shipped_and_variants_build_on_the_overrides() -> None:
    variants = [
        "cl: MODEL.CHANNELS_LAST True",
        "both: MODEL.CHANNELS_LAST True MODEL.MASK_ON False",
    ]
    base, plain, first, second = gather([MASK], ["MODEL.FPN.OUT_CHANNELS", "64"], variants)
    assert [base.kind, plain.kind, first.kind] == ["baseline", "config", "variant"]
    assert base.name == "baseline mask_rcnn_R_50_FPN_1x" and base.overrides == ()
    assert base.source == "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    assert base.cfg.MODEL.FPN.OUT_CHANNELS == 256 and plain.cfg.MODEL.FPN.OUT_CHANNELS == 64
    assert first.name == "mask_rcnn_R_50_FPN_1x [cl]"
    assert first.cfg.MODEL.CHANNELS_LAST and not plain.cfg.MODEL.CHANNELS_LAST
    assert second.cfg.MODEL.FPN.OUT_CHANNELS == 64 and not second.cfg.MODEL.MASK_ON
    assert plain.references == (base.name,) and first.references == (base.name, plain.name)
    assert all(one.cfg.MODEL.WEIGHTS == "" for one in (base, plain, first))


def test_baseline_options_and_none() -> None:
    opts = ["SOLVER.AMP.ENABLED", "True"]
    base, plain = gather([MASK], baseline_opts=opts)
    assert base.cfg.SOLVER.AMP.ENABLED and not plain.cfg.SOLVER.AMP.ENABLED
    (alone,) = gather([MASK], baseline="none")
    assert alone.references == ()


@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_baseline_by_name(suffix: str) -> None:
    path = find_baseline(f"COCO-Detection/retinanet_R_50_FPN_3x{suffix}")
    assert Path(path).name == "retinanet_R_50_FPN_3x.yaml"
    assert find_baseline(MASK) == MASK


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"baseline": "COCO/nothing"}, FileNotFoundError, "--baseline 'COCO/nothing' is neither"),
        ({"variants": ["no colon"]}, ValueError, "--variant 'no colon' is not of the form"),
        ({"variants": ["name:"]}, ValueError, "is not of the form 'NAME: KEY VALUE"),
        ({"variants": ["a: MODEL.CHANELS_LAST True"]}, KeyError, "did you mean"),
        ({"variants": ["a: SEED 1", "a: SEED 2"]}, ValueError, r"are called .*\[a\]'"),
        ({"opts": ["SEED"]}, ValueError, "pairs KEY VALUE; 'SEED'"),
        ({"files": ["nothing.yaml"]}, FileNotFoundError, "'nothing.yaml' does not exist"),
    ],
)
def test_mistakes(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        gather(**{"files": [MASK], **arguments})


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_names(["a/x.yaml", "a/y.yaml"]) == ["x", "y"]
    assert short_names(["a/x.yaml", "b/x.yaml"]) == ["a/x", "b/x"]
