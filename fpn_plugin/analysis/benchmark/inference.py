"""Full inference, with as many proposals and detections as a trained detector would have."""

from __future__ import annotations

import math
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from fpn_plugin.analysis.benchmark.clock import FirstCall, Lap, Work, no_lap
from fpn_plugin.analysis.benchmark.entrants import Entrant
from fpn_plugin.analysis.benchmark.inputs import Inputs
from fpn_plugin.analysis.benchmark.neck import Fixed, image_tensor
from fpn_plugin.analysis.benchmark.prepare import Ready, prepare
from fpn_plugin.analysis.benchmark.subjects import DEEP, SUBJECTS, Subject

THRESHOLD = "score threshold"
# the range of thresholds that is searched, and in how many halvings: to within 3%
_LOWEST, _STEPS = 1e-3, 8


@SUBJECTS.register("inference")
def inference_subject(entrant: Entrant, inputs: Inputs) -> Subject:
    """The whole model on images, from bytes to detections in the image's own size."""
    ready = prepare(entrant.model, entrant.contestant.cfg, training=False)
    threshold = entrant.facts.get(THRESHOLD)
    if threshold is not None:
        for holder in score_holders(ready.model):
            holder.test_score_thresh = threshold
    images = inputs.images()

    @FirstCall
    @torch.no_grad()
    def work(lap: Lap) -> Any:
        with ready.autocast():
            return ready.model(images)

    @torch.no_grad()
    def features() -> dict[str, Tensor]:
        with ready.autocast():
            return dict(ready.model.backbone(image_tensor(ready.model, images)))

    proposals, outputs = _proposals(ready, work)
    holder = next(score_holders(ready.model), None)
    facts = {
        THRESHOLD: getattr(holder, "test_score_thresh", None),
        "proposals": proposals,
        "detections": _count(outputs) / len(outputs),
    }
    return Subject(
        work,
        features,
        ready.precision(),
        "model",
        depth=DEEP,
        images=inputs.batch,
        facts=facts,
        detections=_detections(outputs),
    )


def calibrate(entrant: Entrant, inputs: Inputs) -> float | None:
    """A score threshold at which random weights find about as much as trained ones may.

    A random classifier is sure of nothing: at the config's threshold it finds nothing, and what
    comes after it (non-maximum suppression, masks, pasting) would seem to cost nothing. The
    threshold is the highest, to within 3%, at which `TEST.DETECTIONS_PER_IMAGE`
    boxes survive; the proposals need no help.

    Returns:
        the threshold; None for a model without one.
    """
    holders = list(score_holders(entrant.model))
    if not holders:
        return None
    model: Any = entrant.model
    backbone, before = model.backbone, [holder.test_score_thresh for holder in holders]
    cfg = entrant.contestant.cfg
    images, wanted = inputs.images(), cfg.TEST.DETECTIONS_PER_IMAGE
    low, high = math.log(_LOWEST), 0.0
    heads = getattr(model, "roi_heads", None)
    # what comes after the boxes is left out, except where a panoptic result is made of it
    optional = () if hasattr(model, "sem_seg_head") else ("mask_on", "keypoint_on")
    switches = {name: getattr(heads, name) for name in optional if hasattr(heads, name)}
    try:
        with torch.no_grad():
            model.backbone = Fixed(backbone(image_tensor(model, images)), backbone)
            for name in switches:
                setattr(heads, name, False)
            for _ in range(_STEPS):
                middle = (low + high) / 2
                for holder in holders:
                    holder.test_score_thresh = math.exp(middle)
                few = _count(model(images)) < wanted * len(images)
                low, high = (low, middle) if few else (middle, high)
    finally:
        model.backbone = backbone
        for name, value in switches.items():
            setattr(heads, name, value)
        for holder, value in zip(holders, before):
            holder.test_score_thresh = value
    return math.exp(low)


def score_holders(model: nn.Module) -> Iterator[Any]:
    """The modules that drop detections below their `test_score_thresh`."""
    return (module for module in model.modules() if hasattr(module, "test_score_thresh"))


def _count(outputs: list[dict[str, Any]]) -> int:
    return sum(len(found["instances"]) for found in outputs if "instances" in found)


def _proposals(ready: Ready, work: Work) -> tuple[float | None, list[dict[str, Any]]]:
    """The mean number of proposals for an image in one run, and what the run gave."""
    counts: list[int] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        counts.extend(len(one) for one in output[0])

    generator = getattr(ready.model, "proposal_generator", None)
    if not isinstance(generator, nn.Module):
        return None, work(no_lap)
    handle = generator.register_forward_hook(note)
    outputs = work(no_lap)
    handle.remove()
    return sum(counts) / max(len(counts), 1), outputs


def _detections(outputs: list[dict[str, Any]]) -> dict[str, Tensor] | None:
    """Of the first image."""
    found = outputs[0].get("instances")
    if found is None:
        return None
    return {
        "boxes": found.pred_boxes.tensor.float().cpu(),
        "scores": found.scores.float().cpu(),
        "classes": found.pred_classes.cpu(),
    }
