"""The files in configs/: every one builds, and every quick start trains."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Mapping

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.layers import Conv2d
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import zoo_config
from torch import Tensor, nn

from fpn_plugin import PyramidBackbone, add_fpn_config, resolve_config
from fpn_plugin.config.files import merge_config_file
from fpn_plugin.config.heads import head_features
from fpn_plugin.pyramid.resample import Subsample
from fpn_plugin.pyramid.topologies import TOPOLOGIES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = sorted(CONFIGS.glob("presets/*.yaml"))  # parts, for other configs to stand on
STUDIES = sorted(CONFIGS.glob("studies/*.yaml"))  # of several configs: tests/study
PYRAMID_PRESETS = sorted(CONFIGS.glob("pyramids/*.yaml"))
PARTS = [*PRESETS, *PYRAMID_PRESETS, CONFIGS / "Base-Pyramid.yaml"]
YAML = sorted(path for path in CONFIGS.rglob("*.yaml") if path not in PARTS + STUDIES)
QUICK = [path for path in YAML if path.parent.name == "quickstart" and path.stem[:4] != "Base"]
LAZY = sorted(path for path in CONFIGS.glob("lazy/*.py") if path.stem != "common")
NO_WEIGHTS = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BOTTOM_UP.WEIGHTS", "")
# what a pyramid is measured against
SINGLE_LEVEL = {"faster_rcnn_R_50_C4_1x", "faster_rcnn_R_50_DC5_1x"}
SINGLE_LEVEL |= {"faster_rcnn_trees_C4", "faster_rcnn_trees_C5"}
# each config of ours that is one of Detectron2's, where its path is another
ZOO = {
    "COCO-Detection": ("faster_rcnn_R_50_FPN_1x", "retinanet_R_50_FPN_1x", "rpn_R_50_FPN_1x")
    + ("faster_rcnn_R_50_C4_1x", "faster_rcnn_R_50_DC5_1x"),
    "COCO-InstanceSegmentation": ("mask_rcnn_R_50_FPN_1x", "cascade_mask_rcnn_R_50_FPN_1x"),
    "COCO-Keypoints": ("keypoint_rcnn_R_50_FPN_1x",),
    "COCO-PanopticSegmentation": ("panoptic_fpn_R_50_1x",),
}
ZOO_PATHS = [f"{folder}/{stem}.yaml" for folder, stems in ZOO.items() for stem in stems]
MOVED = {"COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_1x.yaml": "Misc"}
# what their papers run after an FPN
STACKS = {name: f"fpn+{name}" for name in ("bfp", "asff", "dyhead", "sepc")}
# the folder of each lazy config's YAML twin
TWINS = {
    "faster_rcnn_trees_FPN": "quickstart",
    "mask_rcnn_R_50_BiFPN_1x": "COCO-InstanceSegmentation",
    "mask_rcnn_R_50_FPN_1x": "COCO-InstanceSegmentation",
    "retinanet_R_50_BiFPN_D0_1x": "COCO-Detection",
}

# the keys of MODEL.FPN in which each topology's configs follow its authors, beside TOPOLOGY and
# their width; all others have their defaults
BATCH_NORM = {"NORM": "SyncBN"}
EFFICIENTDET = {**BATCH_NORM, "NORM_EPS": 0.001, "NORM_MOMENTUM": 0.01, "BLOCK": "separable"}
EFFICIENTDET |= {"FUSE_TYPE": "fast_normalized", "REPEATS": 3}
STACKED = {"FUSE_TYPE": "stack", "DOWNSAMPLE": 'conv(activation="silu")'}
YOLO = {**STACKED, **BATCH_NORM, "NORM_EPS": 0.001, "NORM_MOMENTUM": 0.03}
PLAIN = {"LATERAL": 'conv1x1(norm="")', "BLOCK": 'conv3x3(norm="")'}
AUTHORS: dict[str, dict[str, object]] = {
    "BiFPN": {"TOPOLOGY": "bifpn", **EFFICIENTDET},
    "BiFPN_D0": {"TOPOLOGY": "bifpn", **EFFICIENTDET, "OUT_CHANNELS": 64},
    "BiFPN_D1": {"TOPOLOGY": "bifpn", **EFFICIENTDET, "OUT_CHANNELS": 88, "REPEATS": 4},
    "BiFPN_D2": {"TOPOLOGY": "bifpn", **EFFICIENTDET, "OUT_CHANNELS": 112, "REPEATS": 5},
    "QuFPN": {"TOPOLOGY": "qufpn", **EFFICIENTDET},
    "NAS_FPN": {"TOPOLOGY": "nas_fpn", "REPEATS": 7, **BATCH_NORM}
    | {"NORM_EPS": 0.0001, "NORM_MOMENTUM": 0.003},
    "FPG": {"TOPOLOGY": "fpg", **BATCH_NORM, **PLAIN, "DOWNSAMPLE": "subsample"},
    "BFP": {"TOPOLOGY": "fpn+bfp", "INNER_LEVELS": 1, "DOWNSAMPLE": "subsample"},
    "Simple": {"TOPOLOGY": "simple", "NORM": "LN"},
    "CSP_PAN": {"TOPOLOGY": "csp_pan", **YOLO, "BLOCK": "csp(depth=3)"},
    "CSP_PAN_RTMDet": {"TOPOLOGY": "csp_pan_rtmdet", **YOLO}
    | {"BLOCK": 'csp(depth=3, unit="3x3 dw5x5 1x1")'},
    "CSP_PAN_YOLOv8": {"TOPOLOGY": "csp_pan_yolov8", **YOLO, "BLOCK": "c2f(depth=3)"},
    "CSP_PAN_PPYOLOE": {"TOPOLOGY": "csp_pan_ppyoloe", **STACKED, **BATCH_NORM}
    | {"BLOCK": 'csp(depth=3, unit="3x3 rep")'},
    "RepGFPN": {"TOPOLOGY": "repgfpn", **STACKED, **BATCH_NORM}
    | {"BLOCK": "csp_stage(depth=3, ratio=0.75)", "DOWNSAMPLE": 'conv(activation="relu")'},
    "BiFusion": {"TOPOLOGY": "bifusion", **YOLO, "BLOCK": "rep_stage(depth=4)"}
    | {"UPSAMPLE": "deconv", "DOWNSAMPLE": 'conv(activation="relu")'},
    "PAFPN": {"TOPOLOGY": "pafpn"},
    "PAFPN_mmdet": {"TOPOLOGY": "pafpn_mmdet"},
    "HRFPN": {"TOPOLOGY": "hrfpn"},
    "ASFF": {"TOPOLOGY": "fpn+asff"},
    "FaPN": {"TOPOLOGY": "fapn"},
    "FreqFusion": {"FUSE_TYPE": "freq"},
    "DyHead": {"TOPOLOGY": "fpn+dyhead", "INNER_LEVELS": 2, "DOWNSAMPLE": "conv"},
    "SEPC": {"TOPOLOGY": "fpn+sepc", "INNER_LEVELS": 2, "DOWNSAMPLE": "conv", **BATCH_NORM},
    "MSDeform": {"TOPOLOGY": "msdeform", "NORM": "GN"},
    "ChannelMapper": {"TOPOLOGY": "channel_mapper"},
    "Hybrid": {"TOPOLOGY": "hybrid", "FUSE_TYPE": "stack", "BLOCK": "csp_rep", **BATCH_NORM}
    | {"DOWNSAMPLE": 'conv(activation="silu")'},
    "Projector": {"TOPOLOGY": "projector", "BLOCK": "c2f(depth=3, shortcut=False)", **BATCH_NORM}
    | {"UPSAMPLE": "deconv(shrink=True, reduce_above=512)", "ACTIVATION": "silu"}
    | {"DOWNSAMPLE": 'conv(activation="relu")'},
    "Feature2Pyramid": {"TOPOLOGY": "feature2pyramid", **BATCH_NORM},
    "RFP": {"RFP_STEPS": 2},
    "FPN": {},
}
FPG = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_R_50_FPG_1x.yaml"
PYRAMIDS = [path for path in YAML if path.parent.name[:5] == "COCO-" and "_R_50_" in path.stem]
PYRAMIDS = [path for path in PYRAMIDS if path.stem not in SINGLE_LEVEL | {"panoptic_fpn_R_50_1x"}]


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@cache
def load(path: Path, *overrides: object) -> CfgNode:
    """A config that no test may change."""
    cfg = get_cfg()
    add_fpn_config(cfg)
    merge_config_file(cfg, str(path))
    cfg.merge_from_list([*NO_WEIGHTS, *overrides])
    return resolve_config(cfg)


@cache
def model_without_numbers(path: Path) -> nn.Module:
    """The whole model, if possible without memory: for its modules and shapes."""
    cfg = load(path).clone()
    # Detectron2's transformers read the numbers of tensors as they are built
    is_transformer = re.match("build_(swin|mvit|vit)_", cfg.MODEL.BOTTOM_UP.NAME)
    cfg.MODEL.DEVICE = "cpu" if is_transformer else "meta"
    with torch.device(cfg.MODEL.DEVICE):
        return build_model(cfg)


def lazy_model(path: Path) -> nn.Module:
    model = LazyConfig.load(str(path)).model
    if "weights" in model.backbone.bottom_up:
        model.backbone.bottom_up.weights = ""
    with torch.device("meta"):
        return instantiate(model)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def assert_maps(model: nn.Module, path: Path) -> None:
    """That a pyramid is below the heads, or the single map that it is measured against."""
    assert isinstance(model.backbone, PyramidBackbone) is (path.stem not in SINGLE_LEVEL)
    assert (len(model.backbone.output_shape()) == 1) is (path.stem in SINGLE_LEVEL)


@pytest.mark.parametrize("path", [path for path in YAML if path not in QUICK], ids=name)
def test_every_config_file_builds(path: Path) -> None:
    """The builder also checks that the heads' maps exist and the anchors agree with them."""
    assert_maps(model_without_numbers(path), path)


