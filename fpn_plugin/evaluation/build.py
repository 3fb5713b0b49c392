"""Evaluators by a dataset's `evaluator_type`, as Detectron2's own training script chooses them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import tempfile
from typing import Any, Callable, Iterator, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.evaluation.coco_evaluation import COCOeval_opt
from detectron2.utils.file_io import PathManager
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_plugin.data.coco_records import mask_truth, read_truth
from fpn_plugin.evaluation.augmentation import check_test_augmentation
from fpn_plugin.evaluation.coco_metrics import (
    COCO_LIMIT,
    check_oks_sigmas,
    detection_limit,
    evaluate_detections,
    prepare_truth,
    warn_of_full_images,
)
from fpn_plugin.evaluation.size_bins import SizeBinEvaluator, check_size_bins
from fpn_plugin.registry import Registry

EvaluatorBuilder = Callable[[CfgNode, str, str], "list[DatasetEvaluator]"]
EVALUATORS: Registry[EvaluatorBuilder] = Registry("evaluator_type")
# What Detectron2's evaluators import, some only while they evaluate, and what to give pip.
# panopticapi is on no package index.
_CITYSCAPES = ("cityscapesscripts", "'fpn_plugin[cityscapes]'")
_PACKAGES = {
    "lvis": ("lvis", "'fpn_plugin[lvis]'"),
    "cityscapes_instance": _CITYSCAPES,
    "cityscapes_sem_seg": _CITYSCAPES,
    "coco_panoptic_seg": ("panopticapi", "git+https://github.com/cocodataset/panopticapi.git"),
}

# What the evaluators read of a dataset's metadata, beside what loading the dataset sets
_METADATA = {
    "lvis": ("json_file",),
    "sem_seg": ("stuff_classes", "ignore_label"),
    "coco_panoptic_seg": ("stuff_classes", "ignore_label", "panoptic_json", "panoptic_root"),
    "pascal_voc": ("dirname", "split", "year"),
    "cityscapes_instance": ("gt_dir",),
    "cityscapes_sem_seg": ("gt_dir",),
}

logger = logging.getLogger(__name__)


class InstanceEvaluator(SizeBinEvaluator):
    """Detectron2's `COCOEvaluator` with AP by size bins and any `COCOeval`.

    It also takes proposals that were scored in bfloat16, which numpy does not have.

    Args:
        tasks: some of bbox, segm and keypoints; None for those that the predictions have.
        cocoeval: the class that computes the metrics; see :func:`coco_eval_class`.
        options: of Detectron2's evaluator, and `size_bins`. A `max_dets_per_image` above 100 is
            for keypoints too, and is in the results as "maxDets".
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        *,
        cocoeval: type[COCOeval] = COCOeval_opt,
        **options: Any,
    ) -> None:
        if "json_file" in MetadataCatalog.get(dataset_name).as_dict():
            with _without_truth(dataset_name) as stand_in:
                super().__init__(stand_in, **options)
            self._metadata = MetadataCatalog.get(dataset_name)
            self._coco_api = read_truth(PathManager.get_local_path(self._metadata.json_file))
            self._do_evaluation = "annotations" in self._coco_api.dataset
        else:  # Detectron2 writes a file of it
            super().__init__(dataset_name, **options)
        self._requested_tasks = tasks
        prepare_truth(self._coco_api)
        if cocoeval not in (COCOeval, COCOeval_opt):
            cocoeval = _for_ids(cocoeval, self._coco_api, dataset_name)
        self._cocoeval = cocoeval
        self._use_fast_impl = cocoeval is not COCOeval  # for Detectron2's log

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Add the outputs for a batch of images."""
        super().process(inputs, outputs)
        for prediction in self._predictions[-len(inputs) :]:
            if "proposals" in prediction:
                proposals = prediction["proposals"]
                proposals.objectness_logits = proposals.objectness_logits.float()

    def _eval_predictions(self, predictions: Any, img_ids: Any = None) -> None:
        super()._eval_predictions(predictions, img_ids)  # does all but compute metrics
        if not self._do_evaluation:
            return
        # It has also replaced the category ids by the dataset's.
        results = [result for prediction in predictions for result in prediction["instances"]]
        for task in sorted(self._requested_tasks or super()._tasks_from_predictions(results)):
            max_dets = self._max_dets(task)
            evaluated = None
            if results:
                truth = mask_truth(self._coco_api) if task == "segm" else self._coco_api
                evaluated = evaluate_detections(
                    *(truth, results, task, self._cocoeval),
                    max_dets=max_dets,
                    sigmas=self._kpt_oks_sigmas,
                    image_ids=img_ids,
                )
            warn_of_full_images(self._coco_api, max_dets[-1], task)
            names = [self._coco_api.cats[key]["name"] for key in sorted(self._coco_api.cats)]
            self._results[task] = self._derive_coco_results(evaluated, task, names)
            if max_dets[-1] > COCO_LIMIT:
                self._results[task]["maxDets"] = float(max_dets[-1])
                logger.info(
                    "%s AP counts %d detections of a category in an image"
                    " (TEST.DETECTIONS_PER_IMAGE), not COCO's %d",
                    *(task, max_dets[-1], detection_limit(0, task)),
                )

    def _max_dets(self, task: str) -> list[int]:
        """pycocotools' `maxDets`: the numbers of detections in an image that are counted."""
        if task == "keypoints":
            return [detection_limit(self._max_dets_per_image[-1], task)]
        return sorted(self._max_dets_per_image)

    def _tasks_from_predictions(self, predictions: Any) -> list[str]:
        """None, to skip Detectron2's loop over the tasks, which has its `COCOeval` built in."""
        return []


