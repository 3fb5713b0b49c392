"""FORMATS: how a model becomes a file, and how such a file is run."""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, List, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_plugin.compat import EXPORT, TRACED_ONNX, require_torch
from fpn_plugin.export import openvino_ir
from fpn_plugin.export.errors import (
    detector_error,
    onnx_error,
    operations_of_program,
    operations_of_trace,
    program_error,
    window_error,
)
from fpn_plugin.export.model import BATCH, ExportModel
from fpn_plugin.export.openvino_ir import Quantisation, Runner

OPSET = 20  # for GridSample; DeformConv needs 19
TRACED_OPSET = 17  # RoiAlign as in Detectron2 needs 16
# what torch.onnx writes: from a program of torch.export, and from a trace
OPSETS = {"backbone": (18, 19, 20), "detector": (17, 18, 19, 20)}
INPUT = "image"
_MAX_ONNX_BYTES = 2**31

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """The input that a file takes.

    Attributes:
        size: the only `(H, W)` that it takes; None for any.
        batch: the only batch size that it takes; 0 for any.
        example: the size to export with.
    """

    size: tuple[int, int] | None
    batch: int
    example: tuple[int, int]


@dataclass(frozen=True)
class Options:
    """What some formats can be told.

    Attributes:
        opset: of ONNX; 0 for the one that holds all operators.
        precision: of OpenVINO.
        quantisation: for int8.
    """

    opset: int = 0
    precision: str = "float32"
    quantisation: Quantisation | None = None


DEFAULTS = Options()


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        suffix: the suffix of its files.
        packages: the packages that it needs beside torch.
        write: writes a model to a file, and returns how in a few words.
        load: makes a file runnable.
        extra: the extra of setup.py that has the packages.
        more: suffixes of files that belong to it.
    """

    suffix: str
    packages: Sequence[str]
    write: Callable[..., str]  # of (ExportModel, Shape, Path, Options)
    load: Callable[[Path], Runner]
    extra: str = "export"
    more: Sequence[str] = ()

    def require(self, name: str, *others: str) -> None:
        """Check that its packages are installed.

        Args:
            others: packages that are needed too.

        Raises:
            ImportError: naming the format and what to install.
        """
        packages = (*self.packages, *others)
        missing = [package for package in packages if not importlib.util.find_spec(package)]
        if missing:
            raise ImportError(
                f"--format {name} needs {', '.join(missing)}: pip install"
                f" 'fpn_plugin[{self.extra}]'"
            )


def write_torchscript(
    model: ExportModel, shape: Shape, path: Path, options: Options = DEFAULTS
) -> str:
    """Script the network if TorchScript can compile it, which keeps every size; else trace it.

    Raises:
        ValueError: for attention in windows at any size, if it must be traced.
    """
    scripted = _script(model.module) if model.what == "backbone" else None
    if not scripted and shape.size is None and model.windowed:
        raise window_error("torchscript", model.windowed)
    (scripted or _trace(model, shape)).save(str(path))
    return "scripted" if scripted else "traced"


def _script(network: nn.Module) -> torch.jit.ScriptModule | None:
    """The network as TorchScript, or None if that cannot compile it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.jit.script(network)
        except Exception as error:  # many types, depending on what it cannot compile
            logger.info("Traced, as TorchScript cannot compile it: %s", str(error)[:300])
            return None


def _trace(model: ExportModel, shape: Shape) -> torch.jit.ScriptModule:
    image = model.example(shape.example, shape.batch or BATCH)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model.module, (image,), strict=False, check_trace=False)


def load_torchscript(path: Path) -> Runner:
    return _flat(torch.jit.load(str(path)))


def write_torch_export(
    model: ExportModel, shape: Shape, path: Path, options: Options = DEFAULTS
) -> str:
    torch.export.save(export_program(model, shape, "torch_export"), path)
    return "by torch.export"


def load_torch_export(path: Path) -> Runner:
    return _flat(torch.export.load(path).module())


def write_onnx(
    model: ExportModel, shape: Shape, path: Path, options: Options = DEFAULTS, name: str = "onnx"
) -> str:
    """Export by `torch.export`, so that errors can name the node of an operator.

    Args:
        name: of the format, for messages.

    Raises:
        ValueError: naming the nodes whose operators have no counterpart in ONNX.
    """
    if sum(p.numel() * p.element_size() for p in model.module.parameters()) > _MAX_ONNX_BYTES:
        raise ValueError(
            f"--format {name}: the weights take more than 2 GB, which no ONNX file holds"
        )
    if model.what == "detector":
        return _trace_to_onnx(model, shape, path, options.opset or TRACED_OPSET, name)
    program, opset = export_program(model, shape, name), options.opset or OPSET
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                dynamic_shapes=_dynamic(model, shape),
                input_names=[INPUT],
                output_names=list(model.outputs),
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:  # many types, depending on the stage that failed
            raise onnx_error(error, operations_of_program(program), name) from error
    for node in exported.model.graph:  # a third of the file, with paths of this machine
        for key in ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node"):
            node.metadata_props.pop(key, None)
    exported.save(str(path), external_data=False)
    return f"by torch.onnx, opset {opset}"


