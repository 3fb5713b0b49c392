"""The work of `fpn export`: export a model, and verify the file at several sizes before it is
put in its place, with a JSON of what inference needs to know."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, List, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import DeformConv

from fpn_plugin.checkpoint.checkpointer import write_atomically
from fpn_plugin.export import tensorrt
from fpn_plugin.export.accuracy import EVALUATE, MAX_DROP, Evaluation, Judge
from fpn_plugin.export.calibration import CALIBRATE, calibration_records, prepare_record
from fpn_plugin.export.errors import time_limit
from fpn_plugin.export.formats import FORMATS, INPUT, OPSETS, Format, Options, Shape
from fpn_plugin.export.model import WHAT, ExportModel, export_backbone, export_detector
from fpn_plugin.export.openvino_ir import PRECISIONS, Quantisation, check_precision
from fpn_plugin.export.verify import Difference, make_inputs, verify
from fpn_plugin.modeling.speed import Speed, prepare_for_inference
from fpn_plugin.pyramid.blocks import ModulatedKernel
from fpn_plugin.registry import unknown_name
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.detector import Detector, load_detector, read_config
from fpn_plugin.visualize.test_data import read_test_data

# keys that make a model faster in ways that exporters cannot follow, with the same results
_FAST_PATHS = ("MODEL.CHANNELS_LAST", "MODEL.FAST_ROI_ALIGN")


@dataclass(frozen=True)
class Settings:
    """What to export.

    Attributes:
        config_file: of the model.
        format: a name of `FORMATS`.
        output: the file; the JSON's name is it and `.json`.
        weights: a checkpoint; "" for `MODEL.WEIGHTS`.
        what: one of `WHAT`.
        sizes: `HxW,HxW,…`, on which the file is compared; "" for three that suit the strides.
        fixed_size: `HxW`, the only one that the file takes; "" for any.
        batch: the only one that a backbone's file takes; 0 for any, or 1 with `fixed_size`.
        inputs: photos to compare on; none for random images.
        time_limit: of the export, in seconds; 0 for none.
        overwrite: whether a file that is there may be replaced.
        allow_partial: whether the checkpoint may lack weights of the model, or have others.
        opset: of ONNX; 0 for the format's own.
        precision: of OpenVINO, one of `PRECISIONS`.
        calibrate: datasets, images, folders and patterns that int8 is calibrated on.
        calibrate_num: at most so many of them.
        evaluate: a dataset on which AP of the file is measured beside the model's; "" for none.
        max_drop: the file is refused if its AP is lower than the model's by more.
        accuracy_aware: whether int8 leaves parts as they are until AP is within `max_drop`.
        opts: `KEY VALUE` pairs for the config.
    """

    config_file: str
    format: str
    output: Path
    weights: str = ""
    what: str = "backbone"
    sizes: str = ""
    fixed_size: str = ""
    batch: int = 0
    inputs: Sequence[Path] = ()
    time_limit: int = 900
    overwrite: bool = False
    allow_partial: bool = False
    opset: int = 0
    precision: str = "float32"
    calibrate: Sequence[str] = ()
    calibrate_num: int = 128
    evaluate: str = ""
    max_drop: float = 0.5
    accuracy_aware: bool = False
    opts: Sequence[str] = ()


def export(
    settings: Settings, bar: Bar, show: Callable[[str], object] = lambda line: None
) -> List[Difference]:
    """Write the file and its JSON.

    Args:
        show: is given a line about the file's AP, and others that are results.

    Returns:
        the differences between the file and the eager model, per size.

    Raises:
        FileExistsError: if the file is there already, unless `overwrite`.
        ImportError: for a format whose packages are missing.
        ValueError: (KeyError, FileNotFoundError) for a bad argument; naming what cannot be
            exported; or if the file does not compute what the model computes. Nothing is written.
        TimeoutError: if the export takes longer than `time_limit`.
    """
    format = _check(settings)
    detector = _load(settings, bar)
    model = _exported_part(settings, detector)
    shape, sizes = _shapes(settings, model)
    judge = _judge(settings, shape, detector, model, bar)
    records = _calibration(settings, detector.cfg)
    photos = settings.inputs or [Path(record["file_name"]) for record in records]
    images = make_inputs(model, sizes, shape.batch, photos)
    quantisation = _quantisation(settings, shape, detector, model, records, judge)
    options = Options(settings.opset, settings.precision, quantisation)
    part = settings.output.with_name(f".{settings.output.stem}.part{format.suffix}")
    try:
        bar.say(f"Exporting the {model.what} as {settings.format}{_named(settings)}")
        start = time.monotonic()
        hint = "give --fixed-size HxW, or another --format"
        if settings.accuracy_aware:
            hint = "--accuracy-aware evaluates again and again: give more, 0 for no limit"
        with time_limit(settings.time_limit, hint):
            how = format.write(model, shape, part, options)
        how = f"{how} in {time.monotonic() - start:.1f} s"
        bar.say(f"Comparing the file with the model at {len(images)} sizes")
        run = format.load(part)
        differences = verify(model, run, images, settings.precision)
        evaluation = judge.compare(run) if judge else None
        bar.end()
        if evaluation:
            show(str(evaluation))
            _check_drop(settings, evaluation)
        info = _info(settings, model, shape, how, differences, evaluation)
        if settings.format == "onnx":
            info["tensorrt"] = {"list": tensorrt.LIST, "unsupported": tensorrt.unsupported(part)}
        text = json.dumps(info, indent=2) + "\n"
        json_path(settings.output).unlink(missing_ok=True)  # the file never has another's JSON
        for suffix in (*format.more, format.suffix):
            os.replace(part.with_suffix(suffix), settings.output.with_suffix(suffix))
    finally:
        for suffix in (*format.more, format.suffix):
            part.with_suffix(suffix).unlink(missing_ok=True)
    write_atomically(json_path(settings.output), lambda file: file.write(text.encode()))
    return differences


def json_path(output: Path) -> Path:
    """The path of the JSON beside an exported file."""
    return output.with_name(output.name + ".json")


def _check(settings: Settings) -> Format:
    """The format, after a check of the arguments."""
    if settings.format not in FORMATS:
        raise unknown_name("--format", settings.format, FORMATS)
    if settings.what not in WHAT:
        raise unknown_name("--what", settings.what, WHAT)
    format, output = FORMATS[settings.format], settings.output
    if output.suffix != format.suffix:
        raise ValueError(
            f"--output {str(output)!r}: files of --format {settings.format} end in {format.suffix}"
        )
    files = [output, *map(output.with_suffix, format.more), json_path(output)]
    present = [str(path) for path in files if path.exists()]
    if present and not settings.overwrite:
        raise FileExistsError(f"--output: {', '.join(present)} exists; give --overwrite")
    if settings.batch < 0:
        raise ValueError(f"--batch: {settings.batch} is not 0 (any) or more")
    for path in settings.inputs:
        if not path.is_file():
            raise FileNotFoundError(
                f"--input {str(path)!r}: there is no such file (config overrides go before --input)"
            )
    _check_precision(settings)
    format.require(settings.format, *(["nncf"] if settings.precision == "int8" else []))
    if settings.format == "openvino":
        check_precision(settings.precision)
    output.parent.mkdir(parents=True, exist_ok=True)
    return format


def _check_precision(settings: Settings) -> None:
    """Check --opset, --precision, and what goes with int8."""
    choices = OPSETS[settings.what]
    if settings.opset and settings.format != "onnx":
        raise ValueError(f"--opset {settings.opset}: --format {settings.format} has none")
    if settings.opset and settings.opset not in choices:
        raise ValueError(f"--opset: {settings.opset} is not one of {', '.join(map(str, choices))}")
    if settings.precision not in PRECISIONS:
        raise unknown_name("--precision", settings.precision, PRECISIONS)
    if settings.precision != "float32" and settings.format != "openvino":
        raise ValueError(
            f"--precision {settings.precision}: --format {settings.format} has float32 alone; take"
            " --format openvino"
        )
    integers = settings.precision == "int8"
    if integers and not settings.calibrate:
        raise ValueError(
            f"--precision int8: name training images to calibrate on by {CALIBRATE}: a dataset,"
            " images, folders or patterns"
        )
    if settings.calibrate and not integers:
        raise ValueError(f"{CALIBRATE} is for --precision int8, not {settings.precision}")
    if settings.accuracy_aware and not (integers and settings.evaluate):
        raise ValueError(f"--accuracy-aware needs --precision int8 and {EVALUATE} DATASET")
    if not (math.isfinite(settings.max_drop) and settings.max_drop >= 0):
        raise ValueError(f"{MAX_DROP}: {settings.max_drop} is not a number of AP of 0 or more")


def _load(settings: Settings, bar: Bar) -> Detector:
    """The detector, with its norms folded if the config says so."""
    cfg = read_config(settings.config_file, settings.weights, settings.opts)
    cfg.MODEL.DEVICE = "cpu"
    for key in _FAST_PATHS:
        cfg.merge_from_list([key, False])
    bar.say(f"Loading {cfg.MODEL.WEIGHTS}")
    part = "backbone." if settings.what == "backbone" and not settings.evaluate else ""
    detector = load_detector(cfg, part, settings.allow_partial)
    if cfg.TEST.FOLD_NORMS:
        folded = prepare_for_inference(detector.model, Speed(fold_norms=True))
        detector = replace(detector, model=folded)
    return detector


def _exported_part(settings: Settings, detector: Detector) -> ExportModel:
    describe = export_backbone if settings.what == "backbone" else export_detector
    return describe(detector.cfg, detector.model)


def _judge(
    settings: Settings, shape: Shape, detector: Detector, model: ExportModel, bar: Bar
) -> Judge | None:
    """What measures AP; None without --evaluate."""
    if not settings.evaluate:
        return None
    if shape.size is not None or shape.batch > 1:
        raise ValueError(
            f"{EVALUATE} {settings.evaluate}: a test set has images of other sizes than"
            " --fixed-size, and one image at a time: leave --fixed-size and --batch out"
        )
    cfg = detector.cfg
    data = read_test_data(settings.evaluate, None, [cfg], cfg.MODEL.WEIGHTS, EVALUATE)
    return Judge(detector, model, data, bar)


def _calibration(settings: Settings, cfg: CfgNode) -> list[dict[str, Any]]:
    """The records of the images of --calibrate."""
    if not settings.calibrate:
        return []
    return calibration_records(settings.calibrate, settings.calibrate_num, cfg)


def _quantisation(
    settings: Settings,
    shape: Shape,
    detector: Detector,
    model: ExportModel,
    records: Sequence[dict[str, Any]],
    judge: Judge | None,
) -> Quantisation | None:
    if settings.precision != "int8":
        return None

    def prepare(record: dict[str, Any]) -> Any:
        return prepare_record(record, detector.mapper, model, shape.size, shape.batch)

    if judge is None or not settings.accuracy_aware:
        return Quantisation(records, prepare)
    drop = settings.max_drop / 100
    return Quantisation(records, prepare, judge.score, judge.data.records, drop)


def _named(settings: Settings) -> str:
    return "" if settings.precision == "float32" else f" in {settings.precision}"


def _check_drop(settings: Settings, evaluation: Evaluation) -> None:
    """Refuse a file whose AP is too much below the model's."""
    drops = evaluation.drops()
    if max(drops.values()) > settings.max_drop:
        advice = {
            "int8": "give --accuracy-aware, more images by --calibrate, or take --precision bf16",
            "bf16": "take --precision float32",
        }
        raise ValueError(
            f"{MAX_DROP} {settings.max_drop:g}: the file's AP is lower by"
            f" {max(drops.values()):.2f} ({evaluation}). Nothing was written;"
            f" {advice.get(settings.precision, 'export again')}"
        )


