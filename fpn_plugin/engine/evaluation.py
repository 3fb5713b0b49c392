"""Evaluators by a dataset's `evaluator_type`, as Detectron2's own training script chooses them."""

from __future__ import annotations

import os
from typing import Callable

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from fpn_plugin.registry import Registry

EvaluatorBuilder = Callable[[CfgNode, str, str], "list[DatasetEvaluator]"]
EVALUATORS: Registry[EvaluatorBuilder] = Registry("evaluator_type")


@EVALUATORS.register("coco")
def _coco(cfg: CfgNode, name: str, folder: str) -> list[DatasetEvaluator]:
    return [COCOEvaluator(name, output_dir=folder, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)]


@EVALUATORS.register("sem_seg")
def _sem_seg(cfg: CfgNode, name: str, folder: str) -> list[DatasetEvaluator]:
    return [SemSegEvaluator(name, distributed=True, output_dir=folder)]


@EVALUATORS.register("coco_panoptic_seg")
def _panoptic(cfg: CfgNode, name: str, folder: str) -> list[DatasetEvaluator]:
    return [
        *_sem_seg(cfg, name, folder),
        *_coco(cfg, name, folder),
        COCOPanopticEvaluator(name, folder),
    ]


@EVALUATORS.register("lvis")
def _lvis(cfg: CfgNode, name: str, folder: str) -> list[DatasetEvaluator]:
    return [LVISEvaluator(name, output_dir=folder)]


@EVALUATORS.register("cityscapes_instance")
def _cityscapes_instance(cfg: CfgNode, name: str, folder: str) -> list[DatasetEvaluator]:
    return [CityscapesInstanceEvaluator(name)]


@EVALUATORS.register("cityscapes_sem_seg")
def _cityscapes_sem_seg(cfg: CfgNode, name: str, folder: str) -> list[DatasetEvaluator]:
    return [CityscapesSemSegEvaluator(name)]


@EVALUATORS.register("pascal_voc")
def _pascal_voc(cfg: CfgNode, name: str, folder: str) -> list[DatasetEvaluator]:
    return [PascalVOCDetectionEvaluator(name)]


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str = "") -> DatasetEvaluator:
    """The evaluator of a registered dataset.

    Args:
        output_folder: where it writes its files. By default `OUTPUT_DIR/inference`, with a folder
            per dataset in it when `DATASETS.TEST` names several.

    Raises:
        KeyError: if the dataset's `evaluator_type` is missing or unknown; it names the choices.
    """
    if not output_folder:
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            output_folder = os.path.join(output_folder, dataset_name)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    build = EVALUATORS.get(
        kind, f"MetadataCatalog.get({dataset_name!r}).evaluator_type (DATASETS.TEST)"
    )
    evaluators = build(cfg, dataset_name, output_folder)
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
