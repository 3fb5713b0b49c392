"""Pixel statistics of whole models: a run's checkpoint, what the network cannot take, what is
built, what the configs of this repository come to."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from pixel_configs import (
    DEFAULT,
    FAIR,
    HALF,
    MSRA,
    RGB,
    config,
    pixels,
    resolved,
    stating,
    weight_file,
)

from fpn_plugin import add_fpn_config, resolve_config
from fpn_plugin.config.pixels import resolve_pixels


def run_folder(folder: Path, name: str = "torchvision/resnet50", values: tuple = RGB) -> str:
    """The checkpoint of a run, beside its config.yaml."""
    (folder / "config.yaml").write_text(config(name, "gone.pth", *stating(values)).dump())
    return str(folder / "model_final.pth")


@pytest.mark.parametrize("weights", ["", "timm"])
@pytest.mark.parametrize("values", [HALF, DEFAULT])
@pytest.mark.parametrize("ending", ["", "?matching_heuristics=True"])
def test_a_runs_checkpoint_has_the_pixels_of_its_config(
    weights: str, values: tuple, ending: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    final = run_folder(tmp_path, "timm/resnet50.a1_in1k", values) + ending
    cfg = config("timm/resnet50", weights, "MODEL.WEIGHTS", final)
    assert f"taken from the run's config of MODEL.WEIGHTS {final}" in resolved(cfg, log)
    assert pixels(cfg) == values
    cfg = config("timm/resnet50", weights, "MODEL.WEIGHTS", final, *stating(RGB))
    assert resolved(cfg, log).startswith("WARNING") and pixels(cfg) == RGB


def test_a_checkpoint_may_be_another_than_model_weights(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    file = run_folder(tmp_path)
    cfg = config("torchvision/resnet50", "", "MODEL.WEIGHTS", MSRA)
    assert pixels(resolve_config(cfg, file)) == RGB
    assert f"taken from the run's config of checkpoint {file}" in log.text
    (tmp_path / "config.yaml").unlink()
    log.clear()
    cfg = config("torchvision/resnet50", "", "MODEL.WEIGHTS", MSRA)
    assert pixels(resolve_config(cfg, file)) == DEFAULT
    assert f"what checkpoint {file} was trained with is not known" in log.text


def test_detectron2s_own_runs_count(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    zoo = get_cfg()
    zoo.merge_from_list(stating(FAIR))
    (tmp_path / "config.yaml").write_text(zoo.dump())
    cfg = config("build_resnet_backbone", "", "MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    resolve_pixels(cfg)
    assert pixels(cfg) == FAIR


def test_a_run_with_another_network_does_not_count(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    final = run_folder(tmp_path, "build_resnet_backbone", HALF)
    cfg = config("torchvision/swin_t", "torchvision", "MODEL.WEIGHTS", final)
    resolve_pixels(cfg)
    assert pixels(cfg) == RGB
    assert "is of a run with build_resnet_backbone, not with torchvision/swin_t" in log.text


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", "MODEL: {}", "a: !!python/name:os.system", "MODEL: {PIXEL_MEAN: x}"]
)
def test_a_config_that_is_no_runs_is_left_out(
    text: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    cfg = config("build_resnet_backbone", "", "MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    assert "not known (no run's config.yaml is beside it)" in resolved(cfg, log)


SWIN = "detectron2://ImageNetPretrained/swin/swin_tiny.pth"
PYCLS = "https://dl.fbaipublicfiles.com/pycls/dds/RegNetX.pyth"


@pytest.mark.parametrize(
    "name, weights, expected",
    [
        ("build_swin_backbone", SWIN, RGB),
        ("build_regnet_backbone", PYCLS, FAIR),
        ("timm/resnet50", "https://x/y.pth", RGB),
        ("torchvision/resnet50", "torchvision", RGB),
        ("torchvision/resnet50", "", DEFAULT),
    ],
)
def test_model_weights_of_another_network_do_not_count(
    name: str, weights: str, expected: tuple, log: pytest.LogCaptureFixture
) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    cfg = config(name, weights, "MODEL.WEIGHTS", MSRA)
    resolve_pixels(cfg)
    assert pixels(cfg) == expected
    warning = f"MODEL.WEIGHTS {MSRA} has no tensor of the network {name}: its pixels do not count"
    assert log.records[0].levelname == "WARNING" and log.records[0].getMessage() == warning


def test_model_weights_count_for_the_network_that_they_fit(log: pytest.LogCaptureFixture) -> None:
    cfg = config("build_regnet_backbone", "", "MODEL.WEIGHTS", PYCLS)
    assert "taken from MODEL.WEIGHTS" in resolved(cfg, log) and pixels(cfg) == FAIR
    cfg = config("build_resnet_backbone", "", "MODEL.WEIGHTS", PYCLS)
    resolve_pixels(cfg)
    assert pixels(cfg) == DEFAULT and "has no tensor of the network" in log.text
    cfg = config("build_my_own", "", "MODEL.WEIGHTS", PYCLS)  # it may have any names
    assert "taken from MODEL.WEIGHTS" in resolved(cfg, log) and pixels(cfg) == FAIR


@pytest.mark.parametrize("builder", ["build_pyramid_backbone", "build_bottom_up_backbone"])
def test_a_model_is_not_built_before(
    builder: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    file = weight_file(tmp_path, "layer1.0.conv1.weight")
    cfg = config("torchvision/resnet18", file)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RPN.IN_FEATURES = builder, ["res4"]
    message = (
        r"MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, INPUT.FORMAT: .* torchvision's transforms of resnet18"
        rf" .*PIXEL_MEAN \[{RGB[0][0]}.*call fpn_plugin.resolve_config\(cfg\)"
    )
    build = BACKBONE_REGISTRY.get(builder)
    with pytest.raises(ValueError, match=message):
        build(cfg, ShapeSpec(channels=3))
    assert not log.records and pixels(cfg) == DEFAULT
    cfg = config(
        "torchvision/resnet18", "", "MODEL.WEIGHTS", run_folder(tmp_path, "torchvision/resnet18")
    )
    with pytest.raises(ValueError, match="the run's config of MODEL.WEIGHTS"):
        build_backbone(cfg)


def test_a_model_is_built_where_resolving_changes_nothing(log: pytest.LogCaptureFixture) -> None:
    heads = ["MODEL.RPN.IN_FEATURES", ["p4"], "MODEL.ROI_HEADS.IN_FEATURES", ["p4"]]
    maps = ["res2", "res3", "res4", "res5"]
    heads += ["MODEL.RESNETS.OUT_FEATURES", maps, "MODEL.FPN.IN_FEATURES", maps]
    for others in (
        [],  # no weights
        ["MODEL.WEIGHTS", MSRA],  # the defaults are right
        ["MODEL.WEIGHTS", "https://x/y.pth"],  # not known
        ["MODEL.WEIGHTS", "detectron2://ImageNetPretrained/torchvision/R-50.pkl", *stating(HALF)],
        [
            *("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/torchvision/R-50.pkl"),
            *("MODEL.BOTTOM_UP.PIXELS", "config"),
        ],
    ):
        build_backbone(config("build_resnet_backbone", "", *heads, *others))


CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "backbones"
PINNED = {
    "mask_rcnn_MViTv2_T_FPN_1x": RGB,
    "mask_rcnn_R_101_FPN_1x": DEFAULT,
    "mask_rcnn_RegNetX_4GF_FPN_1x": FAIR,
    "mask_rcnn_Swin_T_FPN_1x": RGB,
    "mask_rcnn_ViT_B_Simple_1x": RGB,
    "mask_rcnn_timm_ConvNeXt_T_FPN_1x": RGB,
    "mask_rcnn_timm_DINOv2_S_Feature2Pyramid_FPN_1x": RGB,
    "mask_rcnn_timm_DINOv3_S_Projector_1x": RGB,
    "mask_rcnn_timm_DINOv3_S_STA_Hybrid_1x": RGB,
    "mask_rcnn_timm_EfficientNetV2_S_FPN_1x": HALF,
    "mask_rcnn_timm_HRNet_W32_FPN_1x": RGB,
    "mask_rcnn_timm_MobileNetV3_L_FPN_1x": RGB,
    "mask_rcnn_timm_RegNetY_4GF_FPN_1x": RGB,
    "mask_rcnn_timm_ResNeXt_50_FPN_1x": RGB,
    "mask_rcnn_timm_ViT_S_Simple_1x": HALF,
    "mask_rcnn_torchvision_ConvNeXt_T_FPN_1x": RGB,
    "mask_rcnn_torchvision_EfficientNetV2_S_FPN_1x": RGB,
    "mask_rcnn_torchvision_MobileNetV3_L_FPN_1x": RGB,
    "mask_rcnn_torchvision_R_50_FPN_1x": RGB,
}


def test_every_backbones_config_is_pinned() -> None:
    assert sorted(PINNED) == sorted(file.stem for file in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", PINNED)
def test_the_pixels_of_the_backbones_configs(name: str, log: pytest.LogCaptureFixture) -> None:
    if "_timm_" in name:
        pytest.importorskip("timm")
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"  # no line of a GPU that is not there
    assert pixels(resolve_config(cfg)) == PINNED[name]
    assert [record.levelname for record in log.records] == ["INFO"]