@contextlib.contextmanager
def _without_truth(dataset_name: str) -> Iterator[str]:
    """The name of a dataset without annotations for the constructor of Detectron2's evaluator,
    which reads the file of a dataset by pycocotools and so takes less than our loader does."""
    name = f"{dataset_name} (without annotations)"
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "empty.json")
        with open(file, "w", encoding="utf-8") as stream:
            stream.write('{"annotations": []}')
        MetadataCatalog.get(name).json_file = file
        try:
            yield name
        finally:
            MetadataCatalog.remove(name)


def _for_ids(cocoeval: type[COCOeval], truth: COCO, dataset_name: str) -> type[COCOeval]:
    """faster-coco-eval's class, or Detectron2's if it cannot have the ids, which it holds as
    floats."""
    ids = [*truth.getImgIds(), *truth.getCatIds()]
    others = [key for key in ids if type(key) is not int or not 0 <= key < 2**53]
    if not others:
        return cocoeval
    logger.warning(
        "TEST.FAST_COCO_EVAL is not used for %s, as faster-coco-eval needs ids of images and"
        " categories that are whole numbers from 0 to 2**53, and one is %r: Detectron2's class"
        " computes the same numbers",
        *(dataset_name, others[0]),
    )
    return COCOeval_opt


def coco_eval_class(cfg: CfgNode) -> type[COCOeval]:
    """The class that computes COCO's metrics; all give the same numbers.

    It is Detectron2's compiled one, or pycocotools' `COCOeval` where that is not compiled. With
    `TEST.FAST_COCO_EVAL` it is faster-coco-eval's, whose `evaluate()` computes everything: `params`
    are set before it, and there is no `evalImgs`.

    Raises:
        ImportError: if faster-coco-eval is not installed; the message names the key.
    """
    if not cfg.TEST.FAST_COCO_EVAL:
        return COCOeval_opt
    _require("faster_coco_eval", "'fpn_plugin[fast_eval]'", "TEST.FAST_COCO_EVAL: True")
    return _fast_coco_eval()


