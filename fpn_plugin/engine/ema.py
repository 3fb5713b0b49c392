"""`MODEL.EMA`: an exponential moving average of the weights, which is what a run evaluates, draws
and saves.

The names and the rule are those of D2Go's `MODEL_EMA`; Detectron2 itself has none. Unlike D2Go's, a
checkpoint holds the averages as its model, so that all that reads checkpoints (Detectron2's
DefaultPredictor too) has the weights that were evaluated. The weights as trained, from which a run
goes on, are in the state of its trainer.
"""

from __future__ import annotations

import contextlib
import logging
from itertools import chain
from typing import Any, Iterator, Mapping

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fpn_plugin.config.learning import EMA, EMASettings, read_ema

logger = logging.getLogger(__name__)


class EMAHook(HookBase):
    """Averages the weights after each step; register it before the hooks that save and evaluate.

    The average begins with the weights that the run begins with. It is of the parameters that are
    trained and of running statistics; all else is the model's own. Each process has the same, but
    for the statistics of norms that are not synchronised.

    Args:
        model: the model itself, not a wrapper, on its device.
        settings: None for no average. A checkpoint of a run with one can be resumed nevertheless.
        key: of the config, for messages.
    """

    def __init__(self, model: nn.Module, settings: EMASettings | None, key: str = EMA) -> None:
        self.settings = settings
        self.updates = 0
        self._key = key
        self._weights = _averaged_tensors(model)
        self._averages: dict[str, Tensor] = {}  # while they are in the model: the weights
        self._is_in_model = False

    def decay(self) -> float:
        """The share of the old average in the n-th one: `DECAY`, but at most
        (1 + n) / (`DECAY_WARM_UP_FACTOR` + n)."""
        assert self.settings is not None
        decay, factor = self.settings
        return min(decay, (1 + self.updates) / (factor + self.updates)) if factor >= 0 else decay

    def before_train(self) -> None:
        """Called by the trainer at the start, with the first weights or those of a checkpoint."""
        if self.settings and not self._averages:
            self._averages = self._copies()

    def after_step(self) -> None:
        """Called by the trainer after each iteration."""
        if self.settings:
            self.updates += 1
            average = get_ema_multi_avg_fn(self.decay())
            average(list(self._averages.values()), list(self._weights.values()), self.updates)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Within it the model has the averages; without an average nothing is changed."""
        if not self._averages or self._is_in_model:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        """The weights as trained, for a checkpoint whose model has the averages."""
        if not self.settings:
            return {}
        trained = self._averages if self._is_in_model else self._weights
        return {"updates": self.updates, "trained": {k: x.detach() for k, x in trained.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, whose averages the model has already."""
        if self.settings:
            self.updates, self._averages = state["updates"], self._copies()
        else:
            logger.warning(
                "%s was enabled and is not any more: the run goes on from the weights as trained,"
                " and saves these",
                self._key,
            )
        with torch.no_grad():
            for name in self._weights.keys() & state["trained"].keys():
                self._weights[name].copy_(state["trained"][name])

    def _copies(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._weights.items()}

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._weights.items():
            kept = value.clone()
            value.copy_(self._averages[name])
            self._averages[name].copy_(kept)
        self._is_in_model = not self._is_in_model


def build_ema_hook(cfg: CfgNode, model: nn.Module) -> EMAHook:
    """The hook of `MODEL.EMA`.

    Args:
        model: the model itself, not a wrapper.
    """
    return EMAHook(model, read_ema(cfg))


def _averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is trained of a model, and its statistics; each tensor once."""
    saved = model.state_dict().keys()
    parameters = ((name, x) for name, x in model.named_parameters() if x.requires_grad)
    tensors = chain(parameters, model.named_buffers())
    return {name: x for name, x in tensors if name in saved and x.is_floating_point()}
