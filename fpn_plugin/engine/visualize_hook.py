"""`TEST.VIS_PERIOD`: pictures, fusion weights and gradient norms of a pyramid in TensorBoard."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, Callable, Sequence

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor, nn

from fpn_plugin.compat import total_norm
from fpn_plugin.data.mapper import Mapper
from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.pyramid.resolve import ResolvedNode
from fpn_plugin.visualize.fusion_weights import FusionWeights, fusion_weights
from fpn_plugin.visualize.images import (
    Record,
    class_names,
    dataset_records,
    inspect_image,
    skeleton,
)
from fpn_plugin.visualize.maps import map_rows
from fpn_plugin.visualize.picture import as_pixels, draw_image, select_objects

logger = logging.getLogger(__name__)

IMAGES = 2  # of the validation set, always the same
SCORE = 0.5
_WRITERS = 20  # iterations between two calls of Detectron2's writers
_DPI = 75


class VisualizeHook(HookBase):
    """Puts pictures, fusion weights and gradient norms into Detectron2's event storage.

    - `visualize/<image>`: a few validation images as `fpn visualize` draws them, every period;
    - `grad_norm/<node>`: the norm of the gradient of a node's parameters, before clipping and
      without the scale of mixed precision, every period;
    - `fusion/<node>/<input>`: the learned weight, whenever the writers write.

    Training is not affected: its random numbers, modes and gradients stay the same. For the main
    process only; register it before the hook of the writers.

    Args:
        model: the model itself, not a wrapper.
        records: the dataset dicts of the images.
        period: in iterations.
        names: the names of the classes.
        skeleton: pairs of indices of key points to join.
        drawing: makes a context in which the model has the weights that the pictures are of.
    """

    def __init__(
        self,
        model: nn.Module,
        mapper: Mapper,
        records: Sequence[Record],
        period: int,
        names: Sequence[str] = (),
        skeleton: Sequence[tuple[int, int]] = (),
        drawing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.model: Any = model
        self.drawing = drawing
        self.mapper = mapper
        self.records = records
        self.period = period
        self.names = names
        self.skeleton = skeleton

    def before_train(self) -> None:
        """Register with the step trainer, the only one that calls `after_backward`."""
        steps = getattr(self.trainer, "_trainer", None)
        if steps is not None and isinstance(self.pyramid, GraphExecutor):
            steps.register_hooks([_AfterBackward(self)])

    @property
    def pyramid(self) -> Any:
        """The model's backbone."""
        return getattr(self.model, "backbone", None)

    def put_gradients(self, scale: float) -> None:
        """Put the norm of each node's gradient.

        Args:
            scale: the gradient scaler's factor in the gradients.
        """
        if not self._is_due(self.period):
            return
        for name, norm in gradient_norms(self.pyramid).items():
            value = float(norm) / scale
            if value < float("inf"):  # else the gradient scaler skips this step
                self._put(f"grad_norm/{name}", value)

    def after_step(self) -> None:
        """Called by the trainer after each iteration."""
        last = self.trainer.iter == self.trainer.max_iter - 1
        if isinstance(self.pyramid, GraphExecutor) and (self._is_due(_WRITERS) or last):
            for node, weights in fusion_weights(self.pyramid).items():
                for name, value in named_weights(weights).items():
                    self._put(f"fusion/{node}/{name}", value)
        if self._is_due(self.period):
            for number, record in enumerate(self.records, 1):
                name = f"visualize/{number}_{Path(record['file_name']).stem}"
                self.trainer.storage.put_image(name, self._draw(record))

    def _is_due(self, period: int) -> bool:
        return (self.trainer.iter + 1) % period == 0

    def _put(self, name: str, value: float) -> None:
        self.trainer.storage.put_scalar(name, value, smoothing_hint=False)

    def _draw(self, record: Record) -> Any:
        """The figure as `(3, H, W)`, 0 to 255."""
        with self.drawing():
            image = inspect_image(self.model, self.mapper, record)
        objects = select_objects(image, self.names, SCORE, self.skeleton)
        figure = draw_image(image, objects, map_rows(self.pyramid, image.maps), SCORE)
        return as_pixels(figure, _DPI).transpose(2, 0, 1)


class _AfterBackward(HookBase):
    """The part of a :class:`VisualizeHook` that the step trainer calls."""

    def __init__(self, hook: VisualizeHook) -> None:
        self.hook = hook

    def after_backward(self) -> None:
        scaler = getattr(self.trainer, "grad_scaler", None)
        self.hook.put_gradients(1.0 if scaler is None else scaler.get_scale())


def build_visualize_hook(
    cfg: CfgNode,
    model: nn.Module,
    drawing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> VisualizeHook:
    """The hook of `TEST.VIS_PERIOD`, with the first images of `DATASETS.TEST` that have objects.

    Args:
        model: the model itself, not a wrapper.
        drawing: see :class:`VisualizeHook`.
    """
    names = list(cfg.DATASETS.TEST[:1])
    records = [record for name in names for record in dataset_records(name, IMAGES)]
    if not records:
        logger.warning("TEST.VIS_PERIOD: no pictures, as DATASETS.TEST is empty")
    mapper = Mapper(cfg, is_train=False)
    drawn = class_names(names, cfg), skeleton(names, cfg)
    return VisualizeHook(model, mapper, records, cfg.TEST.VIS_PERIOD, *drawn, drawing)


def gradient_norms(pyramid: GraphExecutor) -> dict[str, Tensor]:
    """The L2 norm of the gradient of each node's parameters, for nodes that have gradients."""
    norms = {}
    for step in pyramid.steps:
        grads = [p.grad for p in _parameters(pyramid, step) if p.grad is not None]
        if grads:
            # in float32, as norms of half-precision gradients overflow early
            total = total_norm([grad.detach().float() for grad in grads])
            norms[step.node.name] = total
    return norms


def _parameters(pyramid: GraphExecutor, step: ResolvedNode) -> list[nn.Parameter]:
    return [x for part in step.parts() for x in pyramid.get_submodule(part.path).parameters()]


def named_weights(fusion: FusionWeights) -> dict[str, float]:
    """A fusion's weights by input, as means over channels; empty if none are learned.

    An input that occurs twice gets its position as a suffix.
    """
    if fusion.weights is None:
        return {}
    values = fusion.weights.reshape(len(fusion.inputs), -1).mean(dim=1).tolist()
    return {
        name if fusion.inputs.count(name) == 1 else f"{name}_{position}": value
        for position, (name, value) in enumerate(zip(fusion.inputs, values))
    }
