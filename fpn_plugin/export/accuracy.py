"""AP of a detector, and of it with an exported file in the place of its backbone or of itself."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, Dict, Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from fpn_plugin.evaluation.coco_metrics import detection_limit
from fpn_plugin.evaluation.scores import score_results
from fpn_plugin.export.model import ExportModel
from fpn_plugin.export.openvino_ir import Runner
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.detector import Detector
from fpn_plugin.visualize.test_data import Predict, TestData, find_objects, part_of

EVALUATE, MAX_DROP = "--evaluate", "--max-drop"
_TASKS = {"bbox": "box AP", "segm": "mask AP"}


@dataclass(frozen=True)
class Evaluation:
    """AP in percent, by task, of the model and of its file.

    Attributes:
        images: of the test set.
    """

    dataset: str
    images: int
    model: Mapping[str, float]
    file: Mapping[str, float]

    def drops(self) -> dict[str, float]:
        """By how much the file's AP is below the model's."""
        return {task: ap - self.file.get(task, 0.0) for task, ap in self.model.items()}

    def __str__(self) -> str:
        parts = [
            f"{_TASKS[task]} {ap:.2f} of the model, {self.file.get(task, 0.0):.2f} of the file"
            for task, ap in self.model.items()
        ]
        return f"{self.dataset}, {self.images} images: {'; '.join(parts)}"


class FileBackbone(Backbone):
    """An exported backbone in a detector.

    Args:
        run: runs the file.
        original: whose file it is.
    """

    def __init__(self, run: Runner, original: Any) -> None:
        super().__init__()
        self._run, self._shapes = run, original.output_shape()
        self._divisibility = original.size_divisibility
        self._constraints = original.padding_constraints

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """The maps of images `(N, C, H, W)`."""
        return dict(zip(self._shapes, self._run(x.contiguous())))

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return self._shapes

    @property
    def size_divisibility(self) -> int:
        return self._divisibility

    @property
    def padding_constraints(self) -> Dict[str, int]:
        return self._constraints


class Judge:
    """Measures AP on a test set.

    Args:
        detector: what was exported, or what the exported backbone is a part of.
        model: what was exported.
        data: the test set.
    """

    def __init__(self, detector: Detector, model: ExportModel, data: TestData, bar: Bar) -> None:
        self._detector, self._model, self.data, self._bar = detector, model, data, bar
        self._limit = detection_limit(detector.cfg.TEST.DETECTIONS_PER_IMAGE)
        self.reference = self._average_precision(predict_eagerly(detector.model), "the model")

    def compare(self, run: Runner) -> Evaluation:
        """Evaluate a file."""
        ap = self._average_precision(self._predict_by(run), "the file")
        return Evaluation(self.data.name, len(self.data.records), self.reference, ap)

    def score(self, run: Runner, records: Sequence[Mapping[str, Any]]) -> float:
        """The mean over the tasks of AP on some of the images, from 0 to 1."""
        ap = self._average_precision(self._predict_by(run), "the file", records)
        return sum(ap.values()) / len(ap) / 100

    def _average_precision(
        self, predict: Predict, name: str, records: Sequence[Any] | None = None
    ) -> dict[str, float]:
        data = self.data if records is None else replace(self.data, records=records)
        results = find_objects(predict, self._detector.mapper, data, name, self._bar, EVALUATE)
        if results is None:
            raise ValueError(f"{EVALUATE} {data.name}: the model gives no boxes of objects")
        truth = part_of(data.truth, [record["image_id"] for record in data.records])
        scores = score_results(results, truth, self._limit)
        # where nothing at all is found, or nothing is there to be found
        aps = {task: score.metrics["AP"] for task, score in scores.items()} or {"bbox": 0.0}
        if records is None and any(math.isnan(ap) for ap in aps.values()):
            raise ValueError(f"{EVALUATE} {data.name}: its images have no objects")
        return {task: 0.0 if math.isnan(ap) else ap for task, ap in aps.items()}

    def _predict_by(self, run: Runner) -> Predict:
        return predict_by(run, self._model, self._detector.model)


def predict_by(run: Runner, model: ExportModel, detector: Any) -> Predict:
    """What runs an exported file on a model's input, up to detections in the image's own size.

    Args:
        run: runs the file.
        model: what was exported.
        detector: that an exported backbone is a part of; it stays as it is.
    """
    if model.what == "backbone":
        detector = copy.copy(detector)
        detector._modules = dict(detector._modules)  # of the copy alone
        detector.backbone = FileBackbone(run, detector.backbone)
        return predict_eagerly(detector)

    def predict(model_input: Mapping[str, Any]) -> Mapping[str, Any]:
        image = torch.as_tensor(model_input["image"]).float()
        instances = Instances((image.shape[-2], image.shape[-1]))
        for name, value in zip(model.outputs, run(image)):
            instances.set(name, Boxes(value) if name == "pred_boxes" else value)
        size = (model_input["height"], model_input["width"])
        return {"instances": detector_postprocess(instances, *size)}

    return predict


def predict_eagerly(detector: Any) -> Predict:
    """What runs a detector on one input."""
    return lambda model_input: detector([model_input])[0]
