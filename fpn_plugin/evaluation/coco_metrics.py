"""COCO's metrics by any `COCOeval`, for any number of detections and any annotations of a user."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Sequence

import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_plugin.data.masks import usable_mask

COCO_LIMIT = 100  # detections of a category in an image that count in COCO's AP of boxes and masks
KEYPOINT_LIMIT = 20  # the same for keypoints
SIGMAS_KEY = "TEST.KEYPOINT_OKS_SIGMAS"
_COCO_KEYPOINTS = 17
_OKS_SIGMA = 0.05  # of keypoints that are not COCO's 17; the mean of those is 0.06
_NO_LIMIT = 100_000
_LARGEST_ID = 2**31  # far below where faster-coco-eval loses annotations

logger = logging.getLogger(__name__)


def prepare_truth(truth: COCO) -> COCO:
    """Fill in what pycocotools reads of every annotation and a file may lack, in place.

    Without an "iscrowd" an object is none, and its "area" is that of its mask, else of its box.
    Annotations get the ids 1, 2, … unless all ids are whole numbers above 0. An id means nothing
    but "this object": pycocotools takes 0 for "not matched" and joins objects that share an id, and
    faster-coco-eval loses ids that are negative or do not fit in 64 bits.

    Returns:
        the truth that was given.
    """
    truth.dataset.setdefault("info", {})  # pycocotools 2.0.9 and 2.0.10 copy it
    annotations = truth.dataset.get("annotations", [])
    for annotation in annotations:
        if annotation.get("iscrowd") is None:
            annotation["iscrowd"] = 0
        if annotation.get("area") is None:
            annotation["area"] = _area(annotation, truth)
    ids = {annotation["id"] for annotation in annotations}
    sound = len(ids) == len(annotations) and set(map(type, ids)) <= {int}
    if sound and (not ids or 0 < min(ids) <= max(ids) < _LARGEST_ID):
        return truth
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    truth.createIndex()
    return truth


def _area(annotation: dict[str, Any], truth: COCO) -> float:
    """The area of an object's mask, else of its box, in square pixels."""
    image = truth.imgs.get(annotation["image_id"])
    mask = usable_mask(annotation.get("segmentation"), image) if image else None
    if mask is None:
        _, _, width, height = annotation["bbox"]
        return float(width * height)
    return float(mask_util.area(truth.annToRLE({**annotation, "segmentation": mask})))


def detection_limit(detections_per_image: int, task: str = "bbox") -> int:
    """The detections of a category in an image that AP counts: COCO's number, or
    `TEST.DETECTIONS_PER_IMAGE` where that is larger than COCO's 100, or negative for all."""
    if detections_per_image < 0:
        return _NO_LIMIT
    if detections_per_image > COCO_LIMIT:
        return detections_per_image
    return KEYPOINT_LIMIT if task == "keypoints" else COCO_LIMIT


def warn_of_full_images(truth: COCO, limit: int, task: str) -> None:
    """Warn if an image has more objects of a category than detections count."""
    counts = Counter(
        (annotation["image_id"], annotation["category_id"])
        for annotation in truth.dataset.get("annotations", [])
        if not annotation.get("iscrowd", 0)
        and (task != "keypoints" or annotation.get("num_keypoints", 0))
    )
    full = [(count, *key) for key, count in counts.items() if count > limit]
    if not full:
        return
    count, image, category = max(full, key=lambda entry: entry[0])
    logger.warning(
        "%s AP counts the best %d detections of a category in an image, but %d images have more"
        " objects of one (image id %r has %d of category id %r): AP counts as many as"
        " TEST.DETECTIONS_PER_IMAGE says where that is above %d",
        *(task, limit, len({entry[1] for entry in full}), image, count, category, COCO_LIMIT),
    )


def oks_sigmas(sigmas: Sequence[float], keypoints: int) -> list[float]:
    """`TEST.KEYPOINT_OKS_SIGMAS` for a number of keypoints: how far each may be off in OKS.

    Empty means COCO's for 17 keypoints, which are a person's, and 0.05 for each otherwise.

    Returns:
        the sigmas; [] for COCO's.

    Raises:
        ValueError: for another number of sigmas than of keypoints, or sigmas that are not positive.
    """
    example = "[" + ", ".join([f"{_OKS_SIGMA}"] * keypoints) + "]"
    if not sigmas:
        return [] if keypoints == _COCO_KEYPOINTS else [_OKS_SIGMA] * keypoints
    if len(sigmas) != keypoints:
        raise ValueError(
            f"{SIGMAS_KEY} has {len(sigmas)} values, but there are {keypoints} keypoints"
            f" (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS): give one for each, such as {example}, or []"
            " for a default"
        )
    if not all(isinstance(sigma, (int, float)) and 0 < sigma < np.inf for sigma in sigmas):
        raise ValueError(
            f"{SIGMAS_KEY}: {list(sigmas)} are not positive numbers, such as {example}"
        )
    return list(sigmas)


