"""Weights that must fit: what is exported is not trained on, so nothing makes up for the rest."""

from __future__ import annotations

from typing import Any

from torch import nn

from fpn_plugin.engine.checkpoint import Checkpointer


class FittingCheckpointer(Checkpointer):
    """Loads a checkpoint only if it has what the model has, no more and no less.

    Args:
        part: what the parameters start with that this holds for; "" for all.

    Raises:
        ValueError: from `load`, naming the file and the first parameters that do not fit.
    """

    def __init__(self, model: nn.Module, part: str) -> None:
        super().__init__(model)
        self._part, self._path = part, ""

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        self._path = path
        return super().load(path, checkpointables)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        shapes = [
            (name, f"is {tuple(ours)} in the checkpoint and {tuple(wanted)} in the config's model")
            for name, ours, wanted in incompatible.incorrect_shapes
        ]
        misfits = [
            *shapes,
            *((name, "is not in the checkpoint") for name in incompatible.missing_keys),
            *((name, "is not in the config's model") for name in incompatible.unexpected_keys),
        ]
        named = [f"{name} {what}" for name, what in misfits if name.startswith(self._part)]
        if named:
            more = f", and {len(named) - 3} more" if len(named) > 3 else ""
            raise ValueError(
                f"--weights (MODEL.WEIGHTS) {self._path!r} does not fit the config:"
                f" {'; '.join(named[:3])}{more}. Take the config.yaml of the run that wrote it"
            )
