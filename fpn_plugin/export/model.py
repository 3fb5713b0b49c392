"""The exported model, a module from one tensor to named tensors: a bottom-up network with its
pyramid, or a whole detector. Shapes are `(N, C, H, W)`, sizes in pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, List, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, PanopticFPN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn

from fpn_plugin.data.deep_images import check_rule
from fpn_plugin.modeling.build import score_threshold
from fpn_plugin.visualize.images import class_names

WHAT = ("backbone", "detector")
MASK_THRESHOLD = 0.5  # of Detectron2's detector_postprocess, when it pastes masks
BATCH = 2  # of the example, as torch.export specializes on a size of 1


@dataclass(frozen=True)
class ExportModel:
    """A model to export.

    Attributes:
        what: one of `WHAT`.
        module: the network, in evaluation mode on the CPU. A backbone takes normalised images
            `(N, C, H, W)`, a detector takes pixels `(C, H, W)`; C is 3, or 1 for gray.
        outputs: the names of its outputs, in order.
        step: the sides of a backbone's images must be multiples of this.
        least: the smallest side that a file for any size takes.
        windowed: the first submodule with attention in windows; "" for none.
        info: what inference needs to know, for the JSON beside the file.
    """

    what: str
    module: nn.Module
    outputs: tuple[str, ...]
    step: int
    least: int
    windowed: str
    info: Mapping[str, Any]

    def example(self, size: Sequence[int], batch: int) -> Tensor:
        """Random images of a size, with edges at several scales; `batch` is for a backbone."""
        count = batch if self.what == "backbone" else 1
        channels = len(self.info["mean"])
        images = torch.zeros(count, channels, *size)
        for side in (2, 5, 13, 34):
            noise = torch.rand(count, channels, side, side)
            images += nn.functional.interpolate(noise, size=tuple(size), mode="nearest") / 4
        pixels = images * 255
        return self.normalise(pixels) if self.what == "backbone" else pixels[0]

    def normalise(self, pixels: Tensor) -> Tensor:
        """The input of a backbone for images `(N, C, H, W)` from 0 to 255."""
        mean, std = (torch.tensor(self.info[key]).view(-1, 1, 1) for key in ("mean", "std"))
        return (pixels - mean) / std

    def run(self, images: Tensor) -> List[Tensor]:
        """The outputs of the eager model, in order."""
        with torch.no_grad():
            outputs = self.module(images)
        return list(outputs.values()) if isinstance(outputs, Mapping) else list(outputs)


def export_backbone(cfg: CfgNode, model: Any) -> ExportModel:
    """The backbone of a model: a dict of maps by name, from high to low resolution.

    Raises:
        ValueError: if the model has none.
    """
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        raise ValueError(f"--what backbone: {type(model).__name__} has no backbone; take detector")
    backbone = model.backbone
    shapes = backbone.output_shape()
    strides = {name: shape.stride for name, shape in shapes.items()}
    channels = {name: shape.channels for name, shape in shapes.items()}
    network = getattr(backbone, "bottom_up", backbone)
    coarsest = max(strides.values())
    facts = {"strides": strides, "channels": channels, "normalised": True}
    square = backbone.padding_constraints.get("square_size", 0)
    return ExportModel(
        "backbone",
        backbone.eval(),
        tuple(strides),
        step=_step(network),
        # torch.export specializes on a map of one pixel, and estimates sizes from below
        least=2 * coarsest + 2,
        windowed=_find_windows(backbone),
        info={
            **_pixels(cfg),
            **_sizes(cfg),
            **facts,
            "layout": "NCHW",
            "size_divisibility": backbone.size_divisibility,
            "square_size": square,
        },
    )


def export_detector(cfg: CfgNode, model: nn.Module) -> ExportModel:
    """A whole detector for one image of any size, by Detectron2's `TracingAdapter`.

    Its outputs are boxes, classes, scores, and masks before they are pasted into the image.

    Raises:
        ValueError: for a model that Detectron2 cannot trace.
    """
    traceable = isinstance(model, (GeneralizedRCNN, DenseDetector))
    if not traceable or isinstance(model, PanopticFPN):
        raise ValueError(
            f"--what detector: Detectron2 traces R-CNNs, RetinaNet and FCOS, but this is a"
            f" {type(model).__name__}; take --what backbone"
        )
    image = torch.zeros(len(cfg.MODEL.PIXEL_MEAN), 128, 160)
    adapter = TracingAdapter(model.eval(), [{"image": image}], _detect).eval()
    adapter(torch.rand_like(image) * 255)  # sets outputs_schema
    names = tuple(adapter.outputs_schema.keys)
    facts = {"normalised": False, "layout": "CHW", "size_divisibility": 0, "square_size": 0}
    info = {
        **_pixels(cfg),
        **_sizes(cfg),
        **facts,
        "classes": class_names(list(cfg.DATASETS.TEST), cfg),
        "score_threshold": score_threshold(cfg)[1],
        "mask_threshold": MASK_THRESHOLD if "pred_masks" in names else None,
    }
    return ExportModel("detector", adapter, names, 1, 32, _find_windows(model), info)


def _detect(model: Any, inputs: List[Any]) -> dict[str, Tensor]:
    """The fields of the detections in a single image."""
    if isinstance(model, GeneralizedRCNN):
        instances = model.inference(inputs, do_postprocess=False)[0]
    else:
        instances = model(inputs)[0]["instances"]
    return {
        name: getattr(value, "tensor", value)
        for name, value in sorted(instances.get_fields().items())
        if isinstance(getattr(value, "tensor", value), Tensor)
    }


def _pixels(cfg: CfgNode) -> dict[str, Any]:
    """Mean and standard deviation per channel, of pixels from 0 to 255, the channel order, and how
    pixels of more than 8 bits become 0 to 255."""
    mean, std = (list(map(float, values)) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    return {
        "mean": mean,
        "std": std,
        "format": cfg.INPUT.FORMAT,
        "deep_images": check_rule(cfg.INPUT.get("DEEP_IMAGES", "percentile")),
    }


def _sizes(cfg: CfgNode) -> dict[str, int]:
    """What `ResizeShortestEdge` resizes images to in an evaluation; 0 for not at all."""
    return {"min_size_test": cfg.INPUT.MIN_SIZE_TEST, "max_size_test": cfg.INPUT.MAX_SIZE_TEST}


def _step(network: Any) -> int:
    """The number of pixels that the sides of images must be multiples of.

    Layers that pad as TensorFlow does for "same" pad by an amount that depends on the size. For any
    size it is too complicated for torch.export; at multiples of the stride it is a constant.
    """
    same = any(type(part).__name__.endswith("Same") for part in network.modules())
    stride = max(shape.stride for shape in network.output_shape().values()) if same else 1
    return math.lcm(network.size_divisibility or 1, stride)


def _find_windows(network: nn.Module) -> str:
    """The first submodule with attention in windows, found by Detectron2's and timm's attribute."""
    for name, module in network.named_modules():
        if getattr(module, "window_size", None) not in (None, 0, (0, 0)):
            return name
    return ""
