"""AP by finer size bins than COCO's three, which show at what scale two pyramids differ.

Edges are side lengths in pixels: an object belongs to the bin that holds the square root of its
area. As with COCO's own bins, an object exactly on an edge belongs to both bins beside it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from typing import Any, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from tabulate import tabulate

KEY = "TEST.SIZE_BINS"
_LARGEST = 1e5  # side in pixels at which COCO's last bin ends
_COCO_EVALUATORS = ("coco", "coco_panoptic_seg")

logger = logging.getLogger(__name__)


def check_edges(edges: Any, key: str = KEY) -> list[float]:
    """Check the edges between bins and return them; an empty list means no bins.

    Args:
        key: the config key or the option that the error names.

    Raises:
        ValueError: if they are not increasing positive numbers.
    """
    numbers = isinstance(edges, (list, tuple)) and all(
        isinstance(edge, (int, float)) and not isinstance(edge, bool) and 0 < edge < _LARGEST
        for edge in edges
    )
    if not numbers or any(low >= high for low, high in zip(edges, edges[1:])):
        raise ValueError(
            f"{key}: {edges!r} is not a list of increasing positive numbers, the sides in pixels"
            " between the bins, such as [8, 16, 32, 64, 128, 256]"
        )
    return list(edges)


def check_size_bins(cfg: CfgNode) -> None:
    """Check `TEST.SIZE_BINS`, and warn of test sets that it has no effect on.

    Raises:
        ValueError: naming the key and its value.
    """
    if not check_edges(cfg.TEST.SIZE_BINS):
        return
    for name in cfg.DATASETS.TEST:
        evaluator_type = MetadataCatalog.get(name).get("evaluator_type", None)
        if evaluator_type not in _COCO_EVALUATORS:
            logger.warning(
                "%s does nothing for %s, whose evaluator_type is %r", KEY, name, evaluator_type
            )


def bin_names(edges: Sequence[float]) -> list[str]:
    """The bins' names: "0-8", "8-16", …, "256-inf"; none without edges."""
    ends = [f"{edge:g}" for edge in (0, *edges)]
    return [f"{low}-{high}" for low, high in zip(ends, [*ends[1:], "inf"])] if edges else []


def area_ranges(edges: Sequence[float]) -> list[list[float]]:
    """pycocotools' `areaRng` of each bin, in square pixels."""
    ends = [float(edge) ** 2 for edge in (0, *edges, _LARGEST)]
    return [[low, high] for low, high in zip(ends, ends[1:])] if edges else []


def mean_precision(precision: np.ndarray) -> float:
    """AP in percent over a part of pycocotools' `precision`; nan if that has no object."""
    valid = precision[precision > -1]
    return float(np.mean(valid) * 100) if valid.size else math.nan


def count_objects(coco: Any, image_ids: Sequence[Any], edges: Sequence[float]) -> list[int]:
    """The number of objects in each bin, without crowds."""
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=image_ids, iscrowd=False))
    areas = np.array([annotation["area"] for annotation in annotations])
    return [int(((areas >= low) & (areas <= high)).sum()) for low, high in area_ranges(edges)]


def ap_by_bin(evaluation: Any, edges: Sequence[float]) -> list[float]:
    """AP of each bin in percent, nan for a bin without objects.

    Args:
        evaluation: a `COCOeval`; its truth, detections and images are evaluated once more.
    """
    by_bin = type(evaluation)(evaluation.cocoGt, evaluation.cocoDt, evaluation.params.iouType)
    by_bin.params.imgIds = evaluation.params.imgIds
    by_bin.params.maxDets = [evaluation.params.maxDets[-1]]
    by_bin.params.areaRng = area_ranges(edges)
    by_bin.params.areaRngLbl = bin_names(edges)
    with contextlib.redirect_stdout(io.StringIO()):
        by_bin.evaluate()
        by_bin.accumulate()
    precision = by_bin.eval["precision"]  # (IoU, recall, category, bin, detections)
    return [mean_precision(precision[:, :, :, i, 0]) for i in range(len(edges) + 1)]


class SizeBinEvaluator(COCOEvaluator):
    """Detectron2's evaluator with AP and the number of objects by size bin, for boxes and masks.

    The results of "bbox" and "segm" get "AP@8-16" and "objects@8-16" for each bin.

    Args:
        size_bins: the sides in pixels between the bins; no bins by default.
    """

    def __init__(self, *args: Any, size_bins: Sequence[float] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._edges = check_edges(size_bins)

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if not self._edges or iou_type not in ("bbox", "segm"):
            return results
        names = bin_names(self._edges)
        if coco_eval is None:  # no detection at all
            images, values = self._coco_api.getImgIds(), [math.nan] * len(names)
        else:
            images, values = coco_eval.params.imgIds, ap_by_bin(coco_eval, self._edges)
        counts = count_objects(self._coco_api, images, self._edges)
        rows = [
            [name, "–" if math.isnan(value) else f"{value:.3f}", str(count)]
            for name, value, count in zip(names, values, counts)
        ]
        table = tabulate(rows, ["side in pixels", "AP", "objects"], "pipe", disable_numparse=True)
        logger.info("%s AP by size:\n%s", iou_type, table)
        results.update({f"AP@{name}": value for name, value in zip(names, values)})
        results.update({f"objects@{name}": float(count) for name, count in zip(names, counts)})
        return results
