"""Keypoint R-CNN in every layout: Detectron2's loss and inference, with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import ROI_KEYPOINT_HEAD_REGISTRY
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.utils.events import EventStorage
from runs import config
from torch import Tensor, nn

from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.modeling.speed import prepare_for_inference, prepare_for_training

LAYOUTS = {
    "channels_last": ["MODEL.CHANNELS_LAST", True],
    "gathered": ["MODEL.FAST_ROI_ALIGN", True],
    "both": ["MODEL.CHANNELS_LAST", True, "MODEL.FAST_ROI_ALIGN", True],
    "bf16": ["MODEL.CHANNELS_LAST", True, "SOLVER.AMP.ENABLED", True, "TEST.FOLD_NORMS", True],
}


class OneLayerHead(BaseKeypointRCNNHead, nn.Sequential):
    """A user's own head, whose layers do not have Detectron2's names."""

    def __init__(self, cfg: CfgNode, input_shape: Any) -> None:
        super().__init__(**BaseKeypointRCNNHead.from_config(cfg, input_shape))
        self.conv = nn.Conv2d(input_shape.channels, self.num_keypoints, 3, padding=1)

    def layers(self, x: Tensor) -> Tensor:
        return self.conv(x)


if "OneLayerHead" not in ROI_KEYPOINT_HEAD_REGISTRY:
    ROI_KEYPOINT_HEAD_REGISTRY.register(OneLayerHead)


def losses_of(cfg: CfgNode, model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    torch.manual_seed(0)  # which proposals are sampled
    with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=cfg.SOLVER.AMP.ENABLED):
        losses = model.train()(batch)
    sum(losses.values()).backward()
    return {name: value.detach() for name, value in losses.items()}


@pytest.mark.parametrize("head", ["KRCNNConvDeconvUpsampleHead", "OneLayerHead"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_numbers_of_the_plain_model(
    layout: str, head: str, tmp_path: Path
) -> None:
    keys = ["MODEL.ROI_KEYPOINT_HEAD.NAME", head, "MODEL.RESNETS.NORM", "FrozenBN"]
    cfg = config("keypoint_rcnn", "fpn", tmp_path, *keys)
    torch.manual_seed(0)
    model = build_model(cfg)
    batch = next(iter(Trainer.build_train_loader(cfg)))
    expected = losses_of(cfg, model, batch)
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        found = [output["instances"] for output in model.eval()(batch)]
    cfg.merge_from_list(LAYOUTS[layout])
    for parameter in model.parameters():
        parameter.grad = None
    model = prepare_for_training(model, cfg)
    losses = losses_of(cfg, model, batch)
    half = cfg.SOLVER.AMP.ENABLED
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=0.05 if half else 1e-4, atol=1e-4)
    if not half:
        for name, parameter in model.roi_heads.keypoint_head.named_parameters():
            torch.testing.assert_close(
                parameter.grad, gradients["roi_heads.keypoint_head." + name], rtol=1e-3, atol=1e-5
            )
    for _ in range(2):  # every evaluation prepares the model again
        prepared = prepare_for_inference(model.eval(), cfg)
    with torch.no_grad():
        outputs = [output["instances"] for output in prepared(batch)]
    for instances, plain in zip(outputs, found, strict=True):
        assert instances.pred_keypoints.shape[1:] == (cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, 3)
        if not half:
            torch.testing.assert_close(
                instances.pred_keypoints, plain.pred_keypoints, rtol=1e-3, atol=1e-2
            )
    hooks = [m._forward_hooks for m in model.modules()] + [
        m._forward_pre_hooks for m in model.modules()
    ]
    assert sum(map(len, hooks)) == 1
