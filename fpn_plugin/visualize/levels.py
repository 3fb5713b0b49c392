"""The pyramid level that each detection comes from: recorded while the model runs, not guessed.

Two-stage heads: the level that the box head's pooler read the proposal at which became the
detection; Cascade R-CNN: that of its last stage. RetinaNet and FCOS: the level of the anchor or
point. Other models' detections have no level.

Hooks and patched methods stay on this instance of the model, and only inside the `with` block;
what it computes stays the same.
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

from fpn_plugin.modeling.pooling import GatherPooler

FIELD = "pred_levels"


@contextlib.contextmanager
def record_levels(model: nn.Module) -> Iterator[None]:
    """Inside, the model's detections have a field `pred_levels`, `(R,)`, if its heads are known.

    Args:
        model: in evaluation mode, without any wrapper.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(model, DenseDetector):
            stack.enter_context(_dense_levels(model))
        heads: Any = getattr(model, "roi_heads", None)
        pooler, predictors = _box_pooler(heads), _predictors(heads)
        if pooler is not None and predictors:
            stack.enter_context(_RoiRecorder(heads, pooler, predictors))
        yield


@contextlib.contextmanager
def _dense_levels(model: Any) -> Iterator[None]:
    """Decode as `DenseDetector` does, with the level noted before the levels are concatenated."""
    shapes = model.backbone.output_shape()
    levels = [shapes[name].stride.bit_length() - 1 for name in model.head_in_features]

    def decode(anchors: Any, scores: Any, deltas: Any, *settings: Any) -> Instances:
        per_level = []
        for level, predictions in zip(levels, zip(anchors, scores, deltas)):
            instances = model._decode_per_level_predictions(*predictions, *settings)
            instances.set(FIELD, torch.full_like(instances.pred_classes, level))
            per_level.append(instances)
        return Instances.cat(per_level)

    with _patched(model, "_decode_multi_level_predictions", decode):
        yield


@contextlib.contextmanager
def _patched(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, this instance has another method; its class keeps its own."""
    previous = vars(module).get(name)  # the instance may have been patched before
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)
        if previous is not None:
            setattr(module, name, previous)


class _RoiRecorder(contextlib.ExitStack):
    """Records which boxes ROI heads pool, and which of them become detections.

    The last step of the box head, a threshold and NMS, does not return the indices of what it keeps
    in all heads; so it is repeated on what it was given.
    """

    def __init__(
        self, heads: nn.Module, pooler: nn.Module, predictors: Sequence[FastRCNNOutputLayers]
    ) -> None:
        super().__init__()
        self.pooler: ROIPooler = getattr(pooler, "pooler", pooler)
        self.predictors = predictors
        # of the latest run: by image; scores by stage and image
        self.pooled: list[Boxes] = []
        self.boxes: Sequence[Tensor] = []
        self.scores: list[Sequence[Tensor]] = [[] for _ in predictors]
        self.callback(pooler.register_forward_pre_hook(self._record_pooled).remove)
        self.callback(heads.register_forward_hook(self._add_levels).remove)
        for stage, predictor in enumerate(predictors):
            self._record_predictions(stage, predictor)

    def _record_predictions(self, stage: int, predictor: Any) -> None:
        predict_boxes, predict_probs = predictor.predict_boxes, predictor.predict_probs

        def boxes(*args: Any) -> Any:
            self.boxes = predict_boxes(*args)
            return self.boxes

        def scores(*args: Any) -> Any:
            self.scores[stage] = predict_probs(*args)
            return self.scores[stage]

        self.enter_context(_patched(predictor, "predict_boxes", boxes))
        self.enter_context(_patched(predictor, "predict_probs", scores))

    def _record_pooled(self, pooler: nn.Module, args: tuple[Any, ...]) -> None:
        self.pooled = list(args[1])  # each stage of a cascade replaces those of the one before

    def _add_levels(self, heads: nn.Module, args: Any, output: tuple[list[Instances], Any]) -> None:
        for image, detections in enumerate(output[0]):
            kept = self._kept(image, detections)
            detections.set(FIELD, pooled_levels(self.pooler, self.pooled[image])[kept])

    def _kept(self, image: int, detections: Instances) -> Tensor:
        """The indices of the pooled boxes that became the detections, `(R,)`."""
        last, boxes = self.predictors[-1], self.boxes[image]
        # 1. A cascade averages its stages' scores, here in the same order, so to the bit.
        stages = [scores[image] for scores in self.scores]
        scores = stages[0]
        if len(stages) > 1:
            scores = sum(stages, torch.zeros(())) * (1.0 / len(stages))
        # 2. The threshold and NMS again, with the indices that they keep.
        result, kept = fast_rcnn_inference_single_image(
            boxes,
            scores,
            detections.image_size,
            last.test_score_thresh,
            last.test_nms_thresh,
            last.test_topk_per_image,
        )
        if not torch.equal(result.scores, detections.scores):
            raise RuntimeError("the box head does not choose detections as Detectron2's heads do")
        # 3. Detectron2 counts them after it has left out what is not finite.
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
    """The pooler of the box head; heads for one map (C4, DC5) call it `pooler`."""
    pooler = getattr(heads, "box_pooler", None) or getattr(heads, "pooler", None)
    return pooler if isinstance(pooler, (ROIPooler, GatherPooler)) else None


def _predictors(heads: Any) -> list[FastRCNNOutputLayers]:
    """One, or one per stage of a cascade; none if they are not Detectron2's."""
    predictors = getattr(heads, "box_predictor", None)
    predictors = list(predictors) if isinstance(predictors, nn.ModuleList) else [predictors]
    return predictors if all(isinstance(p, FastRCNNOutputLayers) for p in predictors) else []
