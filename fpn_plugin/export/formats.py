"""FORMATS: how a model becomes a file, and how the file is run. Every runner takes images and gives
the outputs in order."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, List, Mapping, Sequence

import torch
from torch import Tensor, nn

from fpn_plugin.export.refuse import (
    operations_of_program,
    operations_of_trace,
    refuse_detector,
    refuse_onnx,
    refuse_program,
    refuse_windows,
)
from fpn_plugin.export.same import with_integer_padding
from fpn_plugin.export.subject import BATCH, Subject

OPSET = 20  # GridSample; DeformConv is of 19
TRACED_OPSET = 17  # RoiAlign as Detectron2 has it is of 16
INPUT = "image"
_LARGEST = 2**31  # bytes: one ONNX file holds no more

logger = logging.getLogger(__name__)
Runner = Callable[[Tensor], List[Tensor]]


@dataclass(frozen=True)
class Shape:
    """What stays fixed in the file.

    Attributes:
        size: of the image, `(H, W)`; None for any.
        batch: 0 for any.
        example: a size to export with.
    """

    size: tuple[int, int] | None
    batch: int
    example: tuple[int, int]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: what its files end in.
        packages: what it needs beside torch.
        write: puts a subject into a file, and says how in a word.
        load: the file as something to run.
    """

    suffix: str
    packages: Sequence[str]
    write: Callable[[Subject, Shape, Path], str]
    load: Callable[[Path], Runner]

    def require(self, name: str) -> None:
        """See that its packages are there.

        Raises:
            ImportError: naming the format and what to install.
        """
        missing = [item for item in self.packages if importlib.util.find_spec(item) is None]
        if missing:
            raise ImportError(
                f"--format {name} needs {', '.join(missing)}: pip install 'fpn_plugin[export]'"
            )


def write_torchscript(subject: Subject, shape: Shape, path: Path) -> str:
    """Scripted where TorchScript can compile the network, which keeps every size; else traced.

    Raises:
        ValueError: for attention in windows at any size, if it must be traced.
    """
    scripted = _script(subject.module) if subject.what == "backbone" else None
    if not scripted and shape.size is None and subject.windowed:
        raise refuse_windows("torchscript", subject.windowed)
    made = scripted or _trace(subject, shape)
    made.save(str(path))
    return "scripted" if scripted else "traced"


def _script(network: nn.Module) -> torch.jit.ScriptModule | None:
    """The network compiled, or None where TorchScript cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.jit.script(network)
        except Exception as error:  # of many types, for whatever it cannot compile
            logger.info("Traced, as TorchScript cannot compile it: %s", str(error)[:300])
            return None


def _trace(subject: Subject, shape: Shape) -> torch.jit.ScriptModule:
    image = subject.example(shape.example, shape.batch or BATCH)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.jit.trace(subject.module, (image,), strict=False, check_trace=False)


def load_torchscript(path: Path) -> Runner:
    return _flat(torch.jit.load(str(path)))


def write_torch_export(subject: Subject, shape: Shape, path: Path) -> str:
    torch.export.save(export_program(subject, shape, "torch_export"), path)
    return "by torch.export"


def load_torch_export(path: Path) -> Runner:
    return _flat(torch.export.load(path).module())


def write_onnx(subject: Subject, shape: Shape, path: Path) -> str:
    """By way of `torch.export`, so an operator is refused by the name of the node that has it.

    Raises:
        ValueError: naming the nodes whose operators ONNX has no counterpart for.
    """
    if sum(p.numel() * p.element_size() for p in subject.module.parameters()) > _LARGEST:
        raise ValueError("--format onnx: the weights take more than 2 GB, which no ONNX file holds")
    if subject.what == "detector":
        return _trace_to_onnx(subject, shape, path)
    program = export_program(subject, shape, "onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                dynamic_shapes=_dynamic(subject, shape),
                input_names=[INPUT],
                output_names=list(subject.outputs),
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:  # of many types, by the stage that failed
            raise refuse_onnx(error, operations_of_program(program)) from error
    for node in made.model.graph:  # a third of the file, with the paths of this machine
        for key in ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node"):
            node.metadata_props.pop(key, None)
    made.save(str(path), external_data=False)
    return f"by torch.onnx, opset {OPSET}"


def _trace_to_onnx(subject: Subject, shape: Shape, path: Path) -> str:
    """By a trace, as Detectron2 exports: torch.export cannot follow its heads."""
    axes = {INPUT: {1: "height", 2: "width"}, **{name: {0: "found"} for name in subject.outputs}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                subject.module,
                (subject.example(shape.example, 1),),
                str(path),
                dynamo=False,
                input_names=[INPUT],
                output_names=list(subject.outputs),
                dynamic_axes=axes,
                opset_version=TRACED_OPSET,
            )
        except Exception as error:  # of many types, by the stage that failed
            operations = operations_of_trace(_trace(subject, shape))
            raise refuse_onnx(error, operations) from error
    return f"by torch.onnx from a trace, opset {TRACED_OPSET}"


def load_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: [torch.from_numpy(y) for y in session.run(None, {name: image.numpy()})]


def export_program(subject: Subject, shape: Shape, name: str) -> Any:
    """`torch.export`'s program.

    Raises:
        ValueError: for a whole detector; for attention in windows at any size; for what
            torch.export cannot follow.
    """
    if subject.what == "detector":
        raise refuse_detector(name)
    if shape.size is None and subject.windowed:
        raise refuse_windows(name, subject.windowed)
    image = subject.example(shape.example, shape.batch or BATCH)
    sizes = _dynamic(subject, shape)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            network = with_integer_padding(subject.module)
            return torch.export.export(network, (image,), dynamic_shapes=sizes, strict=False)
        except Exception as error:  # of many types, for whatever it cannot follow
            raise refuse_program(name, error, shape.size is None) from error


def _dynamic(subject: Subject, shape: Shape) -> tuple[Mapping[int, Any], ...]:
    """The sizes that may differ, for `torch.export`."""
    dim = torch.export.Dim
    found: dict[int, Any] = {}
    if not shape.batch:
        found[0] = dim("batch", min=1, max=1024)
    if shape.size is None:
        least = -(-subject.least // subject.step)
        for axis, name in ((2, "height"), (3, "width")):
            side = dim(name, min=least, max=16384 // subject.step)
            found[axis] = side if subject.step == 1 else subject.step * side
    return (found,)


def _flat(module: Any) -> Runner:
    def run(image: Tensor) -> List[Tensor]:
        with torch.no_grad():
            given = module(image)
        return list(given.values()) if isinstance(given, Mapping) else list(given)

    return run


FORMATS = {
    "torchscript": Format(".ts", (), write_torchscript, load_torchscript),
    "torch_export": Format(".pt2", (), write_torch_export, load_torch_export),
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), write_onnx, load_onnx),
}
