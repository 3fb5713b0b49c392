"""COCO's metrics by faster-coco-eval, which matches detections in compiled code."""

from __future__ import annotations

from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from pycocotools.coco import COCO


class FastCOCOeval(COCOeval_faster):
    """In place of pycocotools' `COCOeval`, on pycocotools' annotations: the same numbers.

    Its results are in `eval` and `stats`, of the same shapes. `evaluate()` computes them all, so
    `params` are set before it, and there is no `evalImgs`.

    Args:
        truth: the ground truth.
        found: the detections, as `truth.loadRes` gives them.
        iou_type: bbox, segm or keypoints.
    """

    def __init__(self, truth: COCO, found: COCO, iou_type: str) -> None:
        # Given the annotations, it would take the categories of keypoints from what only its own
        # COCO class has, and leave those without annotations out
        super().__init__(iouType=iou_type, print_function=print)
        self.cocoGt, self.cocoDt = truth, found
        self.params.imgIds = sorted(truth.getImgIds())
        self.params.catIds = sorted(truth.getCatIds())
