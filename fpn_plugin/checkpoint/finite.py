"""Tensors with NaN or infinity: finding them, and the error that ends a diverged training."""

from __future__ import annotations

from typing import Any, Collection, Iterable, Iterator, Mapping

from detectron2.structures import Instances
from torch import Tensor, nn

_SHOWN = 3  # names in a message


class DivergedError(FloatingPointError):
    """Training has diverged, or was about to: a number is not finite, or the loss explodes."""


def is_finite(x: Tensor) -> bool:
    """Whether every element is finite; integers always are."""
    if not (x.is_floating_point() or x.is_complex()):
        return True
    x = x.detach()
    # the sum takes a quarter of the time, but it can overflow although all elements are finite
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def non_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors with an element that is NaN or infinite."""
    return [name for name, x in named if not is_finite(x)]


def listed(names: list[str]) -> str:
    """The first few names as a text, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a module's inputs or outputs, or in a sample, with their place in it.

    An object's `tensor` counts too: Detectron2's boxes, masks and lists of images have one.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Instances):
        yield from tensors_of(value.get_fields(), name)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from tensors_of(entry, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from tensors_of(entry, f"{name}[{index}]")
    elif isinstance(tensor := getattr(value, "tensor", None), Tensor):
        yield name, tensor


def broken_weights(model: nn.Module, ignore: Collection[str] = ()) -> list[str]:
    """The names of the weights, and of the statistics of norms, that are not finite.

    Infinity in other buffers may be intended, as in an attention mask; NaN is not.

    Args:
        ignore: names of buffers that do not count.
    """
    norms = {name for name, module in model.named_modules() if hasattr(module, "running_mean")}
    broken = non_finite(model.named_parameters())
    for name, x in model.named_buffers():
        is_statistic = name.rpartition(".")[0] in norms
        if not is_finite(x) and name not in ignore and (is_statistic or bool(x.isnan().any())):
            broken.append(name)
    return broken


def require_finite(model: nn.Module, consequence: str) -> None:
    """Refuse weights with which no run can go on.

    Args:
        consequence: what is not done with them, as the message begins.

    Raises:
        DivergedError: naming the weights that are not finite.
    """
    if broken := broken_weights(model):
        raise DivergedError(
            f"{consequence}: {len(broken)} of its weights and statistics are not finite:"
            f" {listed(broken)}. The checkpoints that are there stay as they are"
        )
