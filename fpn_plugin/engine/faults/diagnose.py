"""Where a number that is not finite comes from: a step's batch is run again, part by part watched.

Modules are named as in the checkpoint's keys; what belongs to a pyramid by its node as well.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator, Sequence

import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fpn_plugin.engine.faults.finite import (
    broken_weights,
    is_finite,
    listed,
    non_finite,
    tensors_of,
)
from fpn_plugin.pyramid.pyramid import GraphExecutor

Shows = Callable[[nn.Module, Any, Any], bool]
# Losses grow as the outputs do that they are taken of, and those of a sound network, except boxes
# in pixels, stay far below this.
LARGE = 1000.0
# what Detectron2 and torch raise when they meet such numbers, beside FloatingPointError
_BROKEN = (AssertionError, RuntimeError, ValueError, IndexError)


class Trace:
    """While it is open, notes in which part of a model something first shows up.

    Args:
        model: without any wrapper.
        shows: whether it shows in a module: in what it was given, before it runs (then the last
            argument is None), or in what it gave.
    """

    def __init__(self, model: nn.Module, shows: Shows) -> None:
        self.model = model
        self.shows = shows
        self.first = ""
        self._running: list[str] = []
        self._handles = contextlib.ExitStack()

    def __enter__(self) -> Trace:
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for add, hook in (
                (module.register_forward_pre_hook, self._before),
                (module.register_forward_hook, self._after),
            ):
                handle = add(functools.partial(hook, path), with_kwargs=True)
                self._handles.callback(handle.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._handles.close()

    @property
    def running(self) -> str:
        """The innermost module that has begun and not ended: after an error, where it was."""
        return describe(self.model, self._running[-1]) if self._running else "the model"

    def _before(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.first and self.shows(module, (args, kwargs), None):
            self.first = f"{self.running}, in its own code before {describe(self.model, path)} runs"
        self._running.append(path)

    def _after(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._running.pop()
        if not self.first and self.shows(module, (args, kwargs), output):
            self.first = describe(self.model, path)


def describe(model: nn.Module, path: str) -> str:
    """A module by its path, and by the pyramid's node that it belongs to."""
    for prefix, module in model.named_modules():
        if isinstance(module, GraphExecutor):
            start = f"{prefix}." if prefix else ""
            for step in module.steps:
                for part in step.parts():
                    own = start + part.path
                    if path == own or path.startswith(own + "."):
                        return f"pyramid node {step.node.name!r} ({path})"
    return path or "the model"


def find_origin(
    model: nn.Module,
    batch: Sequence[Any],
    *,
    device: str,
    dtype: torch.dtype | None,
    random: dict[str, Tensor],
    backward: bool = False,
    large: bool = False,
    rerun: bool = True,
) -> str:
    """Where in a step the first number is that is not finite, or too large.

    The model keeps its weights, its running statistics and its gradients.

    Args:
        model: without any wrapper, in training mode.
        batch: of the step.
        device: the kind of device.
        dtype: what autocast computes in; None for full precision.
        random: the generators' states before the step, of :func:`random_state`.
        backward: whether to look for it in the gradients, if not before.
        large: whether also to look for the first part with weights of its own that gives a number
            beyond `LARGE`.
        rerun: False to look no further than the batch and the weights.

    Returns:
        the end of a sentence that says where it is, or "" if there is none.
    """
    if bad := _bad_samples(batch):
        return f"the batch, before the model: {listed(bad)}"
    if bad := broken_weights(model, _written(model)):
        named = [describe(model, name) for name in bad]
        return f"the weights, before the step: {listed(named)}"
    if not rerun:
        return ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_restored(model, device, random))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        trace = stack.enter_context(Trace(model, _is_large if large else _is_broken))
        gradients = stack.enter_context(GradientTrace(model)) if backward else None
        try:
            with torch.autocast(device, dtype, enabled=dtype is not None):
                losses = model(batch)
        except FloatingPointError as error:
            return trace.first or f"{trace.running}, in its own code ({error})"
        except _BROKEN:  # may be about something else
            return trace.first
        if trace.first or gradients is None:
            return trace.first
        try:
            return gradients.run(losses)
        except _BROKEN:  # there may be no room for a second set of gradients
            return gradients.first


