"""What an exact resume of RetinaNet and FCOS needs beside the trainer's own state."""

from __future__ import annotations

from typing import Any

from detectron2.engine import HookBase
from torch import nn


class LossNormalizerHook(HookBase):
    """Keeps a dense detector's running number of positives in the checkpoint.

    Detectron2's `DenseDetector` has it as an attribute, which is no part of the state dict.

    Args:
        model: the model itself, not what wraps it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """`{"loss_normalizer": value}`, or nothing for a model without it."""
        value = getattr(self.model, "loss_normalizer", None)
        return {} if value is None else {"loss_normalizer": value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the value of the checkpoint."""
        self.model.loss_normalizer = state["loss_normalizer"]
