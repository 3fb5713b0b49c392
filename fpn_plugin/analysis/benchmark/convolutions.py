"""The convolutions of a pyramid and nothing else: the floor under its time."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fpn_plugin.analysis.benchmark.clock import FirstCall, Lap
from fpn_plugin.analysis.benchmark.entrants import Entrant
from fpn_plugin.analysis.benchmark.inputs import Inputs
from fpn_plugin.analysis.benchmark.prepare import prepare, without_levers
from fpn_plugin.analysis.benchmark.subjects import Subject, given_maps

_CONVOLUTIONS = (torch.conv2d, torch.conv_transpose2d)


class Recorder(TorchFunctionMode):
    """Notes every convolution that is called while it is active, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _CONVOLUTIONS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def convolutions_subject(entrant: Entrant, inputs: Inputs) -> Subject:
    """Every convolution of the pyramid's forward on the map that it had, one after another.

    What a config compiles is recorded uncompiled. Deformable convolutions are not among them.
    """
    cfg = without_levers(entrant.contestant.cfg, keep_types=True)
    ready = prepare(entrant.model, cfg, training=False)
    maps = given_maps(ready, inputs)
    with Recorder() as recorder, ready.autocast(), torch.no_grad():
        ready.neck()(maps)

    @FirstCall
    @torch.no_grad()
    def work(lap: Lap) -> Any:
        with ready.autocast():
            for call, args, keywords in recorder.calls:
                call(*args, **keywords)

    facts = {"convolutions": len(recorder.calls)}
    return Subject(work, dict, ready.precision(), "neck", images=inputs.batch, facts=facts)
