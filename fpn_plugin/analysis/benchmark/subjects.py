"""What is timed of an entrant: its neck, its backbone, inference, a training iteration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Mapping

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fpn_plugin.analysis.benchmark.clock import FirstCall, Lap, no_lap
from fpn_plugin.analysis.benchmark.entrants import Entrant
from fpn_plugin.analysis.benchmark.equality import GRADIENT
from fpn_plugin.analysis.benchmark.inputs import Inputs
from fpn_plugin.analysis.benchmark.neck import image_tensor, maps_below
from fpn_plugin.analysis.benchmark.prepare import Ready, prepare
from fpn_plugin.engine.step import build_optimizer
from fpn_plugin.registry import Registry


@dataclass
class Subject:
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
_FPN_STEPS = 12
_SCALES = 20  # how often a gradient scaler may halve its scale before it is given up

SUBJECTS: Registry[Callable[[Entrant, Inputs], Subject]] = Registry("--what")


@SUBJECTS.register("neck")
def neck_subject(entrant: Entrant, inputs: Inputs) -> Subject:
    """The pyramid's forward on maps as the config's own network gives them: their type and layout
    are its, their numbers are the same for all."""
    ready = prepare(entrant.model, entrant.contestant.cfg, training=False)
    return forward_subject(ready.neck(), given_maps(ready, inputs), ready, inputs)


def given_maps(ready: Ready, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs of a model's neck."""
    image = image_tensor(ready.model, inputs.images())
    with ready.autocast(), torch.no_grad():
        return inputs.maps(maps_below(ready.model.backbone, image))


def forward_subject(
    neck: nn.Module, maps: Mapping[str, Tensor], ready: Ready, inputs: Inputs
) -> Subject:
    """A module that takes maps and gives maps, for inference."""

    @FirstCall
    @torch.no_grad()
    def work(lap: Lap) -> Any:
        with ready.autocast():
            return neck(dict(maps))

    return Subject(
        work,
        lambda: dict(work(no_lap)),
        ready.precision(),
        "neck",
        depth=_depth(neck),
        images=inputs.batch,
    )


@SUBJECTS.register("neck_train")
def neck_train_subject(entrant: Entrant, inputs: Inputs) -> Subject:
    """The pyramid's forward and backward, in training mode."""
    ready = prepare(entrant.model, entrant.contestant.cfg, training=True)
    return backward_subject(ready.neck(), given_maps(ready, inputs), ready, inputs)


def backward_subject(
    neck: nn.Module, maps: Mapping[str, Tensor], ready: Ready, inputs: Inputs
) -> Subject:
    """A module that takes maps and gives maps, forward and backward to maps and weights."""
    leaves = {name: x.detach().requires_grad_() for name, x in maps.items()}
    arriving: list[Tensor] = []

    def reset() -> None:
        for leaf in (*leaves.values(), *neck.parameters()):
            leaf.grad = None

    @FirstCall
    def work(lap: Lap) -> dict[str, Tensor]:
        reset()
        with ready.autocast():
            outputs = dict(neck(dict(leaves)))
        lap("forward")
        if not arriving:  # not the same everywhere, which would be nothing after a batch norm
            named = {GRADIENT + name: x.detach() for name, x in outputs.items()}
            arriving.extend(inputs.maps(named).values())
        torch.autograd.backward(list(outputs.values()), arriving)
        lap("backward")
        return outputs

    def outputs() -> dict[str, Tensor]:
        made = {name: x.detach() for name, x in work(no_lap).items()}
        grads = {GRADIENT + name: x.grad for name, x in leaves.items() if x.grad is not None}
        return {**made, **grads}

    return Subject(
        work,
        outputs,
        ready.precision(),
        "neck",
        depth=_depth(neck),
        images=inputs.batch,
        reset=reset,
    )


@SUBJECTS.register("backbone")
def backbone_subject(entrant: Entrant, inputs: Inputs) -> Subject:
    """The network and the pyramid on an image, for inference."""
    ready = prepare(entrant.model, entrant.contestant.cfg, training=False)
    image = image_tensor(ready.model, inputs.images())
    backbone = ready.model.backbone

    @FirstCall
    @torch.no_grad()
    def work(lap: Lap) -> Any:
        with ready.autocast():
            return backbone(image)

    return Subject(
        work,
        lambda: dict(work(no_lap)),
        ready.precision(),
        "backbone",
        depth=DEEP,
        images=inputs.batch,
    )


@SUBJECTS.register("train")
def train_subject(entrant: Entrant, inputs: Inputs) -> Subject:
    """A training iteration as Detectron2's trainers do it: forward, backward, step.

    The learning rate is 0, so that each iteration does the same work on the same weights, and what
    the heads draw at random is drawn from one seed.
    """
    cfg = entrant.contestant.cfg
    ready = prepare(entrant.model, cfg, training=True)
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
                break  # else the scaler has begun too high and tries half of it next
        # not each loss: in half precision other proposals come first, and so others are drawn
        total = torch.stack([value.detach() for value in losses.values()]).sum()
        return {"total loss": total, GRADIENT + "all weights": norm}

    return Subject(
        work,
        outputs,
        ready.precision(),
        "model",
        depth=DEEP,
        images=inputs.batch,
        facts={"optimizer": type(optimizer).__name__},
        reset=optimizer.zero_grad,
    )


def _depth(neck: nn.Module) -> float:
    """How many maps deep a pyramid is, in pyramids: one map of FPN passes two blocks a level."""
    return max(1.0, len(getattr(neck, "steps", ())) / _FPN_STEPS)
