"""Our config keys: defaults that reproduce Detectron2, and an error for every kind of mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from helpers import zoo_config

from fpn_plugin import add_fpn_config, resolve_config
from fpn_plugin.config import extra_levels_for
from fpn_plugin.registry import Registry

MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
SMALL = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
SMALL += ["MODEL.FPN.OUT_CHANNELS", 32]
ROOT = Path(__file__).resolve().parents[2]
REGISTERED = {"build_pyramid_backbone", "build_bottom_up_backbone", "FCOS"}


def config(path: str, *overrides: Any) -> Any:
    return zoo_config(path, *SMALL, "MODEL.BACKBONE.NAME", "build_pyramid_backbone", *overrides)


MISTAKES: list[tuple[str, str, Any, str]] = [
    (MASK, "FPN.TOPOLOGY", "fpnn", "FPN.TOPOLOGY: .*'fpnn'.*channel_mapper, .*fapn"),
    (MASK, "FPN.FUSE_TYPE", "add", "FPN.FUSE_TYPE: .*'add'.*asff, attention, avg, blend"),
    (MASK, "FPN.UPSAMPLE", "maxpool", "FPN.UPSAMPLE: .*'maxpool'.*bilinear"),
    (MASK, "FPN.DOWNSAMPLE", "nearest", "FPN.DOWNSAMPLE: .*'nearest'.*conv"),
    (MASK, "FPN.LATERAL", "conv", "FPN.LATERAL: .*'conv'.*conv1x1"),
    (MASK, "FPN.BLOCK", "conv3x3(norm=BN)", r"FPN.BLOCK: 'conv3x3\(norm=BN\)' is not an operator"),
    (MASK, "FPN.BLOCK", "conv", "FPN.BLOCK: .*'conv'.*separable"),
    (MASK, "FPN.ACTIVATION", "rlu", "FPN.ACTIVATION: .*'rlu'.*relu"),
    (MASK, "FPN.EXTRA_LEVELS", "p6", "FPN.EXTRA_LEVELS: .*'p6'.*maxpool"),
    (MASK, "FPN.EXTRA_LEVELS", "none", r"RPN.IN_FEATURES: \['p6'\].*p2, p3, p4, p5$"),
    (MASK, "FPN.NORM", "XN", "FPN.NORM: .*'XN'"),
    (MASK, "FPN.OUT_CHANNELS", 0, "FPN.OUT_CHANNELS: 0"),
    (MASK, "FPN.REPEATS", 0, "FPN.REPEATS: 0"),
    (MASK, "FPN.IN_FEATURES", [], "FPN.IN_FEATURES: .*empty.*res2"),
    (MASK, "FPN.IN_FEATURES", ["res2", "res7"], "FPN.IN_FEATURES: .*'res7', but res2, res3"),
    (MASK, "FPN.IN_FEATURES", ["res3", "res2"], r"FPN.IN_FEATURES: .*\[3, 2\].*finest first"),
    (MASK, "FPN.IN_FEATURES", ["res2", "res2"], "FPN.IN_FEATURES: .*each level once"),
    (MASK, "FPN.GRAPH", [{"name": "a"}], r"FPN.GRAPH\[0\]: .*'level' is missing"),
    (MASK, "RPN.IN_FEATURES", ["p2", "p9"], r"RPN.IN_FEATURES: \['p9'\].*p2, p3, p4, p5, p6"),
    (MASK, "RPN.IN_FEATURES", [], "RPN.IN_FEATURES: .*empty"),
    (MASK, "RPN.IN_FEATURES", ["p2", "p3"], "ANCHOR_GENERATOR.SIZES: 5 lists for the 2 maps"),
    (MASK, "ROI_HEADS.IN_FEATURES", ["res4"], r"ROI_HEADS.IN_FEATURES: \['res4'\]"),
    (
        MASK,
        "ANCHOR_GENERATOR.ASPECT_RATIOS",
        [[1.0], [2.0]],
        "ANCHOR_GENERATOR.ASPECT_RATIOS: 2 lists for the 5 maps of MODEL.RPN.IN_FEATURES",
    ),
    (RETINANET, "RETINANET.IN_FEATURES", ["p2"], "RETINANET.IN_FEATURES.*p3, p4, p5, p6, p7"),
    (RETINANET, "FPN.EXTRA_LEVELS", "maxpool", r"RETINANET.IN_FEATURES: \['p7'\]"),
    (PANOPTIC, "SEM_SEG_HEAD.IN_FEATURES", ["p8"], "SEM_SEG_HEAD.IN_FEATURES"),
]


@pytest.mark.parametrize("path, key, value, message", MISTAKES)
def test_every_mistake_names_its_key(path: str, key: str, value: Any, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=f"MODEL.{message}"):
        build_model(resolve_config(config(path, f"MODEL.{key}", value)))


@pytest.mark.parametrize(
    "key, value, other, other_value, message",
    [
        ("NORM", "GN", "OUT_CHANNELS", 48, "'GN' cannot normalise 48 channels"),
        ("REPEATS", 2, "GRAPH", [{}], "MODEL.FPN.REPEATS: 2 .* MODEL.FPN.GRAPH is given"),
    ],
)
def test_keys_that_exclude_each_other(
    key: str, value: Any, other: str, other_value: Any, message: str
) -> None:
    cfg = config(MASK, f"MODEL.FPN.{key}", value, f"MODEL.FPN.{other}", other_value)
    with pytest.raises(ValueError, match=message):
        build_model(resolve_config(cfg))


def test_one_list_of_anchors_serves_all_maps() -> None:
    keys = ["MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]], "MODEL.RPN.IN_FEATURES", ["p2", "p3"]]
    maps = build_backbone(config(MASK, *keys)).output_shape()
    assert list(maps) == ["p2", "p3", "p4", "p5", "p6"]


@pytest.mark.parametrize(
    "path, key, value, expected",
    [
        (MASK, "GRAPH", [], "maxpool"),
        (RETINANET, "GRAPH", [], "conv_c5"),
        (MASK, "GRAPH", [{}], "none"),
        (RETINANET, "TOPOLOGY", "simple", "conv_p5"),
        (MASK, "TOPOLOGY", "simple", "maxpool"),
        (RETINANET, "TOPOLOGY", "bifpn", "none"),
    ],
)
def test_automatic_extra_levels(path: str, key: str, value: Any, expected: str) -> None:
    assert extra_levels_for(config(path, f"MODEL.FPN.{key}", value)) == expected


def test_repeats_norm_activation_and_blocks_from_a_config() -> None:
    keys = ["MODEL.FPN.NORM", "GN", "MODEL.FPN.ACTIVATION", "silu", "MODEL.FPN.REPEATS", 2]
    backbone = build_backbone(
        config(MASK, *keys, "MODEL.FPN.FUSE_TYPE", "softmax", "MODEL.FPN.BLOCK", "separable")
    )
    names = [name for name, _ in backbone.named_parameters()]
    assert "r2_fpn_output2.pointwise.norm.weight" in names
    assert "r2_fpn_merge2_fuse.weights" in names


def test_panoptic_images_are_padded_for_the_semantic_head() -> None:
    """Its maps are doubled until they meet, also where the pyramid itself upsamples nothing."""
    keys = ["MODEL.FPN.TOPOLOGY", "channel_mapper", "MODEL.ROI_BOX_HEAD.FC_DIM", 32]
    keys += ["MODEL.RPN.POST_NMS_TOPK_TEST", 20, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32]
    model = build_model(config(PANOPTIC, *keys)).eval()
    assert model.backbone.size_divisibility == 32
    with torch.no_grad():
        (result,) = model([{"image": torch.zeros(3, 97, 131, dtype=torch.uint8)}])
    assert tuple(result["sem_seg"].shape[1:]) == (97, 131)


def test_an_inline_graph_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "graph.yaml").write_text("""
MODEL:
  FPN:
    GRAPH:
      - {name: top, level: 5, inputs: [res5], block: conv1x1, output: true}
      - name: low
        level: 3
        inputs: [res3, {source: top, resample: bilinear, project: {name: conv1x1, activation: relu}}]
        fuse: {name: fast_normalized, eps: 0.001}
        block: {name: separable, order: act-conv-norm, activation: silu}
        output: true
    IN_FEATURES: [res3, res5]
  RPN: {IN_FEATURES: [p3, p5]}
  ROI_HEADS: {IN_FEATURES: [p3]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64]]}
