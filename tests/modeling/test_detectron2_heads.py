"""Heads by config against Detectron2's own: FCOS as its Python config builds it, Cascade and RPN alone on its FPN."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from helpers import zoo_config
from prepare_scenes import CLASSES
from scene_data import write_split
from torch import Tensor, nn

from fpn_plugin import add_fpn_config, resolve_config
from fpn_plugin.data.checks import check_config_datasets
from fpn_plugin.data.coco_format import register_own

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FCOS = "COCO-Detection/fcos_R_50_FPN_1x"
# an untrained ResNet multiplies its input by ten thousand, and its heads score about zero
SCALE = ("MODEL.PIXEL_STD", [1e5, 1e5, 1e5], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", -1.0)
R18 = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
SMALL = ("MODEL.ROI_BOX_HEAD.FC_DIM", 64, "MODEL.RPN.POST_NMS_TOPK_TEST", 50, *R18)
SMALL += ("MODEL.ROI_MASK_HEAD.CONV_DIM", 32, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64)
SMALL += ("TEST.DETECTIONS_PER_IMAGE", 20)


def fcos_config(*overrides: object) -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{FCOS}.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *overrides])
    return resolve_config(cfg)


def batch() -> list[dict[str, object]]:
    """Two images with two objects each."""
    samples: list[dict[str, object]] = []
    for height, width in [(96, 128), (80, 96)]:
        target = Instances((height, width))
        boxes = [[8.0, 8, 60, 50], [30, 20, 90, 76]]
        target.gt_boxes = Boxes(torch.tensor(boxes))
        target.gt_classes = torch.tensor([0, 3])
        target.gt_masks = PolygonMasks([[[x, y, u, y, u, v, x, v]] for x, y, u, v in boxes])
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        samples.append({"image": image, "instances": target})
    return samples


def losses(model: nn.Module, samples: list[dict[str, object]]) -> dict[str, Tensor]:
    torch.manual_seed(7)  # the heads sample their boxes
    with EventStorage(0):
        return model.train()(samples)


@torch.no_grad()
def results(model: nn.Module, samples: list[dict[str, object]]) -> list[Tensor]:
    """All tensors that a model gives."""
    flat: list[Tensor] = []
    for result in model.eval()(samples):
        for field in (result.get("instances") or result["proposals"]).get_fields().values():
            flat.append(field.tensor if isinstance(field, Boxes) else field)
    return flat


def assert_same(theirs: nn.Module, mine: nn.Module) -> None:
    """The same losses and results, bit for bit, with the same weights."""
    mine.load_state_dict(theirs.state_dict(), strict=True)
    samples = batch()
    one, two = losses(theirs, samples), losses(mine, samples)
    assert list(one) == list(two) and len(one) > 1
    for name in one:
        assert torch.equal(one[name], two[name]) and torch.isfinite(one[name]), name
    found, found_by_mine = results(theirs, samples), results(mine, samples)
    assert sum(value.numel() for value in found) > 100
    assert all(torch.equal(x, y) for x, y in zip(found, found_by_mine, strict=True))


def test_fcos_is_detectron2s() -> None:
    lazy = model_zoo.get_config(f"{FCOS}.py").model
    lazy.pixel_std, lazy.test_score_thresh = [1e5, 1e5, 1e5], 0.0
    keys = ("MODEL.PIXEL_STD", [1e5, 1e5, 1e5], "MODEL.FCOS.SCORE_THRESH_TEST", 0.0)
    theirs, mine = instantiate(lazy), build_model(fcos_config(*keys))
    assert isinstance(mine, fcos.FCOS)
    assert list(theirs.state_dict()) == list(mine.state_dict())  # checkpoints load either way
    trained = [
        [k for k, p in each.named_parameters() if p.requires_grad] for each in (theirs, mine)
    ]
    assert trained[0] == trained[1]
    assert_same(theirs, mine)


def test_fcos_settings_are_detectron2s() -> None:
    theirs = model_zoo.get_config(f"{FCOS}.py").model
    model = build_model(fcos_config("MODEL.RESNETS.DEPTH", 50))
    inspected = fcos.FCOS.__init__.__kwdefaults__
    for name in ("center_sampling_radius", "focal_loss_alpha", "focal_loss_gamma"):
        assert getattr(model, name) == theirs.get(name, inspected[name])
    for name in ("test_score_thresh", "test_topk_candidates", "test_nms_thresh"):
        assert getattr(model, name) == theirs.get(name, inspected[name])
    assert model.max_detections_per_image == inspected["max_detections_per_image"]
    assert model.head_in_features == list(theirs.head_in_features)
    assert model.num_classes == theirs.num_classes
    assert model.pixel_mean.flatten().tolist() == pytest.approx(list(theirs.pixel_mean))


def test_fcos_by_config_and_by_arguments() -> None:
    keys = ("MODEL.FCOS.NUM_CONVS", 1, "MODEL.FCOS.NUM_CLASSES", 3, "MODEL.FCOS.NORM", "")
    cfg = fcos_config(*R18, *keys)
    model = build_model(cfg)
    assert model.head.cls_score.out_channels == 3 and len(model.head.cls_subnet) == 2
    again = META_ARCH_REGISTRY.get("FCOS")(
        backbone=model.backbone,
        head=model.head,
        num_classes=3,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )
    assert again.head_in_features == cfg.MODEL.FCOS.IN_FEATURES


@pytest.mark.parametrize(
    "keys, message",
    [
        (["MODEL.FCOS.IN_FEATURES", ["p2", "p3"]], r"FCOS.IN_FEATURES: \['p2'\].*p3, p4, p5, p6"),
        (["MODEL.FCOS.IN_FEATURES", []], "MODEL.FCOS.IN_FEATURES: it is empty"),
        (["MODEL.FPN.OUT_CHANNELS", 88], "MODEL.FCOS.NORM: 'GN' is no norm for maps of 88"),
        (["MODEL.FCOS.NORM", "XN"], "MODEL.FCOS.NORM: 'XN' is no norm.*SyncBN"),
    ],
)
def test_fcos_mistakes_name_their_key(keys: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(fcos_config(*R18, *keys))


@pytest.fixture
def own_names() -> Iterator[None]:
    """`own_train` and `own_val` are free before and after, whatever other tests left."""
    _forget_own()
    yield
    _forget_own()


def _forget_own() -> None:
    for name in ("own_train", "own_val"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_fcos_learns_the_classes_of_own_data(tmp_path: Path, own_names: None) -> None:
    cfg = fcos_config()
    for split in ("train", "val"):
        cfg.DATASETS.OWN[f"{split.upper()}_JSON"] = str(write_split(tmp_path, split))
        cfg.DATASETS.OWN[f"{split.upper()}_IMAGES"] = str(tmp_path)
    assert register_own(cfg).MODEL.FCOS.NUM_CLASSES == len(CLASSES)
    check_config_datasets(cfg)
    cfg.MODEL.FCOS.NUM_CLASSES = 3
    with pytest.raises(ValueError, match="MODEL.FCOS.NUM_CLASSES is 3, but dataset own_train"):
        check_config_datasets(cfg)


@pytest.mark.parametrize(
    "path", ["Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", "COCO-Detection/rpn_R_50_FPN_1x.yaml"]
)
def test_cascade_and_rpn_give_detectron2s_numbers(path: str) -> None:
    """The other heads are compared in tests/pyramid/test_detectron2_parity.py."""
    cfg = zoo_config(path, *SCALE, *SMALL)
    theirs = build_model(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_pyramid_backbone"
    mine = build_model(cfg)
    assert list(theirs.state_dict()) == list(mine.state_dict())
    assert_same(theirs, mine)
