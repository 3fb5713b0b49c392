"""A tiny detector with one pyramid, and another that starts as it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tiny import tiny_config
from torch import Tensor, nn

from fpn_plugin.config.warm_start import pyramid_settings
from fpn_plugin.engine.warm.start import WarmStart
from fpn_plugin.engine.warm.widths import shapes_at_width

# its maps are small, so that biases and what is added to them count
NETWORK = {"MODEL__RESNETS__DEPTH": 18}
OURS = {**NETWORK, "MODEL__BACKBONE__NAME": "build_pyramid_backbone"}
MASKS: dict[str, Any] = {
    "MODEL__MASK_ON": True,
    "MODEL__ROI_MASK_HEAD__CONV_DIM": 16,
    "MODEL__RPN__POST_NMS_TOPK_TEST": 30,
}
LEVELS = ["res3", "res4", "res5"]
RETINANET: dict[str, Any] = {
    "MODEL__META_ARCHITECTURE": "RetinaNet",
    "MODEL__RESNETS__OUT_FEATURES": LEVELS,
    "MODEL__FPN__IN_FEATURES": LEVELS,
    "MODEL__RETINANET__NUM_CLASSES": 2,
    "MODEL__RETINANET__IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
    "MODEL__RETINANET__SCORE_THRESH_TEST": 0.0,
    "MODEL__RETINANET__TOPK_CANDIDATES_TEST": 20,
}
BIFPN = {"TOPOLOGY": "bifpn", "FUSE_TYPE": "fast_normalized", "BLOCK": "separable", "NORM": "BN"}
TARGETS: dict[str, dict[str, Any]] = {
    "pafpn": {"TOPOLOGY": "pafpn"},
    "bfp": {"TOPOLOGY": "fpn+bfp"},
    "asff": {"TOPOLOGY": "fpn+asff"},
    "fapn": {"TOPOLOGY": "fapn"},
    "dyhead": {"TOPOLOGY": "fpn+dyhead(depth=1)"},
    "bifpn": BIFPN,
}


class Warmed(NamedTuple):
    """A detector, and the one that starts as it, in evaluation mode."""

    before: nn.Module
    after: nn.Module
    start: WarmStart


def keys(fpn: dict[str, Any]) -> dict[str, Any]:
    """Keys of `MODEL.FPN`, as `tiny_config` takes them."""
    return {**OURS, **{f"MODEL__FPN__{key}": value for key, value in fpn.items()}}


def a_config(
    folder: Path, fpn: dict[str, Any], source: CfgNode | None = None, **overrides: Any
) -> CfgNode:
    """A config with these keys of `MODEL.FPN`; it starts as `source`'s pyramid, if one is given."""
    cfg = tiny_config(folder, **{**keys({}), **overrides, **keys(fpn)})
    if source is not None:
        cfg.MODEL.FPN.WARM_START = True
        cfg.MODEL.FPN.WARM_START_FROM = CfgNode(pyramid_settings(source), new_allowed=True)
    return cfg


def a_model(cfg: CfgNode) -> nn.Module:
    """With random biases and statistics too, so that each of them counts."""
    model = build_model(cfg).eval()
    for name, x in model.state_dict().items():
        if x.is_floating_point() and "bottom_up" not in name and not name.startswith("pixel"):
            noise = torch.randn_like(x) * 0.02
            x.add_(noise.abs() if "running_var" in name else noise)
    return model


def warm(folder: Path, old: dict[str, Any], new: dict[str, Any], **overrides: Any) -> Warmed:
    """Two detectors whose pyramids have these keys of `MODEL.FPN`."""
    source = a_config(folder, old, **overrides)
    target = a_config(folder, new, source, **overrides)
    before, after = a_model(source), build_model(target).eval()
    start = WarmStart(after, "old.pth", shapes_at_width(target, source.MODEL.FPN.OUT_CHANNELS))
    after.load_state_dict(start(before.state_dict()))
    return Warmed(before, after, start)


def image() -> dict[str, Any]:
    """An input of sides that are no multiples of anything."""
    return {"image": torch.randint(0, 255, (3, 70, 90)).float(), "height": 70, "width": 90}


@torch.no_grad()
def seen(model: Any, inputs: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A detector's maps, and what it finds."""
    maps = model.backbone(model.preprocess_image(inputs).tensor)
    found = model(inputs)[0]["instances"].get_fields()
    boxes = found.pop("pred_boxes").tensor
    return maps, {"boxes": boxes, **found}


def largest_difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Of maps of one width, relative to each map's largest value."""
    return max(float((x - two[name]).abs().max() / x.abs().max()) for name, x in one.items())
