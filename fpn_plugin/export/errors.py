"""Errors for what cannot be exported, with what to do instead, and a time limit."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from typing import Any, Iterator, List, Sequence, Tuple

Operation = Tuple[str, str]  # the submodule that it comes from, and the operator
# how torch.onnx reports an operator without a counterpart: its exporter, and the one of traces
_UNSUPPORTED = (
    r"No ONNX function found for <OpOverload\(op='([\w.:]+)'",
    r"Exporting the operator '([\w.:]+)' to ONNX",
    r"an operator with unrecognized namespace ([\w:]+)",
)


def window_error(name: str, module: str) -> ValueError:
    """For a transformer whose windows depend on the image's size.

    Args:
        name: of the format.
        module: the submodule with the windows.
    """
    return ValueError(
        f"--format {name}: {module!r} has attention in windows, whose number is fixed in the file:"
        " give --fixed-size HxW"
    )


def detector_error(name: str) -> ValueError:
    """For a whole detector, which runs Python code on the boxes that it finds."""
    return ValueError(
        f"--what detector --format {name}: torch.export does not follow what Detectron2 does around"
        " the backbone, where sizes are tensors and loops depend on how many boxes there are; take"
        " --format torchscript or onnx, or --what backbone"
    )


def program_error(name: str, error: BaseException, dynamic: bool) -> ValueError:
    """For a model that torch.export failed on.

    Args:
        dynamic: whether the file was to take any size.
    """
    choices = "--fixed-size HxW, or --format torchscript" if dynamic else "--format torchscript"
    text = " ".join(str(error).split())[:300]
    return ValueError(
        f"--format {name}: torch.export cannot follow this model: {text} …; give {choices}"
    )


def onnx_error(
    error: BaseException, operations: Sequence[Operation], name: str = "onnx"
) -> ValueError:
    """For a model that torch.onnx failed on; names the nodes whose operators have no counterpart.

    Args:
        operations: those of the whole model.
        name: of the format.
    """
    texts = _chain(error)
    text = "\n".join(texts)
    unknown = {found for pattern in _UNSUPPORTED for found in re.findall(pattern, text)}
    if not unknown:
        return ValueError(f"--format {name}: torch.onnx fails: {texts[-1].strip()[:500]}")
    named = [f"node {node!r}: {found}" for node, found in operations if found in unknown]
    what = "; ".join(dict.fromkeys(named)) or ", ".join(sorted(unknown))
    return ValueError(
        f"--format {name}: {what}: torch.onnx knows no counterpart; take another operator for that"
        " node, or --format torchscript"
    )


def operations_of_program(program: Any) -> List[Operation]:
    """The operations of a `torch.export` program."""
    operations = []
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        name = getattr(node.target, "name", lambda: "")() if node.op == "call_function" else ""
        operations.append((str(list(stack.values())[-1][0]), name.replace("::", ".")))
    return operations


def operations_of_trace(traced: Any) -> List[Operation]:
    """The operations of a TorchScript trace."""
    nodes = traced.inlined_graph.nodes()
    scopes = [(node.scopeName().split("/")[-1], node.kind()) for node in nodes]
    return [(scope.replace("__module.", ""), operator) for scope, operator in scopes]


def _chain(error: BaseException | None) -> List[str]:
    """The messages of an error and its causes, the first cause last."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return texts


class _Alarm(BaseException):
    """Not an `Exception`, as the exporters catch these."""


@contextlib.contextmanager
def time_limit(seconds: int, hint: str) -> Iterator[None]:
    """A context that is stopped if it takes longer; for the main thread on systems with alarms.

    torch may be left in the middle of a trace, so the process should not compile or export again.

    Args:
        seconds: 0 for no limit.
        hint: what to do instead.

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
        raise _Alarm

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Alarm:
        text = f"the export did not end in {seconds} s (--time-limit); {hint}"
        raise TimeoutError(text) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
