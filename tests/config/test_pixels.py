"""Pixel statistics follow the weights unless the config sets them, and the log says which."""

from __future__ import annotations

import logging
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2 import model_zoo
from detectron2.config import get_cfg
from pixel_configs import (
    DEFAULT,
    FAIR,
    HALF,
    MSRA,
    QUICKSTART,
    RGB,
    config,
    pixels,
    resolved,
    stating,
    weight_file,
)

from fpn_plugin import resolve_config
from fpn_plugin.config.pixels import resolve_pixels
from fpn_plugin.config.validate import check_pixels


@pytest.mark.parametrize(
    "name, weights, expected",
    [
        ("timm/resnet50", "timm", RGB),
        ("timm/resnet50.a1_in1k", "https://x/y.safetensors", RGB),
        ("timm/tf_efficientnet_lite0", "no/such/file.pth", HALF),
        ("timm/resnet50", MSRA, DEFAULT),
        ("torchvision/resnet50", "torchvision", RGB),
        ("torchvision/swin_t", "https://x/y.pth", RGB),
        ("build_resnet_backbone", MSRA, DEFAULT),
        ("build_resnet_backbone", "detectron2://ImageNetPretrained/MSRA/R-101.pkl", DEFAULT),
        ("build_resnet_backbone", "weights/MSRA/R-50.pkl", DEFAULT),
        ("build_resnet_backbone", "catalog://ImageNetPretrained/FAIR/X-101-32x8d", DEFAULT),
        ("build_resnet_backbone", "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl", FAIR),
        ("build_regnet_backbone", "https://dl.fbaipublicfiles.com/pycls/dds/RegNetX.pyth", FAIR),
        ("build_resnet_backbone", "detectron2://ImageNetPretrained/torchvision/R-50.pkl", RGB),
        ("build_resnet_backbone", "https://download.pytorch.org/models/resnet50-1.pth", RGB),
        ("build_swin_backbone", "detectron2://ImageNetPretrained/swin/swin_tiny.pth", RGB),
        ("build_swin_backbone", "https://x/SwinTransformer/storage/v1/swin_tiny.pth", RGB),
    ],
)
def test_known_weights(
    name: str, weights: str, expected: tuple, log: pytest.LogCaptureFixture
) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    cfg = config(name, weights)
    line = resolved(cfg, log)
    assert pixels(cfg) == expected
    assert line.startswith(f"INFO PIXEL_MEAN {expected[0]}, PIXEL_STD {expected[1]}, INPUT.FORMAT")
    assert ": taken from " in line
    # once more: the config now has them
    assert resolved(cfg, log).startswith("INFO")
    assert pixels(cfg) == expected


@pytest.mark.parametrize("name", ["timm/resnet50", "build_resnet_backbone"])
def test_without_weights_the_config_stays(name: str, log: pytest.LogCaptureFixture) -> None:
    cfg = config(name)
    assert "MODEL.BOTTOM_UP.WEIGHTS is empty" in (line := resolved(cfg, log))
    assert line.startswith("INFO") and pixels(cfg) == DEFAULT


@pytest.mark.parametrize(
    "name, weights, final, because",
    [
        (
            "build_resnet_backbone",
            "",
            "no/model_final.pth",
            "what MODEL.WEIGHTS no/model_final.pth was trained with is not known",
        ),
        ("timm/resnet50", "", "https://x/y.pth", "what MODEL.WEIGHTS https://x/y.pth was trained"),
        ("build_resnet_backbone", "https://x/y.pth", "", "https://x/y.pth was trained with is not"),
        ("timm/no_such_model", "timm", "", "was trained with is not known"),
        ("timm/resnet50.no_such_tag", "timm", "", "was trained with is not known"),
        ("torchvision/no_such_model", "torchvision", "", "was trained with is not known"),
    ],
)
def test_unknown_weights_leave_the_config_with_a_warning(
    name: str, weights: str, final: str, because: str, log: pytest.LogCaptureFixture
) -> None:
    cfg = config(name, weights, "MODEL.WEIGHTS", final)
    line = resolved(cfg, log)
    assert pixels(cfg) == DEFAULT
    assert line.startswith("WARNING") and ": the config's; " in line and because in line
    assert "Set MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT, or say" in line
    cfg.MODEL.PIXEL_STD = [2.0, 2.0, 2.0]  # it was decided
    assert resolved(cfg, log).startswith("INFO")


