"""Finds where a number that is not finite comes from, by running a step again with hooks.

Modules are named as in the keys of checkpoints, and those of a pyramid by their node as well.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator, Sequence

import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fpn_plugin.checkpoint.finite import (
    broken_weights,
    is_finite,
    listed,
    non_finite,
    tensors_of,
)
from fpn_plugin.compat import uncompiled
from fpn_plugin.pyramid.pyramid import GraphExecutor

Condition = Callable[[nn.Module, Any, Any], bool]
# A loss explodes with the outputs that it is computed from. Those of a sound network stay far below
# this, except for boxes in pixels.
LARGE = 1000.0
# what Detectron2 and torch raise for such numbers, beside FloatingPointError
_CAUSED_ERRORS = (AssertionError, RuntimeError, ValueError, IndexError)


class ForwardTrace:
    """A context in which the first module whose inputs or outputs meet a condition is noted.

    Args:
        model: the model itself, not a wrapper.
        condition: is called with a module, its inputs and its outputs; before the module runs, its
            outputs are None.

    Attributes:
        first: the description of the module; "" until the condition is met.
    """

    def __init__(self, model: nn.Module, condition: Condition) -> None:
        self.model = model
        self.condition = condition
        self.first = ""
        self._running: list[str] = []
        self._handles = contextlib.ExitStack()

    def __enter__(self) -> ForwardTrace:
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
        """The innermost module that has begun and not ended: where an error was raised."""
        return describe(self.model, self._running[-1]) if self._running else "the model"

    def _before(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.first and self.condition(module, (args, kwargs), None):
            self.first = f"{self.running}, in its own code before {describe(self.model, path)} runs"
        self._running.append(path)

    def _after(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._running.pop()
        if not self.first and self.condition(module, (args, kwargs), output):
            self.first = describe(self.model, path)


def describe(model: nn.Module, path: str) -> str:
    """A module by its path, with the pyramid's node that it belongs to."""
    for prefix, module in model.named_modules():
        if isinstance(module, GraphExecutor):
            start = f"{prefix}." if prefix else ""
            for step in module.steps:
                for part in step.parts():
                    root = start + part.path
                    if path == root or path.startswith(root + "."):
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
    """Where in a step the first number is not finite, or too large.

    Looks at the batch, then at the weights, then at each module of a second forward pass, then at
    each gradient of a second backward pass. The model keeps its weights, its running statistics and
    its gradients.

    Args:
        model: the model itself, not a wrapper, in training mode.
        batch: the batch of the step.
        device: the type of the device, such as "cpu".
        dtype: what autocast computes in; None for full precision.
        random: the generators' states before the step, of :func:`random_state`.
        backward: whether to look at the gradients, if nothing was found before.
        large: whether to look for the first module with weights of its own that outputs a number
            beyond `LARGE` as well.
        rerun: False to look at the batch and the weights only.

    Returns:
        the end of a sentence that says where it is, or "" if nothing was found.
    """
    if bad := _bad_samples(batch):
        return f"the batch, before the model: {listed(bad)}"
    if bad := broken_weights(model, _unread_statistics(model)):
        return f"the weights, before the step: {listed([describe(model, name) for name in bad])}"
    if not rerun:
        return ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_restored(model, device, random))
        stack.enter_context(uncompiled())
        condition = _has_large if large else _has_non_finite
        trace = stack.enter_context(ForwardTrace(model, condition))
        gradients = stack.enter_context(GradientTrace(model)) if backward else None
        try:
            with torch.autocast(device, dtype, enabled=dtype is not None):
                losses = model(batch)
        except FloatingPointError as error:
            return trace.first or f"{trace.running}, in its own code ({error})"
        except _CAUSED_ERRORS:  # possibly about something else
            return trace.first
        if trace.first or gradients is None:
            return trace.first
        try:
            return gradients.run(losses)
        except _CAUSED_ERRORS:  # there may be no room for a second set of gradients
            return gradients.first


