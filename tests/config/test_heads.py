"""`[auto]` in the heads' keys: Detectron2's own values for the plain FPN, what follows for others, and the errors."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model
from helpers import zoo_config

from fpn_plugin import add_fpn_config, resolve_config
from fpn_plugin.config import extra_levels_for, load_config
from fpn_plugin.config.heads import AUTO_KEYS, cfg_get
from fpn_plugin.pyramid.topologies import OWN_LEVELS, TOPOLOGIES

MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
SIZES = "MODEL.ANCHOR_GENERATOR.SIZES"
RPN, ROI = "MODEL.RPN.IN_FEATURES", "MODEL.ROI_HEADS.IN_FEATURES"
LOW_HIGH = [
    {"name": "high", "level": 5, "inputs": ["res5"], "block": "conv1x1", "output": True},
    {"name": "low", "level": 3, "inputs": ["res3", "high"], "output": True},
]
TOP = [
    {"name": "six", "level": 6, "inputs": ["res5"], "block": "conv1x1", "output": True},
    {"name": "seven", "level": 7, "inputs": ["six"], "output": True},
]


def names(*levels: int) -> list[str]:
    return [f"p{level}" for level in levels]


def config(path: str, *overrides: Any, auto: tuple[str, ...] = AUTO_KEYS) -> CfgNode:
    """A zoo config on our backbone with `[auto]` in these keys; not resolved."""
    keys = [part for key in auto for part in (key, ["auto"])]
    name = ["MODEL.BACKBONE.NAME", "build_pyramid_backbone"]
    return zoo_config(path, *name, *keys, *overrides)


@pytest.mark.parametrize("path", [MASK, PANOPTIC, RETINANET])
def test_the_plain_fpn_has_detectron2s_values(path: str) -> None:
    zoo, cfg = zoo_config(path), resolve_config(config(path))
    for key in {RETINANET: ["MODEL.RETINANET.IN_FEATURES"]}.get(
        path, [RPN, ROI, "MODEL.SEM_SEG_HEAD.IN_FEATURES"]
    ):
        assert cfg_get(cfg, key) == list(cfg_get(zoo, key)), key
    assert cfg_get(cfg, SIZES) == cfg_get(zoo, SIZES)  # to the last bit


def test_fcos_reads_what_detectron2s_reads() -> None:
    cfg = config(RETINANET, "MODEL.META_ARCHITECTURE", "FCOS")
    default = list(cfg.MODEL.FCOS.IN_FEATURES)
    assert default == ["auto"] and extra_levels_for(cfg) == "conv_p5"
    assert resolve_config(cfg).MODEL.FCOS.IN_FEATURES == names(3, 4, 5, 6, 7)


@pytest.mark.parametrize(
    "overrides, dense, pooled",
    [
        (["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]], (3, 4, 5, 6), (3, 4, 5)),
        (["MODEL.FPN.EXTRA_LEVELS", "none"], (2, 3, 4, 5), (2, 3, 4, 5)),
        (["MODEL.FPN.EXTRA_LEVELS", "conv_p5"], (2, 3, 4, 5, 6, 7), (2, 3, 4, 5)),
        (["MODEL.FPN.TOPOLOGY", "bifpn"], (2, 3, 4, 5, 6), (2, 3, 4, 5)),
        (
            ["MODEL.FPN.TOPOLOGY", "bifpn", "MODEL.FPN.INNER_LEVELS", 3],
            (2, 3, 4, 5, 6, 7, 8),
            (2, 3, 4, 5),
        ),
        (
            ["MODEL.FPN.TOPOLOGY", "simple", "MODEL.FPN.IN_FEATURES", ["res4"]],
            (2, 3, 4, 5, 6),
            (2, 3, 4, 5),
        ),
        (
            ["MODEL.FPN.GRAPH", LOW_HIGH, "MODEL.META_ARCHITECTURE", "SemanticSegmentor"],
            (3, 5),
            (3, 5),
        ),
        (["MODEL.FPN.GRAPH", TOP], (6, 7), (6, 7)),
        (["MODEL.FPN.IN_FEATURES", ["p3", "p4"]], (3, 4, 5), (3, 4, 5)),
    ],
    ids=["res3", "no_extra", "p7", "bifpn", "inner", "simple", "gap", "coarse", "p_names"],
)
def test_values_follow_from_the_pyramid(
    overrides: list, dense: tuple[int, ...], pooled: tuple[int, ...]
) -> None:
    if "MODEL.FPN.GRAPH" in overrides:
        read = {source for item in overrides[1] for source in item["inputs"] if "res" in source}
        overrides = [*overrides, "MODEL.FPN.IN_FEATURES", sorted(read)]
    cfg = resolve_config(config(PANOPTIC, *overrides))
    assert cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES == names(*pooled)
    if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
        assert cfg_get(cfg, RPN) == names(*dense) and cfg_get(cfg, ROI) == names(*pooled)
    assert cfg_get(cfg, SIZES) == [[8 * 2**level] for level in dense]


@pytest.mark.parametrize("topology", TOPOLOGIES.names())
def test_every_topology_gives_the_maps_that_auto_says(topology: str) -> None:
    small = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    small += ["MODEL.FPN.OUT_CHANNELS", 32]
    small += ["MODEL.FPN.IN_FEATURES", ["res4"]] if topology in OWN_LEVELS else []
    cfg = resolve_config(config(MASK, *small, "MODEL.FPN.TOPOLOGY", topology))
    shapes = build_backbone(cfg).output_shape()  # which also checks the heads' keys
    assert list(shapes) == cfg_get(cfg, RPN)
    assert [sizes[0] for sizes in cfg_get(cfg, SIZES)] == [8 * s.stride for s in shapes.values()]


def test_anchors_are_for_the_maps_that_are_read() -> None:
    cfg = resolve_config(config(MASK, RPN, names(3, 5), auto=(SIZES,)))
    assert cfg_get(cfg, RPN) == names(3, 5) and cfg_get(cfg, SIZES) == [[64], [256]]
    assert cfg_get(cfg, ROI) == names(2, 3, 4, 5)
    cfg = config(RETINANET, "MODEL.RETINANET.IN_FEATURES", names(6), auto=(SIZES,))
    assert [sizes[0] for sizes in cfg_get(resolve_config(cfg), SIZES)] == [256]


def test_what_no_head_reads_is_detectron2s_default_and_a_head_of_ones_own_gets_all() -> None:
    cfg = resolve_config(config(MASK, "MODEL.META_ARCHITECTURE", "SemanticSegmentor"))
    assert all("auto" not in cfg_get(cfg, key) for key in AUTO_KEYS)
    assert cfg_get(cfg, RPN) == ["res4"] and cfg_get(cfg, SIZES)[0] == [32]
    cfg = resolve_config(config(MASK, "MODEL.META_ARCHITECTURE", "MyOwn"))
    assert cfg_get(cfg, RPN) == cfg.MODEL.RETINANET.IN_FEATURES == names(2, 3, 4, 5, 6)


def test_a_second_call_and_a_config_without_auto_change_nothing() -> None:
    once = resolve_config(config(MASK))
    assert resolve_config(once.clone()) == once
    plain = config(MASK, auto=())
    before = plain.clone()
    plain.freeze()
    assert resolve_config(plain) is plain and plain == before


def test_a_runs_config_holds_the_values(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(resolve_config(config(PANOPTIC)).dump())
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert recorded["MODEL"]["RPN"]["IN_FEATURES"] == names(2, 3, 4, 5, 6)
    again = get_cfg()
    add_fpn_config(again)
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert resolve_config(again.clone()) == again


@pytest.mark.parametrize("word", ["auto", "[auto]", "['auto']"])
def test_auto_on_a_command_line(word: str) -> None:
    file = Path(__file__).resolve().parents[2] / "configs/quickstart/faster_rcnn_trees_FaPN.yaml"
    args = Namespace(config_file=str(file), opts=[SIZES, word, "MODEL.BOTTOM_UP.PIXELS", "config"])
    assert cfg_get(load_config(args), SIZES) == [[64], [128], [256], [512]]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([RPN, ["p2", "auto"]], r"MODEL.RPN.IN_FEATURES: \['p2', 'auto'\] has 'auto' among others"),
        (
            [SIZES, [[32], "auto"]],
            r"ANCHOR_GENERATOR.SIZES: \[\[32\], 'auto'\] has 'auto' among",
        ),
        (
            ["MODEL.BACKBONE.NAME", "build_resnet_backbone"],
            "MODEL.RPN.IN_FEATURES: .auto. follows from the pyramid of build_pyramid_backbone.*"
            "'build_resnet_backbone' has no such: set MODEL.RPN.IN_FEATURES, MODEL.ROI_HEADS.IN_FEATURES,"
            " MODEL.ANCHOR_GENERATOR.SIZES by hand",
        ),
        (
            ["MODEL.BACKBONE.NAME", "build_bottom_up_backbone", "MODEL.META_ARCHITECTURE", "Mine"],
            "'build_bottom_up_backbone' has no such.*MODEL.FCOS.IN_FEATURES",
        ),
        (
            ["MODEL.FPN.IN_FEATURES", ["res3", "stage4"]],
            "MODEL.RPN.IN_FEATURES: .auto. needs the levels.*'stage4' of MODEL.FPN.IN_FEATURES"
            ".*set MODEL.RPN.IN_FEATURES by hand",
        ),
        (["MODEL.FPN.IN_FEATURES", []], "MODEL.FPN.IN_FEATURES: it is empty"),
        (["MODEL.FPN.TOPOLOGY", "fpnn"], "MODEL.FPN.TOPOLOGY: unknown name 'fpnn'"),
        (["MODEL.FPN.EXTRA_LEVELS", "p6"], "MODEL.FPN.EXTRA_LEVELS: unknown name 'p6'"),
        (["MODEL.FPN.REPEATS", 0], "MODEL.FPN.REPEATS: 0"),
        (["MODEL.FPN.GRAPH", [{"name": "a"}]], r"MODEL.FPN.GRAPH\[0\]: the field 'level'"),
        (
            ["MODEL.FPN.TOPOLOGY", "bfp", "MODEL.FPN.IN_FEATURES", ["res4"]],
            "FPN.TOPOLOGY: 'bfp'.*MODEL.FPN.IN_FEATURES",
        ),
        (["MODEL.FPN.GRAPH", LOW_HIGH], "input 'res2' is neither an output nor read"),
        ([RPN, ["p9"]], "MODEL.RPN.IN_FEATURES: 'p9' is not among.*p2, p3, p4, p5, p6"),
        ([SIZES, [[32], 64]], r"ANCHOR_GENERATOR.SIZES: \[\[32\], 64\] is no list of numbers"),
        ([SIZES, [["a"]]], r"ANCHOR_GENERATOR.SIZES: \[\['a'\]\] is no list"),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0]]], "ASPECT_RATIOS: .*numbers above 0"),
        (["MODEL.ROI_HEADS.NAME", "Res5ROIHeads"], "Res5ROIHeads .* one map: take Standard"),
    ],
)
def test_every_mistake_names_its_key(overrides: list, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        resolve_config(config(MASK, *overrides))


@pytest.mark.parametrize("key, value", [(RPN, "p2"), (ROI, 3), (SIZES, 32), (RPN, "auto")])
def test_an_attribute_of_another_type_names_its_key(key: str, value: Any) -> None:
    cfg = config(MASK, auto=())
    section, _, name = key.rpartition(".")
    cfg_get(cfg, section)[name] = value
    with pytest.raises(ValueError, match=rf"{key}: {value!r} is not a list such as \["):
        resolve_config(cfg)


def test_auto_is_refused_in_heads_that_are_not_known() -> None:
    cfg = config(MASK)
    cfg.MODEL.POINT_HEAD = CfgNode({"IN_FEATURES": ["auto"]})
    with pytest.raises(ValueError, match="MODEL.POINT_HEAD.IN_FEATURES: .* name the maps"):
        resolve_config(cfg)


def test_without_a_pyramid_auto_may_stand_where_nothing_reads_it() -> None:
    auto = ("MODEL.RETINANET.IN_FEATURES", "MODEL.FCOS.IN_FEATURES")
    cfg = resolve_config(
        config(MASK, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", auto=auto)
    )
    assert cfg.MODEL.FCOS.IN_FEATURES == ["auto"]


@pytest.mark.parametrize(
    "path, key",
    [(MASK, RPN), (MASK, SIZES), (RETINANET, "MODEL.RETINANET.IN_FEATURES"), (RETINANET, SIZES)],
)
def test_a_model_is_not_built_before(path: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}: 'auto' is not resolved.*resolve_config\(cfg\)"):
        build_model(config(path, auto=(key,)))


def test_the_pooler_takes_no_gaps() -> None:
    """Detectron2's would stop at an assertion that names no key."""
    keys = ["MODEL.FPN.GRAPH", LOW_HIGH, "MODEL.FPN.IN_FEATURES", ["res3", "res5"]]
    message = r"MODEL.ROI_HEADS.IN_FEATURES: \['p3', 'p5'\] have strides of \[8, 32\] pixels"
    with pytest.raises(ValueError, match=message):
        build_model(resolve_config(config(MASK, *keys)))


def test_cascade_needs_boxes_without_a_class() -> None:
    cfg = config(MASK, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads")
    message = "CLS_AGNOSTIC_BBOX_REG: False, but MODEL.ROI_HEADS.NAME: CascadeROIHeads needs True"
    with pytest.raises(ValueError, match=message):
        resolve_config(cfg)


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS"])
def test_dense_heads_need_a_convolution(name: str) -> None:
    """Detectron2's would stop at an index that names no key."""
    key = f"MODEL.{name.upper()}.NUM_CONVS"
    cfg = config(RETINANET, key, 0, "MODEL.META_ARCHITECTURE", name)
    with pytest.raises(ValueError, match=f"{key}: 0, but Detectron2's head has at least one"):
        resolve_config(cfg)
