"""What cannot be exported, said so that one knows what to do instead; and a limit on time."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from typing import Any, Iterator, List, Sequence, Tuple

# which submodule an operation comes from, and the operator
Operation = Tuple[str, str]
# how torch.onnx says that it knows no function for an operator: its exporter, and the one of traces
_REFUSED = (
    r"No ONNX function found for <OpOverload\(op='([\w.:]+)'",
    r"Exporting the operator '([\w.:]+)' to ONNX",
    r"an operator with unrecognized namespace ([\w:]+)",
)


def refuse_windows(name: str, module: str) -> ValueError:
    """For a transformer whose windows depend on the image's size."""
    return ValueError(
        f"--format {name}: {module!r} has attention in windows, whose number is fixed in the file:"
        " give --fixed-size HxW"
    )


def refuse_detector(name: str) -> ValueError:
    """For a whole detector, which runs Python on the boxes that it finds."""
    return ValueError(
        f"--what detector --format {name}: torch.export does not follow what Detectron2 does around"
        " the backbone, where sizes are tensors and loops depend on how many boxes there are; take"
        " --format torchscript or onnx, or --what backbone"
    )


def refuse_program(name: str, error: BaseException, dynamic: bool) -> ValueError:
    """For what torch.export failed at.

    Args:
        dynamic: whether it was to take any size.
    """
    choices = "--fixed-size HxW, or --format torchscript" if dynamic else "--format torchscript"
    text = " ".join(str(error).split())[:300]
    return ValueError(
        f"--format {name}: torch.export cannot follow this model: {text} …; give {choices}"
    )


def refuse_onnx(error: BaseException, operations: Sequence[Operation]) -> ValueError:
    """For what torch.onnx failed at: the nodes whose operators have no counterpart, if that is why.

    Args:
        operations: of the whole model.
    """
    texts = _chain(error)
    unknown = {name for pattern in _REFUSED for name in re.findall(pattern, "\n".join(texts))}
    if not unknown:
        return ValueError(f"--format onnx: torch.onnx fails: {texts[-1].strip()[:500]}")
    named = [f"node {node!r}: {name}" for node, name in operations if name in unknown]
    what = "; ".join(dict.fromkeys(named)) or ", ".join(sorted(unknown))
    return ValueError(
        f"--format onnx: {what}: torch.onnx knows no counterpart; take another operator for that"
        " node, or --format torchscript"
    )


def operations_of_program(program: Any) -> List[Operation]:
    """Of a `torch.export` program."""
    found = []
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        name = getattr(node.target, "name", lambda: "")() if node.op == "call_function" else ""
        found.append((str(list(stack.values())[-1][0]), name.replace("::", ".")))
    return found


def operations_of_trace(traced: Any) -> List[Operation]:
    """Of a TorchScript trace."""
    nodes = traced.inlined_graph.nodes()
    scopes = [(node.scopeName().split("/")[-1], node.kind()) for node in nodes]
    return [(scope.replace("__module.", ""), kind) for scope, kind in scopes]


def _chain(error: BaseException | None) -> List[str]:
    """The messages of an error and of what it came from, the first cause last."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return texts


class _Alarm(BaseException):
    """No `Exception`, which the exporters catch on their way."""


@contextlib.contextmanager
def time_limit(seconds: int, hint: str) -> Iterator[None]:
    """Stop what takes longer, in the main thread of a system that has alarms; 0 for no limit.

    torch may be left in the middle of a trace: a process that was stopped should compile and export
    no more.

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
