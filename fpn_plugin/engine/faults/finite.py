"""Numbers that are not finite: where among tensors they are, and the error that training ends
with."""

from __future__ import annotations

from typing import Any, Collection, Iterable, Iterator, Mapping

from detectron2.structures import Instances
from torch import Tensor, nn

_SHOWN = 3  # names in a message


class DivergedError(FloatingPointError):
    """Training has diverged, or was about to: a number is not finite, or the loss explodes."""


def is_finite(x: Tensor) -> bool:
    """Whether every element is; those of a type without infinity are."""
    if not (x.is_floating_point() or x.is_complex()):
        return True
    x = x.detach()
    # a sum takes a quarter of the time; it can also overflow by itself
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def non_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those tensors that have an element that is NaN or infinite."""
    return [name for name, x in named if not is_finite(x)]


def listed(names: list[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module's inputs or outputs, or of a sample, by where they stand in it.

    What holds a `tensor` is looked into as well: Detectron2's boxes, masks and lists of images.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Instances):
        yield from tensors_of(value.get_fields(), name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_of(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from tensors_of(item, f"{name}[{number}]")
    elif isinstance(held := getattr(value, "tensor", None), Tensor):
        yield name, held


def broken_weights(model: nn.Module, without: Collection[str] = ()) -> list[str]:
    """The names of the weights, and of the statistics of norms, that are not finite.

    Infinity in other buffers may be meant, as in an attention mask; NaN is not.

    Args:
        without: names that do not count.
    """
    norms = {path for path, part in model.named_modules() if hasattr(part, "running_mean")}
    found = non_finite(model.named_parameters())
    for name, x in model.named_buffers():
        strict = name.rpartition(".")[0] in norms
        if not is_finite(x) and name not in without and (strict or bool(x.isnan().any())):
            found.append(name)
    return found


def refuse_broken(model: nn.Module, what: str) -> None:
    """Refuse weights that no run can go on from.

    Args:
        what: is not done with them, for the message.

    Raises:
        DivergedError: naming the weights that are not finite.
    """
    if bad := broken_weights(model):
        raise DivergedError(
            f"{what}: {len(bad)} of its weights and statistics are not finite: {listed(bad)}. The"
            " checkpoints that are there stay as they are"
        )