def check_oks_sigmas(cfg: CfgNode) -> None:
    """Check `TEST.KEYPOINT_OKS_SIGMAS`, and say which sigmas stand for none.

    Raises:
        ValueError: as :func:`oks_sigmas` does.
    """
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    sigmas = oks_sigmas(cfg.TEST.KEYPOINT_OKS_SIGMAS, count)
    if not cfg.TEST.KEYPOINT_OKS_SIGMAS:
        what = f"{sigmas[0]} for each of {count} keypoints" if sigmas else "those of COCO's persons"
        logger.info("%s is empty: AP of keypoints takes %s", SIGMAS_KEY, what)


def evaluate_detections(
    truth: COCO,
    results: Sequence[dict[str, Any]],
    task: str,
    cocoeval: type[COCOeval],
    *,
    max_dets: Sequence[int],
    sigmas: Sequence[float] = (),
    image_ids: Any = None,
) -> COCOeval:
    """Detectron2's `_evaluate_predictions_on_coco` by the given class for any limit of detections.

    Args:
        truth: of :func:`prepare_truth`.
        results: at least one, in COCO's format; keys are added to them.
        task: bbox, segm or keypoints.
        max_dets: pycocotools' `maxDets`, increasing; AP is that of the last.
        sigmas: `TEST.KEYPOINT_OKS_SIGMAS`.
        image_ids: of the images to evaluate; None for all.

    Returns:
        the evaluation with its `stats` in COCO's order.

    Raises:
        ValueError: if the numbers of keypoints differ.
    """
    if task == "segm":
        # else the areas of detections would be those of their boxes
        results = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
    if task == "keypoints":
        count = len(results[0]["keypoints"]) // 3
        complete_keypoints(truth, count)
        sigmas = oks_sigmas(sigmas, count)
    evaluation = cocoeval(truth, truth.loadRes(list(results)), task)
    evaluation.params.maxDets = list(max_dets)
    if image_ids is not None:
        evaluation.params.imgIds = image_ids
    if task == "keypoints" and sigmas:
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
    evaluation.evaluate()
    evaluation.accumulate()
    if evaluation.params.maxDets[-1] == detection_limit(0, task):
        evaluation.summarize()
    else:  # pycocotools' has its limits built in
        _summarise(evaluation)
    return evaluation


def complete_keypoints(truth: COCO, count: int) -> None:
    """Give every annotation what pycocotools reads of keypoints, in place.

    An object without `keypoints` gets points that are not labelled, as COCO's file has them, so
    that it is neither an object to find nor a false detection. `num_keypoints` is counted where it
    is missing.

    Raises:
        ValueError: if an annotation has another number of keypoints.
    """
    for annotation in truth.dataset.get("annotations", []):
        points = annotation.get("keypoints")
        if not points:
            annotation["keypoints"], annotation["num_keypoints"] = [0] * (3 * count), 0
        elif len(points) != 3 * count:
            raise ValueError(
                f"annotation {annotation['id']} has {len(points) / 3:g} keypoints, but the model"
                f" predicts {count} (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)"
            )
        elif annotation.get("num_keypoints") is None:
            annotation["num_keypoints"] = sum(visible > 0 for visible in points[2::3])


def _summarise(evaluation: Any) -> None:
    """pycocotools' `summarize` for any number of detections: prints and sets `stats`."""
    params = evaluation.params
    most = params.maxDets[-1]
    keypoints = params.iouType == "keypoints"
    sizes = [(None, area, most) for area in params.areaRngLbl[1:]]
    thresholds = [(None, "all", most), (0.5, "all", most), (0.75, "all", most)]
    limits = [(None, "all", limit) for limit in params.maxDets]
    rows = [("precision", *row) for row in thresholds + sizes]
    rows += [("recall", *row) for row in (thresholds if keypoints else limits) + sizes]
    evaluation.stats = np.array([_mean(evaluation, *row) for row in rows])


def _mean(evaluation: Any, name: str, threshold: float | None, area: str, limit: int) -> float:
    """The mean over recalls and categories, -1 without objects; printed in pycocotools' format."""
    params = evaluation.params
    # (IoU, [recall,] category, area, detections)
    values = np.asarray(evaluation.eval[name])
    values = values[..., params.areaRngLbl.index(area), params.maxDets.index(limit)]
    if threshold is not None:
        values = values[np.isclose(params.iouThrs, threshold)]
    values = values[values > -1]
    mean = float(values.mean()) if values.size else -1.0
    low, high = params.iouThrs[[0, -1]]
    iou = f"{low:0.2f}:{high:0.2f}" if threshold is None else f"{threshold:0.2f}"
    title, short = f"Average {name.capitalize()}", "(AP)" if name == "precision" else "(AR)"
    print(
        f" {title:<18} {short} @[ IoU={iou:<9} | area={area:>6s} | maxDets={limit:>3d} ]"
        f" = {mean:0.3f}"
    )
    return mean