def flat(cfg: CfgNode, prefix: str = "") -> dict[str, object]:
    """All values by key, tuples as lists."""
    values: dict[str, object] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = list(value) if isinstance(value, tuple) else value
    return values


@pytest.mark.parametrize("path", ZOO_PATHS)
def test_detectron2s_configs_differ_in_the_backbone_alone(path: str) -> None:
    mine = flat(load(CONFIGS / path))
    zoo = path if path not in MOVED else f"{MOVED[path]}/{Path(path).name}"
    theirs = flat(zoo_config(zoo))
    assert mine.keys() == theirs.keys()
    differing = {key for key in theirs if mine[key] != theirs[key]}
    assert differing == (set() if Path(path).stem in SINGLE_LEVEL else {"MODEL.BACKBONE.NAME"})


@pytest.mark.parametrize("path", PYRAMIDS, ids=name)
def test_pyramids_follow_their_authors(path: Path) -> None:
    kind = re.fullmatch(r".*_R_50_(.*)_1x", path.stem)
    assert kind is not None
    values = {key: value for key, value in load(path).MODEL.FPN.items() if key != "IN_FEATURES"}
    assert changed_keys(values) == AUTHORS[kind[1]]


def test_fpg_is_its_authors() -> None:
    pyramid = model_without_numbers(FPG).backbone
    plain = {f"fpg_lateral{level}" for level in range(2, 6)}
    plain |= {f"fpg_output{level}" for level in range(2, 7)}
    for path, module in pyramid.named_modules():
        if isinstance(module, Conv2d) and not path.startswith("bottom_up."):
            assert (module.norm is None) is (module.bias is not None) is (path in plain), path
    assert isinstance(pyramid.get_submodule("fpg_in6_edge0.resample"), Subsample)