def _trace_to_onnx(model: ExportModel, shape: Shape, path: Path, opset: int, format: str) -> str:
    """Export by tracing, as Detectron2 does: torch.export cannot follow its heads."""
    axes = {INPUT: {1: "height", 2: "width"}, **{name: {0: "found"} for name in model.outputs}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model.module,
                (model.example(shape.example, 1),),
                str(path),
                **TRACED_ONNX,
                input_names=[INPUT],
                output_names=list(model.outputs),
                dynamic_axes=axes,
                opset_version=opset,
            )
        except Exception as error:  # many types, depending on the stage that failed
            operations = operations_of_trace(_trace(model, shape))
            raise onnx_error(error, operations, format) from error
    return f"by torch.onnx from a trace, opset {opset}"


def load_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: [torch.from_numpy(y) for y in session.run(None, {name: image.numpy()})]


def write_openvino(
    model: ExportModel, shape: Shape, path: Path, options: Options = DEFAULTS
) -> str:
    """Export to ONNX, and let OpenVINO read that.

    Raises:
        ValueError: as :func:`write_onnx`; or if OpenVINO or NNCF cannot follow the model.
    """
    with tempfile.TemporaryDirectory(prefix=".onnx", dir=path.parent) as folder:
        onnx_file = Path(folder, "model.onnx")
        how = write_onnx(model, shape, onnx_file, name="openvino")
        more = openvino_ir.write(onnx_file, path, options.precision, options.quantisation)
    return f"{how}, {more}"


def export_program(model: ExportModel, shape: Shape, name: str) -> Any:
    """The program of `torch.export`.

    Raises:
        ValueError: for a whole detector; for attention in windows at any size; for what
            torch.export cannot follow.
    """
    if model.what == "detector":
        raise detector_error(name)
    if shape.size is None and model.windowed:
        raise window_error(name, model.windowed)
    require_torch(EXPORT, f"--format {name}", "take --format torchscript")
    image = model.example(shape.example, shape.batch or BATCH)
    sizes = _dynamic(model, shape)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            network = with_integer_padding(model.module)
            return torch.export.export(network, (image,), dynamic_shapes=sizes, strict=False)
        except Exception as error:  # many types, depending on what it cannot follow
            raise program_error(name, error, shape.size is None) from error


def _dynamic(model: ExportModel, shape: Shape) -> tuple[Mapping[int, Any], ...]:
    """The dimensions that may vary, for `torch.export`."""
    dim = torch.export.Dim
    dimensions: dict[int, Any] = {}
    if not shape.batch:
        dimensions[0] = dim("batch", min=1, max=1024)
    if shape.size is None:
        least = -(-model.least // model.step)
        for axis, name in ((2, "height"), (3, "width")):
            side = dim(name, min=least, max=16384 // model.step)
            dimensions[axis] = side if model.step == 1 else model.step * side
    return (dimensions,)


class IntegerPaddedConv(nn.Module):
    """timm's `Conv2dSame`, which pads as TensorFlow does for "same", with integer arithmetic.

    The values are the same. timm divides floats and rounds up, which takes torch.export minutes to
    analyse and cannot be saved.
    """

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        padding: list[Any] = []
        for side, kernel, stride, dilation in zip(
            x.shape[-2:], conv.kernel_size, conv.stride, conv.dilation
        ):
            # up to a multiple of the stride, and by what the last window exceeds it
            total = (kernel - 1) * dilation + 1 - stride + -side % stride
            padding = [total // 2, total - total // 2, *padding]  # F.pad begins with the last axis
        x = F.pad(x, padding)
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, (0, 0), conv.dilation, conv.groups)


def with_integer_padding(network: nn.Module) -> nn.Module:
    """A copy of the network with `IntegerPaddedConv`; the network itself if it needs none."""
    names = [name for name, module in network.named_modules() if _is_same_conv(module)]
    if not names:
        return network
    network = copy.deepcopy(network)
    for name in names:
        parent, _, child = name.rpartition(".")
        conv = IntegerPaddedConv(network.get_submodule(name))
        setattr(network.get_submodule(parent), child, conv)
    return network


def _is_same_conv(module: nn.Module) -> bool:
    """Whether it is timm's `Conv2dSame`, with a kernel at least as large as its stride."""
    if type(module).__name__ != "Conv2dSame":
        return False
    kernels, strides = module.kernel_size, module.stride
    return all(kernel >= stride for kernel, stride in zip(kernels, strides))  # type: ignore


def _flat(module: Any) -> Runner:
    def run(image: Tensor) -> List[Tensor]:
        with torch.no_grad():
            outputs = module(image)
        return list(outputs.values()) if isinstance(outputs, Mapping) else list(outputs)

    return run


FORMATS = {
    "torchscript": Format(".ts", (), write_torchscript, load_torchscript),
    "torch_export": Format(".pt2", (), write_torch_export, load_torch_export),
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), write_onnx, load_onnx),
    "openvino": Format(
        openvino_ir.SUFFIX,
        ("onnx", "onnxscript", "openvino"),
        write_openvino,
        openvino_ir.load,
        extra="deploy",
        more=(openvino_ir.WEIGHTS,),
    ),
}