""")
    cfg = config(MASK)
    cfg.merge_from_file(str(tmp_path / "graph.yaml"))
    (tmp_path / "again.yaml").write_text(
        cfg.dump()
    )  # what Detectron2 writes into the output folder
    again = get_cfg()
    add_fpn_config(again)
    again.merge_from_file(str(tmp_path / "again.yaml"))
    for each in (cfg, again):
        backbone = build_backbone(each)
        assert list(backbone.output_shape()) == ["p3", "p5"]
        assert backbone.get_submodule("low_fuse").eps == 0.001


@pytest.mark.parametrize(
    "module, texts",
    [
        ("detectron2", ("fpn_plugin needs Detectron2", "tools/detectron2_wheel")),
        ("cv2", ("needs OpenCV", "opencv-python-headless")),  # any of its packages will do
    ],
)
def test_without_a_package_the_import_says_what_to_install(
    module: str, texts: tuple[str, ...]
) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; import fpn_plugin"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert all(text in done.stderr for text in texts)


def test_the_import_registers_everything_and_loads_no_package_that_detectron2_does_not() -> None:
    """What a feature alone needs (timm, a table, a plot) is imported where it is used."""
    code = (
        "import sys, detectron2.modeling as d\n"
        "from detectron2.data import DatasetCatalog\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import fpn_plugin\n"
        "loaded = {name.partition('.')[0] for name in sys.modules} - before\n"
        "standard = sys.stdlib_module_names\n"
        "print(*sorted(name for name in loaded if name.strip('_') not in standard))\n"
        "print(*(name for r in (d.BACKBONE_REGISTRY, d.META_ARCH_REGISTRY) for name, value in r"
        " if value.__module__.startswith('fpn_plugin')))\n"
        "print(*(name for name in DatasetCatalog.list() if name[:5] in ('trees', 'scene')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    loaded, registered, datasets = done.stdout.splitlines()
    assert loaded == "fpn_plugin"
    assert set(registered.split()) == REGISTERED
    assert sorted(datasets.split()) == ["scenes_train", "scenes_val", "trees_train", "trees_val"]


def test_registry() -> None:
    registry: Registry[int] = Registry("number")
    registry.register("one")(1)
    assert registry.get("one") == 1 and "one" in registry and registry.names() == ["one"]
    with pytest.raises(ValueError, match="number 'one' is registered already"):
        registry.register("one")(2)
    with pytest.raises(KeyError, match="KEY: unknown name 'two'; choose from: one"):
        registry.get("two", "KEY")
