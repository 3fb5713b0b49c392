"""Configs, variants and baselines, training runs of them, and the errors where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fpn_plugin.benchmark.configs import (
    find_baseline,
    gather_configs,
    load,
    read_runs,
    short_names,
    zoo_name,
)

ROOT = Path(__file__).parents[2]
MASK = str(ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")


@pytest.mark.parametrize(
    "opts, name",
    [
        ("", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"),
        ("MODEL.MASK_ON False", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
        ("MODEL.KEYPOINT_ON True", "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"),
        (
            "MODEL.ROI_HEADS.NAME CascadeROIHeads MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True",
            "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
        ),
        (
            "MODEL.META_ARCHITECTURE PanopticFPN",
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
        ),
        ("MODEL.META_ARCHITECTURE RetinaNet", "COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
    ],
)
def test_the_baseline_has_the_same_head(opts: str, name: str) -> None:
    cfg = load(MASK, opts.split(), "cpu")

    assert zoo_name(cfg) == name
    baseline = load(find_baseline(name), [], "cpu")
    assert baseline.MODEL.META_ARCHITECTURE == cfg.MODEL.META_ARCHITECTURE
    assert baseline.MODEL.BACKBONE.NAME.endswith("resnet_fpn_backbone")


def test_no_baseline_for_an_unknown_head() -> None:
    cfg = load(MASK, ["MODEL.META_ARCHITECTURE", "Mine"], "cpu")
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE: 'Mine'"):
        zoo_name(cfg)


def test_baseline_is_as_shipped_and_variants_build_on_the_overrides() -> None:
    variants = [
        "cl: MODEL.CHANNELS_LAST True",
        "both: MODEL.CHANNELS_LAST True MODEL.MASK_ON False",
    ]
    base, plain, first, second = gather_configs([MASK], ["MODEL.FPN.OUT_CHANNELS", "64"], variants)
    assert [base.role, plain.role, first.role] == ["baseline", "config", "variant"]
    assert base.name == "baseline mask_rcnn_R_50_FPN_1x" and base.overrides == ()
    assert base.source == "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    assert base.cfg.MODEL.FPN.OUT_CHANNELS == 256 and plain.cfg.MODEL.FPN.OUT_CHANNELS == 64
    assert first.name == "mask_rcnn_R_50_FPN_1x [cl]"
    assert first.cfg.MODEL.CHANNELS_LAST and not plain.cfg.MODEL.CHANNELS_LAST
    assert second.cfg.MODEL.FPN.OUT_CHANNELS == 64 and not second.cfg.MODEL.MASK_ON
    assert plain.references == (base.name,) and first.references == (base.name, plain.name)
    assert all(config.cfg.MODEL.WEIGHTS == "" for config in (base, plain, first))


def test_baseline_options_and_none() -> None:
    opts = ["SOLVER.AMP.ENABLED", "True"]
    base, plain = gather_configs([MASK], baseline_opts=opts)
    assert base.cfg.SOLVER.AMP.ENABLED and not plain.cfg.SOLVER.AMP.ENABLED
    (alone,) = gather_configs([MASK], baseline="none")
    assert alone.references == ()


@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_baseline_by_name(suffix: str) -> None:
    path = find_baseline(f"COCO-Detection/retinanet_R_50_FPN_3x{suffix}")
    assert Path(path).name == "retinanet_R_50_FPN_3x.yaml"
    assert find_baseline(MASK) == MASK


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"baseline": "COCO/nothing"}, FileNotFoundError, "--baseline 'COCO/nothing'"),
        ({"variants": ["no colon"]}, ValueError, "--variant 'no colon'"),
        ({"variants": ["name:"]}, ValueError, "--variant 'name:'"),
        ({"variants": ["a: MODEL.CHANELS_LAST True"]}, KeyError, "MODEL.CHANELS_LAST"),
        ({"variants": ["a: SEED 1", "a: SEED 2"]}, ValueError, r"\[a\]'"),
        ({"opts": ["SEED"]}, ValueError, "'SEED'"),
        ({"files": ["nothing.yaml"]}, FileNotFoundError, "'nothing.yaml'"),
    ],
)
def test_mistakes(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        gather_configs(**{"files": [MASK], **arguments})


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["a/x.yaml", "a/y.yaml"]) == ["x", "y"]
    assert short_names(["a/x.yaml", "b/x.yaml"]) == ["a/x", "b/x"]


def write_run(folder: Path, cfg: Any, *metrics: dict[str, float]) -> str:
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, metrics)))
    return str(folder)


def test_runs(configs: dict[str, str], tmp_path: Path) -> None:
    """A run belongs to the config with its model, wherever it started from; its last AP counts."""
    candidates = gather_configs([configs["fpn"], configs["bifpn"]], baseline="none")
    cfg = candidates[1].cfg.clone()
    cfg.MODEL.WEIGHTS = "somewhere.pth"
    losses, first = {"iteration": 1, "total_loss": 2.0}, {"bbox/AP": 10.0}
    folder = write_run(tmp_path, cfg, losses, first, {"bbox/AP": 12.5, "segm/AP": 9.0})
    ap = {"bbox": 12.5, "segm": 9.0}
    assert read_runs([folder], candidates) == [
        {"folder": folder, "contestant": "bifpn", "dataset": list(cfg.DATASETS.TEST), "AP": ap}
    ]


def test_runs_that_do_not_fit(configs: dict[str, str], tmp_path: Path) -> None:
    candidates = gather_configs([configs["fpn"]], baseline="none")
    with pytest.raises(FileNotFoundError, match="--runs .* has no metrics.json"):
        read_runs([str(tmp_path)], candidates)
    cfg = candidates[0].cfg.clone()
    cfg.MODEL.FPN.OUT_CHANNELS = 99
    with pytest.raises(ValueError, match="metrics.json holds no AP"):
        read_runs([write_run(tmp_path, cfg, {"total_loss": 1.0})], candidates)
    with pytest.raises(ValueError, match="fpn, which differs in MODEL.FPN.OUT_CHANNELS"):
        read_runs([write_run(tmp_path, cfg, {"bbox/AP": 1.0})], candidates)