def rerunning_needs_all(model: nn.Module) -> bool:
    """Whether a forward pass waits for the other processes."""
    kinds = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
    return any(isinstance(module, kinds) for module in model.modules())


def _is_broken(module: nn.Module, given: Any, output: Any) -> bool:
    return bool(non_finite(tensors_of(given if output is None else output)))


def _is_large(module: nn.Module, given: Any, output: Any) -> bool:
    if _is_broken(module, given, output):
        return True
    if output is None or next(module.parameters(recurse=False), None) is None:
        return False
    maps = [x for _, x in tensors_of(output) if x.is_floating_point() and x.numel()]
    return any(float(x.detach().abs().max()) > LARGE for x in maps)


def _bad_samples(batch: Sequence[Any]) -> list[str]:
    found = []
    for number, sample in enumerate(batch):
        file = sample.get("file_name", "") if isinstance(sample, dict) else ""
        for name in non_finite(tensors_of(sample)):
            found.append(f"{name!r} of sample {number}" + (f" ({file})" if file else ""))
    return found


def _written(model: nn.Module) -> set[str]:
    """The running statistics that training writes, and does not compute with."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for name in ("running_mean", "running_var")
    }


class GradientTrace:
    """Notes the gradient that is the first of a backward pass not to be finite.

    Args:
        model: without any wrapper.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first = ""
        self._readers: dict[int, list[str]] = {}
        self._kept: list[Tensor] = []  # so that no other map gets the id of one
        self._handles = contextlib.ExitStack()

    def __enter__(self) -> GradientTrace:
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule) or next(module.children(), None):
                continue
            for handle in (
                module.register_forward_pre_hook(functools.partial(self._read, path)),
                module.register_forward_hook(functools.partial(self._give, path)),
            ):
                self._handles.callback(handle.remove)
        for name, x in self.model.named_parameters():
            if x.requires_grad:
                self._watch(x, functools.partial(describe, self.model, name))
        return self

    def __exit__(self, *error: Any) -> None:
        self._handles.close()

    def run(self, losses: Any) -> str:
        """The backward pass: where the first gradient is that is not finite, or ""."""
        total = sum(x.sum() for _, x in tensors_of(losses) if x.requires_grad)
        if isinstance(total, Tensor):
            weights = [x for x in self.model.parameters() if x.requires_grad]
            torch.autograd.grad(total, weights, allow_unused=True)
        return self.first

    def _read(self, path: str, module: nn.Module, args: Any) -> None:
        for _, x in tensors_of(args):
            self._readers.setdefault(id(x), []).append(path)
            self._kept.append(x)

    def _give(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        for _, x in tensors_of(output):
            self._kept.append(x)
            if x.requires_grad:
                self._watch(x, functools.partial(self._between, path, id(x)))

    def _watch(self, x: Tensor, tell: Callable[[], str]) -> None:
        def note(gradient: Tensor) -> None:
            if not self.first and not is_finite(gradient):
                self.first = f"the gradient of {tell()}"

        self._handles.callback(x.register_hook(note).remove)

    def _between(self, path: str, key: int) -> str:
        readers = [describe(self.model, reader) for reader in self._readers.get(key, [])]
        source = listed(readers) or "the code that reads it"
        return f"what {describe(self.model, path)} gives, as it comes back from {source}"


def random_state(device: str) -> dict[str, Tensor]:
    """The states of torch's generators, which a training step draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


@contextlib.contextmanager
def _restored(model: nn.Module, device: str, random: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the generators are where they were; after it, they and the buffers as before."""
    buffers = [(x, x.clone()) for x in model.buffers()]
    outside = random_state(device)
    _set_random_state(random)
    try:
        with EventStorage(1):  # what the model reports is reported already
            yield
    finally:
        _set_random_state(outside)
        with torch.no_grad():
            for x, before in buffers:
                x.copy_(before)


def _set_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
