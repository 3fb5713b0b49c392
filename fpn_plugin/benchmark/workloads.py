"""What is timed of a model: its neck, its backbone, inference, a training iteration."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Mapping

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fpn_plugin.benchmark.equality import GRADIENT
from fpn_plugin.benchmark.inputs import Inputs
from fpn_plugin.benchmark.models import (
    BenchmarkModel,
    FixedMaps,
    PreparedModel,
    image_tensor,
    maps_below,
    prepare,
)
from fpn_plugin.benchmark.timing import FirstCall, Lap, Work, no_lap
from fpn_plugin.engine.step import build_optimizer
from fpn_plugin.registry import Registry


@dataclass
class Workload:
    """Something that can be timed and compared.

    Attributes:
        work: what is timed.
        outputs: runs it once for what is compared: tensors by name.
        precision: the name of the type that it computes in.
        part: whose weights must agree for its outputs to be equal: "neck", "backbone", "model".
        depth: how far rounding adds up, as a factor on the tolerance of one pyramid.
        images: it handles at a time.
        facts: more to report.
        detections: of inference, for :func:`matched_share`.
        reset: frees what one run leaves for the next, before memory is measured.
    """

    work: FirstCall
    outputs: Callable[[], dict[str, Tensor]]
    precision: str
    part: str
    depth: float = 1.0
    images: int = 1
    facts: dict[str, Any] = field(default_factory=dict)
    detections: Mapping[str, Tensor] | None = None
    reset: Callable[[], Any] | None = None


DEEP = 10.0
"""A whole backbone's `depth`, and a detector's."""
THRESHOLD = "score threshold"
_FPN_STEPS = 12
_SCALES = 20  # how often a gradient scaler may halve its scale before it is given up
# the range of thresholds that is searched, and in how many halvings: to within 3%
_LOWEST, _STEPS = 1e-3, 8

WORKLOADS: Registry[Callable[[BenchmarkModel, Inputs], Workload]] = Registry("--what")


@WORKLOADS.register("neck")
def neck_workload(model: BenchmarkModel, inputs: Inputs) -> Workload:
    """The pyramid's forward on maps of the config's own network: of their type and layout, with
    numbers that are the same for all models."""
    ready = prepare(model.model, model.config.cfg, training=False)
    return forward_workload(ready.neck(), neck_inputs(ready, inputs), ready, inputs)


def neck_inputs(ready: PreparedModel, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs of a model's neck."""
    image = image_tensor(ready.model, inputs.images(len(ready.model.pixel_mean)))
    with ready.autocast(), torch.no_grad():
        return inputs.maps(maps_below(ready.model.backbone, image))


def forward_workload(
    neck: nn.Module, maps: Mapping[str, Tensor], ready: PreparedModel, inputs: Inputs
) -> Workload:
    """A module that takes maps and gives maps, for inference."""

    @FirstCall
    @torch.no_grad()
    def work(lap: Lap) -> Any:
        with ready.autocast():
            return neck(dict(maps))

    return Workload(
        work,
        lambda: dict(work(no_lap)),
        ready.precision(),
        "neck",
        depth=_depth(neck),
        images=inputs.batch,
    )


@WORKLOADS.register("neck_train")
def neck_train_workload(model: BenchmarkModel, inputs: Inputs) -> Workload:
    """The pyramid's forward and backward, in training mode."""
    ready = prepare(model.model, model.config.cfg, training=True)
    return backward_workload(ready.neck(), neck_inputs(ready, inputs), ready, inputs)


