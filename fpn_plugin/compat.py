"""What older versions of torch lack: replaced where that is exact, else refused by version.

setup.py says which torch is the oldest; `make test-oldest` runs the tests with it.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, Callable, Collection, ContextManager

import torch
from torch import Tensor

TORCH = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
# the oldest torch with …
EXPORT = (2, 7)  # torch.export that can follow pyramids at any size
COMPILE = (2, 6)  # torch.compile that can be suspended, to draw and to find where a loss diverges
SAFE_GLOBALS = (2, 6)  # weights_only that can be told of more classes, under any name
# asks torch.onnx.export for its older exporter, which was the only one
TRACED_ONNX: dict[str, Any] = {"dynamo": False} if TORCH >= (2, 5) else {}


def require_torch(version: tuple[int, int], what: str, instead: str) -> None:
    """Check that this torch is new enough for a feature.

    Args:
        what: the option with its value.
        instead: what to do with an older torch.

    Raises:
        ValueError: naming both versions.
    """
    if TORCH < version:
        needed = ".".join(map(str, version))
        raise ValueError(
            f"{what} needs torch {needed} or later, not {torch.__version__}; {instead}"
        )


def _never() -> bool:
    return False


# before, `EXPORT` rules exporting out
is_exporting: Callable[[], bool] = torch.compiler.is_exporting if TORCH >= EXPORT else _never


def uncompiled() -> ContextManager[Any]:
    """A context in which what is compiled runs uncompiled."""
    if TORCH < COMPILE:  # nothing is
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def safe_globals(names: list[Any]) -> ContextManager[Any]:
    """torch's own; before `SAFE_GLOBALS` a context that changes nothing: they are refused."""
    if TORCH < SAFE_GLOBALS:
        return contextlib.nullcontext()
    return torch.serialization.safe_globals(names)


def total_norm(tensors: Collection[Tensor]) -> Tensor:
    """`torch.nn.utils.get_total_norm`, which torch 2.6 brought."""
    if TORCH < (2, 6):
        norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return torch.nn.utils.get_total_norm(tensors)