def rerun_needs_other_processes(model: nn.Module) -> bool:
    """Whether a forward pass waits for the other processes."""
    synchronized = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
    return any(isinstance(module, synchronized) for module in model.modules())


def _has_non_finite(module: nn.Module, inputs: Any, output: Any) -> bool:
    return bool(non_finite(tensors_of(inputs if output is None else output)))


def _has_large(module: nn.Module, inputs: Any, output: Any) -> bool:
    if _has_non_finite(module, inputs, output):
        return True
    if output is None or next(module.parameters(recurse=False), None) is None:
        return False
    maps = [x for _, x in tensors_of(output) if x.is_floating_point() and x.numel()]
    return any(float(x.detach().abs().max()) > LARGE for x in maps)


def _bad_samples(batch: Sequence[Any]) -> list[str]:
    bad = []
    for number, sample in enumerate(batch):
        file = sample.get("file_name", "") if isinstance(sample, dict) else ""
        for name in non_finite(tensors_of(sample)):
            bad.append(f"{name!r} of sample {number}" + (f" ({file})" if file else ""))
    return bad


def _unread_statistics(model: nn.Module) -> set[str]:
    """The running statistics that training only writes: they cannot be where it begins."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for name in ("running_mean", "running_var")
    }


class GradientTrace:
    """A context in which the first gradient of a backward pass that is not finite is noted.

    Watches the gradients of all parameters, and of the maps between the innermost modules.

    Args:
        model: the model itself, not a wrapper.

    Attributes:
        first: the description of the gradient; "" if there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first = ""
        self._readers: dict[int, list[str]] = {}
        self._kept: list[Tensor] = []  # keeps maps alive, so that their ids stay unique
        self._handles = contextlib.ExitStack()

    def __enter__(self) -> GradientTrace:
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule) or next(module.children(), None):
                continue
            for handle in (
                module.register_forward_pre_hook(functools.partial(self._note_inputs, path)),
                module.register_forward_hook(functools.partial(self._watch_outputs, path)),
            ):
                self._handles.callback(handle.remove)
        for name, x in self.model.named_parameters():
            if x.requires_grad:
                self._watch(x, functools.partial(describe, self.model, name))
        return self

    def __exit__(self, *error: Any) -> None:
        self._handles.close()

    def run(self, losses: Any) -> str:
        """Run the backward pass; returns `first`."""
        total = sum(x.sum() for _, x in tensors_of(losses) if x.requires_grad)
        if isinstance(total, Tensor):
            weights = [x for x in self.model.parameters() if x.requires_grad]
            torch.autograd.grad(total, weights, allow_unused=True)
        return self.first

    def _note_inputs(self, path: str, module: nn.Module, args: Any) -> None:
        for _, x in tensors_of(args):
            self._readers.setdefault(id(x), []).append(path)
            self._kept.append(x)

    def _watch_outputs(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        for _, x in tensors_of(output):
            self._kept.append(x)
            if x.requires_grad:
                self._watch(x, functools.partial(self._describe_map, path, id(x)))

    def _watch(self, x: Tensor, name: Callable[[], str]) -> None:
        def note(gradient: Tensor) -> None:
            if not self.first and not is_finite(gradient):
                self.first = f"the gradient of {name()}"

        self._handles.callback(x.register_hook(note).remove)

    def _describe_map(self, path: str, map_id: int) -> str:
        readers = [describe(self.model, reader) for reader in self._readers.get(map_id, [])]
        source = listed(readers) or "the code that reads it"
        return f"what {describe(self.model, path)} gives, as it comes back from {source}"


def random_state(device: str) -> dict[str, Tensor]:
    """The states of torch's generators that a training step draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


@contextlib.contextmanager
def _restored(model: nn.Module, device: str, random: dict[str, Tensor]) -> Iterator[None]:
    """A context with the generators in these states; restores them and the buffers afterwards."""
    buffers = [(x, x.clone()) for x in model.buffers()]
    outside = random_state(device)
    _set_random_state(random)
    try:
        with EventStorage(1):  # a throwaway: the step's own numbers are already recorded
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