def backward_workload(
    neck: nn.Module, maps: Mapping[str, Tensor], ready: PreparedModel, inputs: Inputs
) -> Workload:
    """A module that takes maps and gives maps, forward and backward to maps and weights."""
    leaves = {name: x.detach().requires_grad_() for name, x in maps.items()}
    output_grads: list[Tensor] = []

    def reset() -> None:
        for leaf in (*leaves.values(), *neck.parameters()):
            leaf.grad = None

    @FirstCall
    def work(lap: Lap) -> dict[str, Tensor]:
        reset()
        with ready.autocast():
            outputs = dict(neck(dict(leaves)))
        lap("forward")
        if not output_grads:  # random: a constant gradient vanishes in a batch norm
            like = {GRADIENT + name: x.detach() for name, x in outputs.items()}
            output_grads.extend(inputs.maps(like).values())
        torch.autograd.backward(list(outputs.values()), output_grads)
        lap("backward")
        return outputs

    def outputs() -> dict[str, Tensor]:
        maps_out = {name: x.detach() for name, x in work(no_lap).items()}
        grads = {GRADIENT + name: x.grad for name, x in leaves.items() if x.grad is not None}
        return {**maps_out, **grads}

    return Workload(
        work,
        outputs,
        ready.precision(),
        "neck",
        depth=_depth(neck),
        images=inputs.batch,
        reset=reset,
    )


def _depth(neck: nn.Module) -> float:
    """How many maps deep a pyramid is, in pyramids: one map of FPN passes two blocks a level."""
    return max(1.0, len(getattr(neck, "steps", ())) / _FPN_STEPS)


@WORKLOADS.register("backbone")
def backbone_workload(model: BenchmarkModel, inputs: Inputs) -> Workload:
    """The network and the pyramid on an image, for inference."""
    ready = prepare(model.model, model.config.cfg, training=False)
    image = image_tensor(ready.model, inputs.images(len(ready.model.pixel_mean)))
    backbone = ready.model.backbone

    @FirstCall
    @torch.no_grad()
    def work(lap: Lap) -> Any:
        with ready.autocast():
            return backbone(image)

    return Workload(
        work,
        lambda: dict(work(no_lap)),
        ready.precision(),
        "backbone",
        depth=DEEP,
        images=inputs.batch,
    )


@WORKLOADS.register("inference")
def inference_workload(model: BenchmarkModel, inputs: Inputs) -> Workload:
    """The whole model on images, from bytes to detections in the image's own size."""
    ready = prepare(model.model, model.config.cfg, training=False)
    if model.score_threshold is not None:
        for holder in score_holders(ready.model):
            holder.test_score_thresh = model.score_threshold
    images = inputs.images(len(ready.model.pixel_mean))

    @FirstCall
    @torch.no_grad()
    def work(lap: Lap) -> Any:
        with ready.autocast():
            return ready.model(images)

    @torch.no_grad()
    def features() -> dict[str, Tensor]:
        with ready.autocast():
            return dict(ready.model.backbone(image_tensor(ready.model, images)))

    proposals, results = _count_proposals(ready, work)
    holder = next(score_holders(ready.model), None)
    facts = {
        THRESHOLD: getattr(holder, "test_score_thresh", None),
        "proposals": proposals,
        "detections": _count_detections(results) / len(results),
    }
    return Workload(
        work,
        features,
        ready.precision(),
        "model",
        depth=DEEP,
        images=inputs.batch,
        facts=facts,
        detections=_detections(results),
    )


def calibrate(model: BenchmarkModel, inputs: Inputs) -> float | None:
    """A score threshold at which random weights find about as much as trained ones may.

    A random classifier is sure of nothing: at the config's threshold it finds nothing, and what
    comes after it (non-maximum suppression, masks, pasting) would seem to cost nothing. The
    threshold is the highest, to within 3%, at which `TEST.DETECTIONS_PER_IMAGE`
    boxes survive; the proposals need no help.

    Returns:
        the threshold; None for a model without one.
    """
    detector = copy.deepcopy(model.model).to(inputs.device)
    holders = list(score_holders(detector))
    if not holders:
        return None
    images = inputs.images(len(detector.pixel_mean))
    wanted = model.config.cfg.TEST.DETECTIONS_PER_IMAGE * len(images)
    if not hasattr(detector, "sem_seg_head"):  # a panoptic result is made of the masks
        for name in ("mask_on", "keypoint_on"):  # what comes after the boxes is left out
            if hasattr(getattr(detector, "roi_heads", None), name):
                setattr(detector.roi_heads, name, False)
    low, high = math.log(_LOWEST), 0.0
    with torch.no_grad():
        maps = detector.backbone(image_tensor(detector, images))
        detector.backbone = FixedMaps(maps, detector.backbone)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            for holder in holders:
                holder.test_score_thresh = math.exp(middle)
            too_few = _count_detections(detector(images)) < wanted
            low, high = (low, middle) if too_few else (middle, high)
    return math.exp(low)


