"""What cannot be exported, said so that one knows what to do instead; and a limit on time."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from typing import Any, Iterator


def refuse_windows(name: str, module: str) -> ValueError:
    """For a transformer whose windows depend on the image's size."""
    return ValueError(
        f"--format {name}: {module!r} has attention in windows, whose number torch.export does not"
        " work out for any size; give --fixed-size HxW, or --format torchscript"
    )


def refuse_detector(name: str) -> ValueError:
    """For a whole detector, which runs Python on the boxes that it finds."""
    return ValueError(
        f"--what detector --format {name}: torch.export follows no code that depends on how many"
        " boxes there are, as Detectron2's heads do (nonzero, non-maximum suppression); take"
        " --format torchscript or onnx, or --what backbone"
    )


def without_counterpart(error: BaseException, program: Any) -> ValueError:
    """For a program that torch.onnx refused: the nodes whose operators have no counterpart.

    Args:
        program: `torch.export`'s; None if there is none.
    """
    text = _chain(error)
    operators = sorted(set(re.findall(r"No ONNX function[^\n]*?op='([\w.]+)'", text)))
    blamed = dict.fromkeys(
        f"node {_module_of(node)!r}: {operator}"
        for node in (program.graph.nodes if program else ())
        for operator in operators
        if str(node.target).startswith(f"{operator}.")
    )
    what = "; ".join(blamed) or ", ".join(operators) or text.strip().splitlines()[0]
    return ValueError(
        f"--format onnx: {what}: ONNX has no counterpart that torch.onnx knows; take --format"
        " torchscript or torch_export, or another operator for that node"
    )


def _module_of(node: Any) -> str:
    """The submodule that an operation came from, as the pyramid names it."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])


def _chain(error: BaseException | None) -> str:
    parts = []
    while error is not None:
        parts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


@contextlib.contextmanager
def time_limit(seconds: int, hint: str) -> Iterator[None]:
    """Stop what takes longer, in the main thread of a system that has alarms; 0 for no limit.

    Raises:
        TimeoutError: with the hint.
    """
    if not (
        seconds
        and hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
    ):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"the export did not end in {seconds} s (--time-limit); {hint}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again: torch catches exceptions on its way
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