def _shapes(settings: Settings, model: ExportModel) -> tuple[Shape, list[tuple[int, int]]]:
    """The input that the file takes, and the sizes to verify it at."""
    fixed = _size(settings.fixed_size, "--fixed-size", model) if settings.fixed_size else None
    if fixed and settings.sizes:
        raise ValueError("--sizes: with --fixed-size there is one size; leave one of the two out")
    if fixed and model.what == "detector":
        raise ValueError("--fixed-size: a detector's file takes any size; leave it out")
    if settings.batch and model.what == "detector":
        raise ValueError("--batch: a detector's file takes one image at a time; leave it out")
    texts = settings.sizes.split(",") if settings.sizes else []
    sizes = [_size(text, "--sizes", model) for text in texts] or default_sizes(model)
    sizes = [fixed] * 3 if fixed else sizes
    batch = settings.batch or (1 if fixed else 0)
    return Shape(fixed, batch, sizes[0]), sizes


def _size(text: str, flag: str, model: ExportModel) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"{flag}: {text!r} is not HxW, such as 320x416")
    size = (int(match[1]), int(match[2]))
    if any(side % model.step for side in size):
        raise ValueError(f"{flag}: {text}: the network takes sides divisible by {model.step}")
    if flag == "--sizes" and min(size) < model.least:
        raise ValueError(f"{flag}: {text}: sides below {model.least} pixels are too small")
    return size