def score_holders(model: nn.Module) -> Iterator[Any]:
    """The modules that drop detections below their `test_score_thresh`."""
    return (module for module in model.modules() if hasattr(module, "test_score_thresh"))


def _count_proposals(ready: PreparedModel, work: Work) -> tuple[float | None, list[dict[str, Any]]]:
    """The mean number of proposals for an image in one run, and the run's results."""
    counts: list[int] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        counts.extend(len(proposals) for proposals in output[0])

    generator = getattr(ready.model, "proposal_generator", None)
    if not isinstance(generator, nn.Module):
        return None, work(no_lap)
    handle = generator.register_forward_hook(note)
    results = work(no_lap)
    handle.remove()
    return sum(counts) / max(len(counts), 1), results


def _count_detections(results: list[dict[str, Any]]) -> int:
    return sum(len(result["instances"]) for result in results if "instances" in result)


def _detections(results: list[dict[str, Any]]) -> dict[str, Tensor] | None:
    """The detections of the first image."""
    instances = results[0].get("instances")
    if instances is None:
        return None
    return {
        "boxes": instances.pred_boxes.tensor.float().cpu(),
        "scores": instances.scores.float().cpu(),
        "classes": instances.pred_classes.cpu(),
    }


@WORKLOADS.register("train")
def train_workload(model: BenchmarkModel, inputs: Inputs) -> Workload:
    """A training iteration as Detectron2's trainers do it: forward, backward, step.

    The learning rate is 0, so that each iteration does the same work on the same weights, and what
    the heads draw at random is drawn from one seed.
    """
    cfg = model.config.cfg
    ready = prepare(model.model, cfg, training=True)
    optimizer = build_optimizer(cfg, ready.model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    scaling = ready.device == "cuda" and ready.dtype == torch.float16
    scaler = torch.amp.GradScaler(ready.device, enabled=scaling)
    batch = inputs.annotated(cfg)
    storage = EventStorage()

    @FirstCall
    def work(lap: Lap) -> dict[str, Tensor]:
        torch.manual_seed(inputs.seed)
        with storage:
            with ready.autocast():
                losses = ready.model(batch)
                total = sum(losses.values())
            lap("forward")
            optimizer.zero_grad()
            scaler.scale(total).backward()
            lap("backward")
            scaler.step(optimizer)
            scaler.update()
            lap("step")
        return losses

    def outputs() -> dict[str, Tensor]:
        for _ in range(_SCALES):
            losses = work(no_lap)
            grads = [p.grad.norm() for p in ready.model.parameters() if p.grad is not None]
            norm = torch.stack(grads).norm()
            if norm.isfinite():
                break  # else the scaler started too high and halves its scale for the next run
        # not each loss: in half precision the proposals are ordered and sampled differently
        total = torch.stack([value.detach() for value in losses.values()]).sum()
        return {"total loss": total, GRADIENT + "all weights": norm}

    return Workload(
        work,
        outputs,
        ready.precision(),
        "model",
        depth=DEEP,
        images=inputs.batch,
        facts={"optimizer": type(optimizer).__name__},
        reset=optimizer.zero_grad,
    )
