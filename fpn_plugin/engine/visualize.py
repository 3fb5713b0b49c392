"""What a training run shows of its pyramid in TensorBoard: `TEST.VIS_PERIOD`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.engine import HookBase
from torch import Tensor, nn

from fpn_plugin.analysis.visualize.detector import Mapper
from fpn_plugin.analysis.visualize.fusion_weights import FusionWeights, fusion_weights
from fpn_plugin.analysis.visualize.images import (
    Record,
    class_names,
    dataset_records,
    inspect_image,
)
from fpn_plugin.analysis.visualize.maps import map_rows
from fpn_plugin.analysis.visualize.picture import as_pixels, draw_image, select_objects
from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.pyramid.resolve import ResolvedNode

logger = logging.getLogger(__name__)

IMAGES = 2  # of the validation set, always the same
SCORE = 0.5
_WRITERS = 20  # iterations between two lines of Detectron2's writers
_DPI = 75


class VisualizeHook(HookBase):
    """Puts pictures, fusion weights and gradient norms into Detectron2's event storage.

    - `visualize/<image>`: a few validation images as `tools/visualize.py` draws them, each period;
    - `grad_norm/<node>`: the norm of the gradient of a node's parameters, before any clipping and
      without the scale of mixed precision, each period;
    - `fusion/<node>/<input>`: the learned weight, each time that the writers write.

    Training goes on as if nothing had been: the numbers that it draws, its modes and gradients stay
    as they are. For the main process alone, before the writers' hook.

    Args:
        model: the model itself, not what wraps it.
        records: the images.
        period: in iterations.
        names: of the classes.
    """

    def __init__(
        self,
        model: nn.Module,
        mapper: Mapper,
        records: Sequence[Record],
        period: int,
        names: Sequence[str] = (),
    ) -> None:
        self.model: Any = model
        self.mapper = mapper
        self.records = records
        self.period = period
        self.names = names

    def before_train(self) -> None:
        """Ask the trainer of single steps to tell when gradients are there."""
        steps = getattr(self.trainer, "_trainer", None)
        if steps is not None and isinstance(self.pyramid, GraphExecutor):
            steps.register_hooks([_AfterBackward(self)])

    @property
    def pyramid(self) -> Any:
        """The model's backbone."""
        return getattr(self.model, "backbone", None)

    def put_gradients(self, scale: float) -> None:
        """The norm per node.

        Args:
            scale: by which the gradients are too large.
        """
        if not self._is_due(self.period):
            return
        for name, norm in gradient_norms(self.pyramid).items():
            value = float(norm) / scale
            if value < float("inf"):  # else the step is one that mixed precision skips
                self._put(f"grad_norm/{name}", value)

    def after_step(self) -> None:
        """Called by the trainer after each iteration."""
        last = self.trainer.iter == self.trainer.max_iter - 1
        if isinstance(self.pyramid, GraphExecutor) and (self._is_due(_WRITERS) or last):
            for node, item in fusion_weights(self.pyramid).items():
                for name, value in named_weights(item).items():
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
        image = inspect_image(self.model, self.mapper, record)
        objects = select_objects(image, self.names, SCORE)
        figure = draw_image(image, objects, map_rows(self.pyramid, image.maps), SCORE)
        return as_pixels(figure, _DPI).transpose(2, 0, 1)


class _AfterBackward(HookBase):
    """Lives in the trainer of single steps, which alone tells when gradients are there."""

    def __init__(self, hook: VisualizeHook) -> None:
        self.hook = hook

    def after_backward(self) -> None:
        scaler = getattr(self.trainer, "grad_scaler", None)
        self.hook.put_gradients(1.0 if scaler is None else scaler.get_scale())


def build_visualize_hook(cfg: CfgNode, model: nn.Module) -> VisualizeHook:
    """The hook of `TEST.VIS_PERIOD`, with the first images of `DATASETS.TEST` that have objects.

    Args:
        model: the model itself, not what wraps it.
    """
    names = list(cfg.DATASETS.TEST[:1])
    records = [record for name in names for record in dataset_records(name, IMAGES)]
    if not records:
        logger.warning("TEST.VIS_PERIOD: no pictures, as DATASETS.TEST is empty")
    mapper = DatasetMapper(cfg, is_train=False)
    return VisualizeHook(model, mapper, records, cfg.TEST.VIS_PERIOD, class_names(names))


def gradient_norms(pyramid: GraphExecutor) -> dict[str, Tensor]:
    """The L2 norm of the gradient of each node's parameters; nodes without any are left out."""
    norms = {}
    for step in pyramid.steps:
        grads = [p.grad for p in _parameters(pyramid, step) if p.grad is not None]
        if grads:
            each = [torch.linalg.vector_norm(grad.detach().float()) for grad in grads]
            norms[step.node.name] = torch.linalg.vector_norm(torch.stack(each))
    return norms


def _parameters(pyramid: GraphExecutor, step: ResolvedNode) -> list[nn.Parameter]:
    return [x for part in step.parts() for x in pyramid.get_submodule(part.path).parameters()]


def named_weights(item: FusionWeights) -> dict[str, float]:
    """A fusion's weights by input, the mean over the channels if there are many; none if none are
    learned. An input that comes twice is told apart by its number."""
    found: dict[str, float] = {}
    for number, (name, value) in enumerate(zip(item.inputs, item.means())):
        found[name if item.inputs.count(name) == 1 else f"{name}_{number}"] = value
    return found