@functools.cache
def _fast_coco_eval() -> type[COCOeval]:
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    class FastCOCOeval(COCOeval_faster):
        """faster-coco-eval's class on pycocotools' annotations, in place of its own `COCO`."""

        def __init__(self, truth: COCO, detections: COCO, iou_type: str) -> None:
            # Given the annotations here, it would take the categories of keypoints from what only
            # its own COCO class has, and leave out categories without annotations.
            super().__init__(iouType=iou_type, print_function=print)
            self.cocoGt, self.cocoDt = truth, detections
            self.params.imgIds = sorted(truth.getImgIds())
            self.params.catIds = sorted(truth.getCatIds())

    return FastCOCOeval


@EVALUATORS.register("coco")
def _coco(cfg: CfgNode, name: str, folder: str) -> list[DatasetEvaluator]:
    return [
        InstanceEvaluator(
            name,
            output_dir=folder,
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
            cocoeval=coco_eval_class(cfg),
            max_dets_per_image=detection_limit(cfg.TEST.DETECTIONS_PER_IMAGE),
            size_bins=cfg.TEST.SIZE_BINS,
        )
    ]


@EVALUATORS.register("sem_seg")
def _sem_seg(cfg: CfgNode, name: str, folder: str) -> list[DatasetEvaluator]:
    return [
        SemSegEvaluator(name, distributed=True, output_dir=folder, sem_seg_loading_fn=_read_labels)
    ]


def _read_labels(path: str, dtype: Any = None) -> np.ndarray:
    """Read an image of class labels `(H, W)` into an array that the evaluator may write to.

    Replaces Detectron2's function, whose `np.array(..., copy=False)` is an error in numpy 2.
    """
    with PathManager.open(path, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)


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
        output_folder: where it writes its files. By default `OUTPUT_DIR/inference`, or a folder per
            dataset in it if `DATASETS.TEST` names several.

    Raises:
        KeyError: if the dataset's `evaluator_type` is missing or unknown.
        ImportError: if the evaluator needs a package that is not installed.
    """
    if not output_folder:
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            output_folder = os.path.join(output_folder, dataset_name)
    evaluators = _find_builder(dataset_name)(cfg, dataset_name, output_folder)
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def check_evaluators(cfg: CfgNode) -> None:
    """Check that every dataset of `DATASETS.TEST` can be evaluated, before hours of training.

    Raises:
        KeyError: if a dataset's `evaluator_type` is missing or unknown, or its metadata lack what
            that evaluator reads.
        ImportError: if a package is missing for an evaluator or for `TEST.FAST_COCO_EVAL`.
        ValueError: for a bad `TEST.SIZE_BINS`, or `TEST.AUG` of a model that has none, or
            `TEST.KEYPOINT_OKS_SIGMAS` that do not fit the model.
    """
    check_size_bins(cfg)
    check_test_augmentation(cfg)
    for name in cfg.DATASETS.TEST:
        _find_builder(name)
        _require_metadata(name)
    if cfg.MODEL.KEYPOINT_ON and cfg.DATASETS.TEST:
        check_oks_sigmas(cfg)
    coco_eval_class(cfg)


def _find_builder(dataset_name: str) -> EvaluatorBuilder:
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    build = EVALUATORS.get(
        evaluator_type, f"MetadataCatalog.get({dataset_name!r}).evaluator_type (DATASETS.TEST)"
    )
    if evaluator_type in _PACKAGES:
        user = f"DATASETS.TEST {dataset_name!r}: its evaluator_type {evaluator_type!r}"
        _require(*_PACKAGES[evaluator_type], user)
    return build


def _require_metadata(dataset_name: str) -> None:
    metadata = MetadataCatalog.get(dataset_name)
    for key in _METADATA.get(metadata.evaluator_type, ()):
        if metadata.get(key) is None:
            raise KeyError(
                f"DATASETS.TEST {dataset_name!r}: its evaluator_type {metadata.evaluator_type!r}"
                f" needs {key!r}: MetadataCatalog.get({dataset_name!r}).set({key}=…)"
            )


def _require(module: str, source: str, user: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{user} needs {module}: pip install {source}") from error