@pytest.mark.parametrize("preset", PRESETS, ids=name)
def test_a_preset_stands_beside_a_base(preset: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    base = CONFIGS / "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    mine.write_text(f"_BASE_: [{base}, {preset}]\nSOLVER: {{BASE_LR: 0.5}}\n")
    # not from the cache: another test may have had a folder of this name
    cfg, plain = load.__wrapped__(mine), load(base)
    assert cfg.SOLVER.BASE_LR == 0.5 and cfg.MODEL.CHANNELS_LAST and not plain.MODEL.CHANNELS_LAST
    assert cfg.SOLVER.AMP.ENABLED == (preset.stem != "fast_cpu")
    assert cfg.MODEL.FPN == plain.MODEL.FPN


# one of each head, as Detectron2 has it, and what stands on a network without stages
HEADS = {
    "faster": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "keypoint": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "panoptic": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "fcos": "COCO-Detection/fcos_R_50_FPN_1x.yaml",
}


def test_every_topology_has_a_pyramid_to_stand_beside_a_config() -> None:
    """`<topology>.yaml`; others are variants, or an operator's."""
    assert {path.stem for path in PYRAMID_PRESETS} >= set(TOPOLOGIES.names())


@pytest.mark.parametrize("head", HEADS)
def test_pyramids_stand_beside_configs_of_any_head(head: str, tmp_path: Path) -> None:
    for preset in PYRAMID_PRESETS:
        mine = tmp_path / f"{preset.stem}.yaml"
        mine.write_text(f"_BASE_: [{HEADS[head]}, pyramids/{preset.name}]\n")
        cfg = get_cfg()
        add_fpn_config(cfg)
        merge_config_file(cfg, str(mine))
        cfg.merge_from_list([*NO_WEIGHTS, "MODEL.DEVICE", "meta"])
        resolve_config(cfg)
        with torch.device("meta"):
            backbone = build_backbone(cfg)  # checks the heads' keys and anchors too
        read = set().union(*head_features(cfg).values())
        assert read == set(backbone.output_shape()), preset
        kind = {
            value.get("TOPOLOGY", "fpn"): value for key, value in AUTHORS.items() if "_D" not in key
        }
        values = {key: value for key, value in cfg.MODEL.FPN.items() if key != "IN_FEATURES"}
        if preset.stem in TOPOLOGIES:  # not a variant
            assert changed_keys(values) == kind[cfg.MODEL.FPN.TOPOLOGY], preset


def test_a_pyramid_replaces_another_and_keeps_anchors_and_width(tmp_path: Path) -> None:
    mine, plain = tmp_path / "mine.yaml", tmp_path / "plain.yaml"
    sizes = [[12], [24], [48], [96], [192]]
    mine.write_text(
        "_BASE_: [quickstart/faster_rcnn_trees_FPG.yaml, pyramids/bifpn.yaml]\n"
        "MODEL: {FPN: {ACTIVATION: relu}}\n"
    )
    cfg = load(mine)
    assert cfg.MODEL.FPN.LATERAL == "conv1x1" and cfg.MODEL.FPN.NORM == "SyncBN"
    assert cfg.MODEL.FPN.OUT_CHANNELS == 32 and cfg.MODEL.ANCHOR_GENERATOR.SIZES == sizes
    plain.write_text("_BASE_: [mine.yaml, pyramids/fpn.yaml]\nMODEL: {FPN: {OUT_CHANNELS: 256}}\n")
    assert changed_keys(load(plain).MODEL.FPN) == {"IN_FEATURES": names_of_levels(2, 6)}
    # levels for which there are no anchors of one's own are an error, Detectron2's own follow
    own = "_BASE_: [{}, pyramids/simple.yaml]\nMODEL: {{ANCHOR_GENERATOR: {{SIZES: {}}}}}\n"
    (tmp_path / "own.yaml").write_text(own.format(HEADS["retinanet"], sizes))
    with pytest.raises(ValueError, match=r"SIZES: 5 lists for the 6 maps .* 6, or \[auto\]"):
        load(tmp_path / "own.yaml")


def changed_keys(values: Mapping[str, object]) -> dict[str, object]:
    """The keys of MODEL.FPN that do not have their defaults."""
    default = get_cfg()
    add_fpn_config(default)
    return {key: value for key, value in values.items() if value != default.MODEL.FPN[key]}


def names_of_levels(first: int, end: int) -> list[str]:
    return [f"res{level}" for level in range(first, end)]


@pytest.mark.parametrize("folder", ["COCO-InstanceSegmentation", "quickstart"])
def test_every_topology_has_a_config(folder: str) -> None:
    files = [path for path in YAML if path.parent.name == folder]
    found = {load(path).MODEL.FPN.TOPOLOGY.split("(")[0] for path in files}
    wanted = {STACKS.get(topology, topology) for topology in TOPOLOGIES.names()}
    assert wanted - found == set()


def batch(cfg: CfgNode, side: int = 128) -> list[dict[str, object]]:
    """Two random images with a box, and its mask, each."""
    samples = []
    for low, high in ((10, 60), (40, 120)):
        masks = torch.zeros(1, side, side, dtype=torch.bool)
        masks[:, low:high, low:high] = True
        box = Boxes(torch.tensor([[low, low, high, high]], dtype=torch.float32))
        instances = Instances((side, side), gt_boxes=box, gt_classes=torch.zeros(1).long())
        if cfg.MODEL.MASK_ON:
            instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
        samples.append({"image": image, "instances": instances})
    return samples


@pytest.mark.parametrize("path", QUICK, ids=name)
def test_every_quick_start_trains(path: Path) -> None:
    # every anchor counts, so that every map of the pyramid gets a gradient
    anchors = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100_000)
    cfg = load(path, *anchors, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "INPUT.MASK_FORMAT", "bitmask")
    assert cfg.OUTPUT_DIR == f"output/quickstart/{path.stem}"
    model = build_model(cfg).train()
    assert_maps(model, path)
    for parameter in model.backbone.parameters():
        if not parameter.any():  # nothing goes back through what starts at zero in the first step
            nn.init.normal_(parameter, std=0.01)
    with EventStorage():
        losses: dict[str, Tensor] = model(batch(cfg))
    assert len(losses) >= 4
    assert [key for key, loss in losses.items() if not torch.isfinite(loss)] == []
    sum(losses.values()).backward()  # type: ignore[union-attr]
    pyramid = {
        key: parameter.grad
        for key, parameter in model.backbone.named_parameters()
        if parameter.requires_grad and not key.startswith("bottom_up.")
    }
    assert [key for key, grad in pyramid.items() if grad is None] == []
    assert [key for key, grad in pyramid.items() if not torch.isfinite(grad).all()] == []
    assert [key for key, grad in pyramid.items() if not grad.any()] == []


