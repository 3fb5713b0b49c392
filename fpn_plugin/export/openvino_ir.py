"""OpenVINO's files (an .xml with its weights in a .bin), made of ONNX: in float32, for bfloat16, or
quantised to 8-bit integers by NNCF.

The precision of what is not quantised is no part of OpenVINO's format: it is in the file's runtime
information, from which `load` and docs/examples/run_exported.py give it to the compiler.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, List, Sequence
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

PRECISIONS = ("float32", "bf16", "int8")
SUFFIX, WEIGHTS = ".xml", ".bin"
DEVICE = "CPU"
HINT_PATH = ["fpn_plugin", "inference_precision"]  # of the runtime information
_HINT = "INFERENCE_PRECISION_HINT"
# OpenVINO's name of the type that everything is computed in which is not quantised
_HINTS = {"float32": "f32", "bf16": "bf16", "int8": "f32"}
_CONVOLUTIONS = {"Convolution", "GroupConvolution", "ConvolutionBackpropData"}
_PRODUCTS = {*_CONVOLUTIONS, "MatMul"}
_MAPS = {"ROIAlign", "Relu"}
_KEPT = {*_PRODUCTS, "Constant", "Parameter", "Result"}
_BACKBONE = "/backbone/"  # in the names of a detector's operations that are the backbone's
_NOT_ZERO = 1e-30  # as a bias it changes nothing but exact zeros

Runner = Callable[[Tensor], List[Tensor]]  # images -> the outputs, in order, until the next call


@dataclass(frozen=True)
class Quantisation:
    """How a model becomes one of 8-bit integers.

    Attributes:
        images: to calibrate on; anything that `prepare` takes.
        prepare: makes the model's input of one of them.
        score: the quality, from 0 to 1, of a runner on some of `validation`; None for quantisation
            of everything, whatever that costs.
        validation: the images that `score` takes.
        max_drop: of the score.
    """

    images: Sequence[Any]
    prepare: Callable[[Any], np.ndarray]
    score: Callable[[Runner, Sequence[Any]], float] | None = None
    validation: Sequence[Any] = ()
    max_drop: float = 0.005


def check_precision(precision: str) -> None:
    """Check that this machine computes in a precision, as a file is run before it is kept.

    Raises:
        ValueError: for bf16 on a CPU without it.
    """
    import openvino

    known = openvino.Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in known:
        raise ValueError(
            f"--precision bf16: this CPU has no bfloat16 (OpenVINO: {', '.join(known)}), so that a"
            " file in it cannot be checked here; take float32 or int8"
        )


def write(onnx_file: Path, path: Path, precision: str, quantisation: Quantisation | None) -> str:
    """Write `path` and its weights of an ONNX file, and return how in a few words.

    Args:
        quantisation: for int8.

    Raises:
        ValueError: if OpenVINO or NNCF cannot follow the model.
    """
    import openvino

    try:
        model = openvino.convert_model(str(onnx_file))
        how = "by OpenVINO"
        if quantisation is not None:
            # read again without what ONNX leaves beside the graph: NNCF stumbles over it
            plain = str(onnx_file.with_suffix(SUFFIX))
            openvino.save_model(model, plain, compress_to_fp16=False)
            model = openvino.Core().read_model(plain)
            give_biases(model)
            model = _quantise(model, quantisation)
            how += f", quantised by NNCF on {len(quantisation.images)} images"
        model.set_rt_info(_HINTS[precision], HINT_PATH)
        openvino.save_model(model, str(path), compress_to_fp16=False)
        if precision == "bf16":
            _keep_precise(path, precise(model))
    except RuntimeError as error:  # NNCF's are of this type too
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"--format openvino --precision {precision}: OpenVINO cannot follow the model:"
            f" {reason}; take --format onnx"
        ) from error
    return how


def give_biases(model: Any) -> None:
    """Give every convolution a bias whose map is read more than once before anything is added.

    OpenVINO 2026.4 multiplies by the scale of the quantised weights once more for one of the
    readers: P6 of an FPN was zeros, and group norms mixed up their channels.
    """
    from openvino import opset13

    for node in model.get_ordered_ops():
        source = node.output(0)
        readers = list(source.get_target_inputs())
        if node.get_type_name() not in _CONVOLUTIONS or len(readers) < 2:
            continue
        shape = [1] * source.get_partial_shape().rank.get_length()
        shape[1] = source.get_partial_shape()[1].get_length()
        bias = opset13.constant(np.full(shape, _NOT_ZERO, np.float32))
        shifted = opset13.add(source, bias)
        for reader in readers:
            reader.replace_source_output(shifted.output(0))
        shifted.output(0).set_names(source.get_names())
        shifted.set_friendly_name(f"{node.get_friendly_name()}/bias")


def _quantise(model: Any, settings: Quantisation) -> Any:
    nncf = _import_nncf()
    options: dict[str, Any] = {
        "preset": nncf.QuantizationPreset.PERFORMANCE,
        "target_device": nncf.TargetDevice.CPU,
        "subset_size": len(settings.images),
        "ignored_scope": nncf.IgnoredScope(names=unquantised(model), validate=False),
    }
    if any(node.get_type_name() == "Softmax" for node in _of_backbone(model)):  # attention
        options["model_type"] = nncf.ModelType.TRANSFORMER
    calibration = nncf.Dataset(settings.images, settings.prepare)
    with _silent():
        if settings.score is None:
            return nncf.quantize(model, calibration, **options)
        score = settings.score  # for the function below
        return nncf.quantize_with_accuracy_control(
            model,
            calibration,
            nncf.Dataset(settings.validation),
            lambda compiled, images: (score(_runner(compiled), list(images)), None),
            max_drop=settings.max_drop,
            drop_type=nncf.DropType.ABSOLUTE,
            **options,
        )


def _keep_precise(path: Path, names: Sequence[str]) -> None:
    """Mark operations of a file as sensitive to their precision: OpenVINO leaves them in float32.

    Python has no function for this attribute, which OpenVINO reads from the file.
    """
    tree, chosen = ElementTree.parse(path), set(names)
    for layer in tree.getroot().iter("layer"):
        if layer.get("name") not in chosen:
            continue
        info = layer.find("rt_info")
        if info is None:
            info = ElementTree.Element("rt_info")
            layer.insert(0 if layer.find("data") is None else 1, info)
        ElementTree.SubElement(info, "attribute", {"name": "precise", "version": "0"})
    tree.write(path, encoding="utf-8", xml_declaration=True)


def unquantised(model: Any) -> list[str]:
    """The operations of a whole detector that stay as they are: all outside of the backbone but
    products. Coordinates of boxes do not survive eight bits, be they integers or bfloat16."""
    names = [node.get_friendly_name() for node in model.get_ops()]
    if not any(_BACKBONE in name for name in names):
        return []
    return [
        node.get_friendly_name()
        for node in model.get_ops()
        if _BACKBONE not in node.get_friendly_name() and node.get_type_name() not in _KEPT
    ]


def precise(model: Any) -> list[str]:
    """The operations of a detector for bfloat16 that stay in float32: those left unquantised but
    for two that work on maps, where they cost time and bring no accuracy."""
    on_maps = {
        node.get_friendly_name() for node in model.get_ops() if node.get_type_name() in _MAPS
    }
    return [name for name in unquantised(model) if name not in on_maps]


def _of_backbone(model: Any) -> list[Any]:
    """The operations of a detector's backbone, or of a model that is one."""
    nodes = list(model.get_ops())
    return [node for node in nodes if _BACKBONE in node.get_friendly_name()] or nodes


def _import_nncf() -> Any:
    """NNCF, which neither asks in the terminal whether it may report what it does, nor reports."""
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    logging.getLogger("nncf").setLevel(logging.WARNING)
    return nncf


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without NNCF's bars on standard output, which has the results alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def load(path: Path) -> Runner:
    """Make a file runnable."""
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    hint = model.get_rt_info(HINT_PATH).astype(str) if model.has_rt_info(HINT_PATH) else "f32"
    return _runner(core.compile_model(model, DEVICE, {_HINT: hint}))


def _runner(compiled: Any) -> Runner:
    """What runs a compiled model; its outputs are OpenVINO's own memory until the next call, as
    copying the maps of a pyramid takes 2% of the time."""

    def run(image: Tensor) -> List[Tensor]:
        results = compiled([image.numpy()], share_outputs=True)
        return [torch.from_numpy(results[output]) for output in compiled.outputs]

    return run
