"""AP by finer size bins than COCO's three, with which pyramids that differ by scale can be told
apart.

Edges are sides in pixels: an object belongs to the bin in which the square root of its area lies.
As with COCO's own, one whose area is exactly an edge's belongs to the bins on both sides of it.
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
_LARGEST = 1e5  # pixels of side: COCO's own end of its last bin
_WITH_COCO = ("coco", "coco_panoptic_seg")

logger = logging.getLogger(__name__)


def check_edges(edges: Any, key: str = KEY) -> list[float]:
    """The edges of bins, if they are some; an empty list for no bins.

    Args:
        key: the config key or the option that the error names.

    Raises:
        ValueError: unless they are increasing positive numbers.
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


def check_config(cfg: CfgNode) -> None:
    """Check `TEST.SIZE_BINS`, and warn of test sets that it does nothing for.

    Raises:
        ValueError: naming the key and its value.
    """
    if not check_edges(cfg.TEST.SIZE_BINS):
        return
    for name in cfg.DATASETS.TEST:
        kind = MetadataCatalog.get(name).get("evaluator_type", None)
        if kind not in _WITH_COCO:
            logger.warning("%s does nothing for %s, whose evaluator_type is %r", KEY, name, kind)


def bin_names(edges: Sequence[float]) -> list[str]:
    """ "0-8", "8-16", …, "256-inf"; no names without edges."""
    ends = [f"{edge:g}" for edge in (0, *edges)]
    return [f"{low}-{high}" for low, high in zip(ends, [*ends[1:], "inf"])] if edges else []


def area_ranges(edges: Sequence[float]) -> list[list[float]]:
    """pycocotools' `areaRng` of each bin, in square pixels."""
    ends = [float(edge) ** 2 for edge in (0, *edges, _LARGEST)]
    return [[low, high] for low, high in zip(ends, ends[1:])] if edges else []


def ap_of(precision: np.ndarray) -> float:
    """AP in percent from a part of pycocotools' precisions; nan where there is no object."""
    valid = precision[precision > -1]
    return float(np.mean(valid) * 100) if valid.size else math.nan


def count_objects(coco: Any, image_ids: Sequence[Any], edges: Sequence[float]) -> list[int]:
    """The objects of each bin, crowds left out."""
    found = coco.loadAnns(coco.getAnnIds(imgIds=image_ids, iscrowd=False))
    areas = np.array([annotation["area"] for annotation in found])
    return [int(((areas >= low) & (areas <= high)).sum()) for low, high in area_ranges(edges)]


def ap_by_bin(evaluation: Any, edges: Sequence[float]) -> list[float]:
    """AP of each bin in percent, nan for one without objects.

    Args:
        evaluation: a COCOeval, whose truth, detections and images are evaluated again.
    """
    again = type(evaluation)(evaluation.cocoGt, evaluation.cocoDt, evaluation.params.iouType)
    again.params.imgIds = evaluation.params.imgIds
    again.params.maxDets = [evaluation.params.maxDets[-1]]
    again.params.areaRng = area_ranges(edges)
    again.params.areaRngLbl = bin_names(edges)
    with contextlib.redirect_stdout(io.StringIO()):
        again.evaluate()
        again.accumulate()
    # (IoU, recall, category, bin, detections)
    return [ap_of(again.eval["precision"][:, :, :, i, 0]) for i in range(len(edges) + 1)]


class SizeBinEvaluator(COCOEvaluator):
    """Detectron2's, and for boxes and masks AP and the number of objects by size bin.

    `evaluate()` returns for "bbox" and "segm" also "AP@8-16" and "objects@8-16" for each bin.

    Args:
        size_bins: the sides in pixels between the bins; none by default.
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