@pytest.mark.parametrize("path", LAZY, ids=name)
def test_lazy_configs_build_what_their_yaml_twins_build(path: Path) -> None:
    twin = model_without_numbers(CONFIGS / TWINS[path.stem] / f"{path.stem}.yaml")
    model = lazy_model(path)
    assert shapes(model) == shapes(twin)
    frozen = [
        [k for k, p in each.named_parameters() if not p.requires_grad] for each in (model, twin)
    ]
    assert frozen[0] == frozen[1]
    assert settings(model.backbone) == settings(twin.backbone)


def settings(backbone: nn.Module) -> list[str]:
    """Every module with its settings, as torch prints them."""
    return [re.sub(r"\s+", " ", repr(module)) for module in backbone.children()]


@pytest.mark.parametrize("path", LAZY, ids=name)
def test_lazy_configs_are_whole(path: Path, tmp_path: Path) -> None:
    cfg = LazyConfig.load(str(path))
    assert {"model", "optimizer", "lr_multiplier", "dataloader", "train"} <= set(cfg)
    cfg.optimizer.params.model = nn.Conv2d(1, 1, 1)
    assert instantiate(cfg.optimizer).param_groups
    multiplier = instantiate(cfg.lr_multiplier)
    assert multiplier(0.0) < 0.01 and multiplier(0.5) == 1.0
    LazyConfig.save(LazyConfig.load(str(path)), str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert again.model.backbone.topology == cfg.model.backbone.topology
