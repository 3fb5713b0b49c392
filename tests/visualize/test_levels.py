"""The level of each detection is the one it was made from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from helpers import randomize, zoo_config
from torch import Tensor, nn

from fpn_plugin.config.heads import resolve_heads
from fpn_plugin.modeling.pooling import gather_poolers
from fpn_plugin.visualize.levels import FIELD, pooled_levels, record_levels

RCNN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
SMALL: tuple[Any, ...] = (
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.PIXEL_STD", [58.0] * 3),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RPN.POST_NMS_TOPK_TEST", 30),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.RETINANET.NUM_CONVS", 1),
    *("MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
    *("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 40, "MODEL.FCOS.TOPK_CANDIDATES_TEST", 40),
    *("MODEL.FCOS.NUM_CLASSES", 3, "MODEL.FCOS.NUM_CONVS", 1, "MODEL.FCOS.SCORE_THRESH_TEST", 0.0),
)
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)
FCOS = (
    *("MODEL.META_ARCHITECTURE", "FCOS", "MODEL.BACKBONE.NAME", "build_pyramid_backbone"),
    *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
)
MODELS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "standard": (RCNN, ()),
    "cascade": (RCNN, CASCADE),
    "retinanet": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", ()),
    "fcos": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", FCOS),
    "c4": ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", ()),
}
# sides of square proposals, and the level of each by equation 1 of arXiv:1612.03144:
# floor(4 + log2(side / 224)), from 2 to 5
SIDES = {20: 2, 80: 2, 111: 2, 113: 3, 200: 3, 223: 3, 225: 4, 300: 4, 447: 4, 449: 5, 500: 5}


def make(name: str) -> Any:
    path, overrides = MODELS[name]
    cfg = zoo_config(path, *SMALL, *overrides)
    resolve_heads(cfg)
    model = build_model(cfg).eval()
    for module in model.modules():  # so that boxes move and scores differ
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.05)
    return model


def image(side: int = 160) -> dict[str, Tensor]:
    return {"image": torch.rand(3, side, side + 32) * 255}


@torch.no_grad()
def detect(model: Any, *images: dict[str, Tensor]) -> list[Instances]:
    return [output["instances"] for output in model(list(images))]


@pytest.mark.parametrize("name", MODELS)
def test_recording_changes_nothing_and_leaves_nothing(name: str) -> None:
    model, picture = make(name), image()
    before = [set(vars(module)) for module in model.modules()]
    plain = detect(model, picture)[0]
    with record_levels(model):
        recorded = detect(model, picture)[0]
    after = detect(model, picture)[0]
    assert len(plain) > 3 and recorded.has(FIELD) and not after.has(FIELD)
    assert torch.equal(plain.pred_boxes.tensor, recorded.pred_boxes.tensor)
    assert torch.equal(plain.scores, recorded.scores)
    assert before == [set(vars(module)) for module in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    strides = {shape.stride for shape in model.backbone.output_shape().values()}
    assert {2 ** int(level) for level in recorded.get(FIELD)} <= strides
    assert name != "c4" or set(recorded.get(FIELD).tolist()) == {4}


class Proposals(nn.Module):
    """A proposal generator that gives what it was given."""

    def __init__(self, *boxes: Tensor) -> None:
        super().__init__()
        self.boxes = boxes

    def forward(self, images: Any, features: Any, targets: Any) -> tuple[list[Instances], dict]:
        proposals = []
        for size, boxes in zip(images.image_sizes, self.boxes):
            proposals.append(Instances(size, proposal_boxes=Boxes(boxes.clone())))
            proposals[-1].objectness_logits = torch.zeros(len(boxes))
        return proposals, {}


@pytest.mark.parametrize("fast", [False, True])
def test_two_stage_levels_by_hand(fast: bool) -> None:
    """Proposals of known sizes; each box stays where it is, and its place tells which it was."""
    model = make("standard")
    sides = list(SIDES)
    first = torch.tensor(
        [[3.0 * i, 2.0 * i, 3.0 * i + s, 2.0 * i + s] for i, s in enumerate(sides)]
    )
    model.proposal_generator = Proposals(first, first.flip(0)[:4])
    nn.init.zeros_(model.roi_heads.box_predictor.bbox_pred.weight)
    model.roi_heads.box_predictor.test_nms_thresh = 1.0
    if fast:
        gather_poolers(model)
    with record_levels(model):
        results = detect(model, image(576), image(576))
    assert len(results[0]) > len(sides)
    for detections, given in zip(results, (first, first.flip(0)[:4])):
        for box, level in zip(detections.pred_boxes.tensor, detections.get(FIELD)):
            assert (given - box).abs().sum(dim=1).min() < 1e-2
            side = sides[int((first - box).abs().sum(dim=1).argmin())]
            assert int(level) == SIDES[side]
    assert set(results[0].get(FIELD).tolist()) == {2, 3, 4, 5}


def test_a_cascades_level_is_its_last_stages() -> None:
    """The first two stages make boxes 4 times as large, so 2 levels coarser than the proposals."""
    model = make("cascade")
    proposals = torch.tensor([[250.0, 250.0, 280.0, 280.0], [100.0, 100.0, 180.0, 180.0]])
    model.proposal_generator = Proposals(proposals)
    grow = torch.tensor([0.0, 0.0, 1.0, 1.0]) * torch.log(torch.tensor(2.0))
    for stage, predictor in enumerate(model.roi_heads.box_predictor):
        nn.init.zeros_(predictor.bbox_pred.weight)
        weights = torch.tensor(predictor.box2box_transform.weights)
        predictor.bbox_pred.bias.data = grow * weights * (stage < 2)
    with record_levels(model):
        detections = detect(model, image(576))[0]
    # 30 -> 120 and 80 -> 300 (at the image's border); the proposals themselves are of level 2
    sides = detections.pred_boxes.area().sqrt().round().long().tolist()
    assert set(zip(sides, detections.get(FIELD).tolist())) == {(120, 3), (300, 4)}


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_dense_levels_by_silencing_all_others(name: str) -> None:
    """With every level but one silenced, all detections are that level's."""
    model, picture = make(name), image(256)
    randomize(model.head)
    nn.init.ones_(model.head.bbox_pred.bias)
    forward = model.head.forward
    for number, feature in enumerate(model.head_in_features):

        def only(features: list[Tensor], kept: int = number) -> Any:
            logits, *rest = forward(features)
            silenced = [x if i == kept else x.new_full(x.shape, -1e4) for i, x in enumerate(logits)]
            return (silenced, *rest)

        model.head.forward = only
        with record_levels(model):
            detections = detect(model, picture)[0]
        sure = detections[detections.scores > 1e-6]
        assert len(sure) and set(sure.get(FIELD).tolist()) == {int(feature[1:])}


