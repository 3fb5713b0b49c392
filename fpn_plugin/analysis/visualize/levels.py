"""The pyramid level that each detection comes from: recorded while the model runs, not guessed.

Two-stage heads: the level that the box head's pooler read the proposal at which became the
detection; Cascade R-CNN: that of its last stage. RetinaNet and FCOS: the level of the anchor or
point. Other models' detections have no level.

Only this instance of a model is watched, and only inside the `with` block; what it computes stays
the same.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator, Sequence

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.roi_heads.fast_rcnn import (
    FastRCNNOutputLayers,
    fast_rcnn_inference_single_image,
)
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from fpn_plugin.engine.pooling import GatherPooler

FIELD = "pred_levels"


@contextlib.contextmanager
def recorded_levels(model: nn.Module) -> Iterator[None]:
    """Inside, what the model detects has a field `pred_levels`, `(R,)`, if the model is known.

    Args:
        model: in evaluation mode, without any wrapper.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(model, DenseDetector):
            stack.enter_context(_dense_levels(model))
        heads: Any = getattr(model, "roi_heads", None)
        pooler, predictors = _box_pooler(heads), _predictors(heads)
        if pooler is not None and predictors:
            stack.enter_context(_RoiLevels(heads, pooler, predictors))
        yield


@contextlib.contextmanager
def _dense_levels(model: Any) -> Iterator[None]:
    shapes = model.backbone.output_shape()
    levels = [shapes[name].stride.bit_length() - 1 for name in model.head_in_features]

    def decode(anchors: Any, scores: Any, deltas: Any, *settings: Any) -> Instances:
        found = []
        for level, item in zip(levels, zip(anchors, scores, deltas)):
            one = model._decode_per_level_predictions(*item, *settings)
            one.set(FIELD, torch.full((len(one),), level, device=one.scores.device))
            found.append(one)
        return Instances.cat(found)

    with _replaced(model, "_decode_multi_level_predictions", decode):
        yield


@contextlib.contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, this instance has another method; its class keeps its own."""
    own = vars(module).get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)
        if own is not None:
            setattr(module, name, own)


class _RoiLevels(contextlib.ExitStack):
    """Watches ROI heads: which boxes are pooled, and which of them become detections.

    The box head's last step, a threshold and NMS, forgets where its results come from in some
    heads; so it is done once more on what it was given.
    """

    def __init__(
        self, heads: nn.Module, pooler: nn.Module, predictors: Sequence[FastRCNNOutputLayers]
    ) -> None:
        super().__init__()
        self.pooler: ROIPooler = getattr(pooler, "pooler", pooler)
        self.predictors = predictors
        self.pooled: list[Boxes] = []
        self.boxes: Sequence[Tensor] = []
        self.scores: list[Sequence[Tensor]] = [[] for _ in predictors]
        self.callback(pooler.register_forward_pre_hook(self._note_pooled).remove)
        self.callback(heads.register_forward_hook(self._attach).remove)
        for number, predictor in enumerate(predictors):
            self._watch(number, predictor)

    def _watch(self, number: int, predictor: Any) -> None:
        predict_boxes, predict_probs = predictor.predict_boxes, predictor.predict_probs

        def boxes(*args: Any) -> Any:
            self.boxes = predict_boxes(*args)
            return self.boxes

        def scores(*args: Any) -> Any:
            self.scores[number] = predict_probs(*args)
            return self.scores[number]

        self.enter_context(_replaced(predictor, "predict_boxes", boxes))
        self.enter_context(_replaced(predictor, "predict_probs", scores))

    def _note_pooled(self, pooler: nn.Module, args: tuple[Any, ...]) -> None:
        self.pooled = list(args[1])  # of a cascade the last stage's stay

    def _attach(self, heads: nn.Module, args: Any, output: tuple[list[Instances], Any]) -> None:
        for image, found in enumerate(output[0]):
            kept = self._kept(image, found)
            found.set(FIELD, pooled_levels(self.pooler, self.pooled[image])[kept])

    def _kept(self, image: int, found: Instances) -> Tensor:
        """Which of the pooled boxes became the detections."""
        last, boxes = self.predictors[-1], self.boxes[image]
        stages = [item[image] for item in self.scores]
        scores = stages[0]
        if len(stages) > 1:  # as CascadeROIHeads does it, to the bit
            scores = sum(stages, torch.zeros(())) * (1.0 / len(stages))
        result, kept = fast_rcnn_inference_single_image(
            boxes,
            scores,
            found.image_size,
            last.test_score_thresh,
            last.test_nms_thresh,
            last.test_topk_per_image,
        )
        if not torch.equal(result.scores, found.scores):
            raise RuntimeError("the box head does not choose detections as Detectron2's heads do")
        # Detectron2 counts after it has left out what is not finite
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
        return finite.nonzero()[:, 0][kept]


def pooled_levels(pooler: ROIPooler, boxes: Boxes) -> Tensor:
    """The level that a pooler reads each box at, `(R,)`."""
    levels = torch.full((len(boxes),), pooler.min_level, device=boxes.device)
    if len(pooler.level_poolers) == 1 or not len(boxes):
        return levels
    size, level = pooler.canonical_box_size, pooler.canonical_level
    return levels + assign_boxes_to_levels([boxes], pooler.min_level, pooler.max_level, size, level)


def _box_pooler(heads: Any) -> nn.Module | None:
    """The pooler of the box head; that of heads for one map (C4, DC5) is called otherwise."""
    pooler = getattr(heads, "box_pooler", None) or getattr(heads, "pooler", None)
    return pooler if isinstance(pooler, (ROIPooler, GatherPooler)) else None


def _predictors(heads: Any) -> list[FastRCNNOutputLayers]:
    """One, or one per stage of a cascade; none if they are not Detectron2's."""
    found = getattr(heads, "box_predictor", None)
    found = list(found) if isinstance(found, nn.ModuleList) else [found]
    return found if all(isinstance(item, FastRCNNOutputLayers) for item in found) else []