def default_sizes(model: ExportModel) -> list[tuple[int, int]]:
    """Three sizes of different aspect ratios: two that need no padding, and an odd one if the model
    takes any size."""
    unit = math.lcm(model.step, model.info["size_divisibility"] or 32)
    side = -(-max(256, model.least) // unit) * unit
    last = (side + unit, side + 3 * unit) if model.step > 1 else (side + 45, side + unit - 11)
    return [(side, side + unit), (side + 2 * unit, side), last]


def _info(
    settings: Settings,
    model: ExportModel,
    shape: Shape,
    how: str,
    differences: Sequence[Difference],
    evaluation: Evaluation | None,
) -> dict[str, Any]:
    """The content of the JSON."""
    packages = ["torch", "torchvision", *FORMATS[settings.format].packages]
    packages += ["nncf"] if settings.precision == "int8" else []
    return {
        "what": model.what,
        "format_of_file": settings.format,
        "how": how,
        "precision": settings.precision,
        "input": INPUT,
        "outputs": list(model.outputs),
        **model.info,
        "step": model.step,
        "smallest_side": model.least,
        "fixed_size": shape.size,
        "batch": shape.batch if model.what == "backbone" else 1,
        "torchvision": model.what == "detector" or _is_deformable(model.module),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "compared": [asdict(difference) for difference in differences],
        "evaluated": asdict(evaluation) if evaluation else None,
    }


def _is_deformable(network: torch.nn.Module) -> bool:
    """Whether a network uses torchvision's own operators."""
    return any(isinstance(x, (ModulatedKernel, DeformConv)) for x in network.modules())