def test_boxes_that_are_not_finite() -> None:
    """Detectron2 leaves them out before it counts; the levels of the others must not shift."""
    model = make("standard")
    sides = [400.0, 20.0, 240.0]
    model.proposal_generator = Proposals(torch.tensor([[0.0, 0.0, side, side] for side in sides]))
    predictor = model.roi_heads.box_predictor
    nn.init.zeros_(predictor.bbox_pred.weight)
    probabilities = FastRCNNOutputLayers.predict_probs

    def broken(predictions: Any, proposals: Any) -> Any:
        scores = probabilities(predictor, predictions, proposals)
        scores[0][0] = float("nan")
        return scores

    predictor.predict_probs = broken
    with record_levels(model):
        detections = detect(model, image(576))[0]
    sizes = detections.pred_boxes.area().sqrt().round().long().tolist()
    assert set(zip(sizes, detections.get(FIELD).tolist())) == {(20, 2), (240, 4)}
    assert predictor.predict_probs is broken


def test_other_models_have_no_levels() -> None:
    with record_levels(nn.Linear(2, 2)):
        pass
    pooler = ROIPooler(7, (1 / 8, 1 / 16), 0, "ROIAlignV2")
    assert pooled_levels(pooler, Boxes(torch.zeros(0, 4))).tolist() == []
    assert pooled_levels(pooler, Boxes(torch.tensor([[0.0, 0, 9, 9]]))).tolist() == [3]