def test_model_weights_count_too_and_come_last(log: pytest.LogCaptureFixture) -> None:
    final = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    cfg = config("build_resnet_backbone", "", "MODEL.WEIGHTS", final)
    assert f"taken from MODEL.WEIGHTS {final}" in resolved(cfg, log)
    assert pixels(cfg) == RGB
    cfg = config("build_resnet_backbone", "w.pth", "MODEL.WEIGHTS", MSRA)
    resolve_pixels(cfg)
    assert pixels(cfg) == DEFAULT
    assert f"MODEL.WEIGHTS {MSRA} is loaded after MODEL.BOTTOM_UP.WEIGHTS w.pth" in log.text


def test_timms_weights_of_one_network_may_differ(log: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("timm")
    cfg = config("timm/resnet50d", "no_such.pth")
    resolve_pixels(cfg)
    assert pixels(cfg) == RGB
    assert "name it so in MODEL.BOTTOM_UP.NAME (timm/resnet50d.ra4_e3600_r224_in1k)" in log.text
    for name, weights, expected in (
        ("timm/resnet50d.ra4_e3600_r224_in1k", "no_such.pth", HALF),
        ("timm/resnet50d", "timm", RGB),  # its default
    ):
        cfg = config(name, weights)
        assert "pretrained_cfg of resnet50d.ra" in resolved(cfg, log)
        assert pixels(cfg) == expected


@pytest.mark.parametrize("strides, warnings", [(True, 1), (False, 0)])
def test_torchvisions_stride_placement(
    strides: bool, warnings: int, log: pytest.LogCaptureFixture
) -> None:
    weights = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    resolve_pixels(config("build_resnet_backbone", weights, "MODEL.RESNETS.STRIDE_IN_1X1", strides))
    assert log.text.count("MODEL.RESNETS.STRIDE_IN_1X1 is True, but according to") == warnings


DETECTRON2S = "backbone.bottom_up.res2.0.conv1.weight"


@pytest.mark.parametrize(
    "name, tensor, message, expected",
    [
        ("build_resnet_backbone", "module.layer1.0.conv1.weight", "INFO.* torchvision, whose", RGB),
        ("build_resnet_backbone", DETECTRON2S, "WARNING", DEFAULT),
        ("timm/resnet50", DETECTRON2S, "WARNING", DEFAULT),
        ("torchvision/resnet50", DETECTRON2S, "WARNING", DEFAULT),
    ],
)
def test_the_names_in_a_file(
    name: str, tensor: str, message: str, expected: tuple, tmp_path: Path, log: Any
) -> None:
    cfg = config(name, weight_file(tmp_path, tensor))
    assert re.match(message, resolved(cfg, log)) and pixels(cfg) == expected


@pytest.mark.parametrize("name", ["build_resnet_backbone", "timm/resnet50", "torchvision/resnet50"])
@pytest.mark.parametrize("key", ["MODEL.BOTTOM_UP.WEIGHTS", "MODEL.WEIGHTS"])
@pytest.mark.parametrize("author, expected", [("torchvision", RGB), ("Caffe2", DEFAULT)])
def test_the_author_of_a_pickle(
    author: str,
    expected: tuple,
    key: str,
    name: str,
    tmp_path: Path,
    log: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "w.pkl"
    array = np.zeros(1, np.float32)
    model = {"res2_0_branch2a_w" if author == "Caffe2" else "res2.0.conv1.weight": array}
    file.write_bytes(pickle.dumps({"model": model, "__author__": author}))
    cfg = config(name, "", key, str(file), "MODEL.PIXEL_STD", [1.0, 1.0, 1.0])
    line = resolved(cfg, log) if key != "MODEL.WEIGHTS" or name[:5] == "build" else ""
    if line:
        assert pixels(cfg) == expected and line.startswith("INFO") and "taken from" in line
        return
    resolve_pixels(cfg)  # Detectron2 loads it by the names of its own ResNet
    assert pixels(cfg) == DEFAULT and "has no tensor of the network" in log.text


@pytest.mark.parametrize("key", ["MODEL.BOTTOM_UP.WEIGHTS", "MODEL.WEIGHTS"])
@pytest.mark.parametrize("wrapper", ["", "blobs"])
def test_caffe2s_layout_alone_says_its_pixels(
    key: str, wrapper: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "R-50.pkl"
    names = ("conv1_w", "res_conv1_bn_s", "res2_0_branch2a_w", "res2_0_branch2a_w_momentum")
    blobs = {name: np.zeros(1, np.float32) for name in names}
    file.write_bytes(pickle.dumps({wrapper: blobs} if wrapper else blobs))
    cfg = config("build_resnet_backbone", "", key, str(file), "MODEL.RESNETS.STRIDE_IN_1X1", True)
    line = resolved(cfg, log)
    assert pixels(cfg) == DEFAULT and line.startswith("INFO") and "taken from" in line


@pytest.mark.parametrize("name", ["build_resnet_backbone", "torchvision/mobilenet_v3_large"])
def test_torchvisions_detectors_were_trained_with_its_pixels(
    name: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    file = weight_file(tmp_path, "backbone.body.conv1.weight", "backbone.fpn.inner_blocks.0.weight")
    cfg = config(name, "", "MODEL.WEIGHTS", file)
    line = resolved(cfg, log)
    assert (
        pixels(cfg) == RGB
        and line.startswith("INFO")
        and f"taken from MODEL.WEIGHTS {file}" in line
    )


def test_gray_images_take_the_mean_over_the_channels(log: pytest.LogCaptureFixture) -> None:
    gray = ([114.5], [57.6], "L")
    for stated, level in ((gray, "INFO"), (([100.0], [57.0], "L"), "WARNING")):
        line = resolved(config("torchvision/resnet50", "torchvision", *stating(stated)), log)
        assert line.startswith(level) and (level == "INFO") == ("which agree with" in line)
    assert "were trained with PIXEL_MEAN [114.495], PIXEL_STD [57.63], INPUT.FORMAT L" in line


def test_caffe2s_resnexts_have_either_deviation(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "w.pkl"
    model = {"res2_0_branch2a_w": np.zeros(1, np.float32)}
    file.write_bytes(pickle.dumps({"model": model, "__author__": "Caffe2"}))
    cfg = config("build_resnet_backbone", str(file), "MODEL.RESNETS.NUM_GROUPS", 32)
    assert resolved(cfg, log).startswith("WARNING") and "not known" in log.text


def test_a_file_that_is_not_there_is_a_warning(log: pytest.LogCaptureFixture) -> None:
    cfg = config("build_resnet_backbone", "no_such.pth")  # an error where it is loaded
    resolve_pixels(cfg)
    assert pixels(cfg) == DEFAULT
    assert [record.levelname for record in log.records] == ["WARNING"]
    assert "MODEL.BOTTOM_UP.WEIGHTS no_such.pth is not there" in log.text


@pytest.mark.parametrize("key", ["MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT"])
def test_one_value_that_the_config_sets_keeps_all(key: str, log: pytest.LogCaptureFixture) -> None:
    value = "RGB" if key == "INPUT.FORMAT" else [1.0, 2.0, 3.0]
    cfg = config("torchvision/resnet50", "torchvision", key, value)
    before = pixels(cfg)
    line = resolved(cfg, log)
    assert pixels(cfg) == before
    assert line.startswith("WARNING") and str(before[0]) in line
    assert f"transforms of resnet50 the weights were trained with PIXEL_MEAN {RGB[0]}" in line
    assert "PIXELS: config" in line


def test_values_within_a_grey_level_are_the_same(log: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("timm")
    cfg = config("timm/tf_efficientnet_lite0", "timm", *stating(QUICKSTART))
    line = resolved(cfg, log)
    assert line.startswith("INFO") and "which agree with timm's pretrained_cfg" in line
    assert pixels(cfg) == QUICKSTART


def test_a_config_with_other_channels_is_kept(log: pytest.LogCaptureFixture) -> None:
    cfg = config("torchvision/resnet50", "torchvision", *stating(([1.0] * 4, [1.0] * 4, "RGB")))
    assert resolved(cfg, log).startswith("WARNING") and pixels(cfg)[0] == [1.0] * 4


def test_config_takes_the_config(log: pytest.LogCaptureFixture) -> None:
    cfg = config("torchvision/resnet50", "torchvision", "MODEL.BOTTOM_UP.PIXELS", "config")
    assert resolved(cfg, log).endswith("the config's (MODEL.BOTTOM_UP.PIXELS: config)")
    assert pixels(cfg) == DEFAULT


def test_another_choice_is_an_error() -> None:
    with pytest.raises(KeyError, match="MODEL.BOTTOM_UP.PIXELS: unknown name 'rgb'.*auto, config"):
        resolve_pixels(config("timm/resnet50", "timm", "MODEL.BOTTOM_UP.PIXELS", "rgb"))


def test_other_backbones_are_left_alone(log: pytest.LogCaptureFixture) -> None:
    cfg = config("torchvision/resnet50", "torchvision")
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    resolve_pixels(cfg)
    assert pixels(cfg) == DEFAULT and not log.records
    cfg.MODEL.BACKBONE.NAME = "build_bottom_up_backbone"
    resolve_pixels(cfg)
    assert pixels(cfg) == RGB


def test_without_timm(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    cfg = config("torchvision/resnet50", "torchvision")
    resolve_pixels(cfg)
    assert pixels(cfg) == RGB
    assert "not known" in resolved(config("timm/resnet50", "timm"), log)  # its adapter says why


ZOO = Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).parent


@pytest.mark.parametrize("folder", ["COCO-*", "Misc", "Cityscapes", "LVIS*", "Detectron1-*"])
def test_detectron2s_zoo_stays_as_it_is(folder: str, log: pytest.LogCaptureFixture) -> None:
    files = sorted(ZOO.glob(f"{folder}/*.yaml"))
    assert files
    for file in files:
        cfg = config("build_resnet_backbone", "", "MODEL.RESNETS.STRIDE_IN_1X1", True)
        cfg.merge_from_file(str(file))
        if not cfg.MODEL.BACKBONE.NAME.endswith("_fpn_backbone"):
            continue
        cfg.MODEL.BACKBONE.NAME = "build_pyramid_backbone"
        before = cfg.dump()
        resolve_pixels(cfg)
        assert cfg.dump() == before, file
    ours = [record for record in log.records if record.name.startswith("fpn_plugin")]
    assert ours and all(record.levelno == logging.INFO for record in ours)


def test_the_zoos_models_have_the_pixels_of_their_configs(log: pytest.LogCaptureFixture) -> None:
    urls = model_zoo.model_zoo._ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX
    checked = 0
    for path in urls:
        if path.startswith(("new_baselines", "Misc")):  # of other kinds: not known
            continue
        zoo = get_cfg()
        zoo.merge_from_file(model_zoo.get_config_file(f"{path}.yaml"))
        for url in (
            f"detectron2://{path}/{urls[path]}",
            model_zoo.get_checkpoint_url(f"{path}.yaml"),
        ):
            cfg = config("build_resnet_backbone", "", "MODEL.WEIGHTS", url)
            assert "taken from MODEL.WEIGHTS" in resolved(cfg, log)
            assert pixels(cfg) == pixels(zoo), path
            checked += 1
    assert checked > 50


@pytest.mark.parametrize(
    ("mean", "std", "order", "message"),
    [
        ([110.0], [40.0] * 3, "RGB", r"MODEL.PIXEL_MEAN \[110.0\] has 1 value.*RGB has 3 channels"),
        ([110.0] * 3, [40.0], "BGR", "MODEL.PIXEL_STD .*has 1 value.*BGR has 3 channels"),
        ([110.0] * 3, [40.0] * 3, "L", "MODEL.PIXEL_MEAN .*has 3 values.*L has 1 channel:"),
        ([110.0] * 3, [40.0, 0.0, 40.0], "RGB", "MODEL.PIXEL_STD .*positive"),
        ([110.0, float("nan"), 1.0], [40.0] * 3, "RGB", "MODEL.PIXEL_MEAN .*numbers"),
        ([110.0] * 3, [40.0] * 3, "rgb", "INPUT.FORMAT.*'rgb'.*RGB"),
        ([110.0] * 6, [40.0] * 5, "", "MODEL.PIXEL_STD .*has 5 values.*PIXEL_MEAN has 6"),
    ],
)
@pytest.mark.parametrize("builder", ["build_pyramid_backbone", "build_resnet_fpn_backbone"])
def test_pixels_that_do_not_fit_the_format(
    mean: Any, std: Any, order: str, message: str, builder: str
) -> None:
    cfg = config("build_resnet_backbone", "")
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = mean, std, order
    with pytest.raises((KeyError, ValueError), match=message):
        resolve_config(cfg)


@pytest.mark.parametrize(("channels", "order"), [(1, "L"), (3, "YUV-BT.601"), (6, "")])
def test_pixels_that_fit_the_format(
    channels: int, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config("build_resnet_backbone", "")
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.5] * channels, [0.2] * channels
    cfg.INPUT.FORMAT = order
    check_pixels(cfg)
    assert ("multiply them by 255" in caplog.text) == (order != "YUV-BT.601")
