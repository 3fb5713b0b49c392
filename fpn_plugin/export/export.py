"""The work of `fpn export`: export a model, and verify the file at several sizes before it is
put in its place, with a JSON of what inference needs to know."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, List, Sequence

import torch
from detectron2.layers import DeformConv

from fpn_plugin.checkpoint.checkpointer import write_atomically
from fpn_plugin.export.errors import time_limit
from fpn_plugin.export.formats import FORMATS, INPUT, Format, Shape
from fpn_plugin.export.model import WHAT, ExportModel, export_backbone, export_detector
from fpn_plugin.export.verify import Difference, make_inputs, verify
from fpn_plugin.modeling.speed import Speed, prepare_for_inference
from fpn_plugin.pyramid.blocks import ModulatedConv
from fpn_plugin.registry import unknown_name
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.detector import load_detector, read_config

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
    opts: Sequence[str] = ()


def export(settings: Settings, bar: Bar) -> List[Difference]:
    """Write the file and its JSON.

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
    model = _build(settings, bar)
    shape, sizes = _shapes(settings, model)
    images = make_inputs(model, sizes, shape.batch, settings.inputs)
    part = settings.output.with_name(f".{settings.output.stem}.part{format.suffix}")
    try:
        bar.say(f"Exporting the {model.what} as {settings.format}")
        start = time.monotonic()
        with time_limit(settings.time_limit, "give --fixed-size HxW, or another --format"):
            how = format.write(model, shape, part)
        how = f"{how} in {time.monotonic() - start:.1f} s"
        bar.say(f"Comparing the file with the model at {len(images)} sizes")
        differences = verify(model, format.load(part), images)
        text = json.dumps(_info(settings, model, shape, how, differences), indent=2) + "\n"
        json_path(settings.output).unlink(missing_ok=True)  # the file never has another's JSON
        os.replace(part, settings.output)
    finally:
        part.unlink(missing_ok=True)
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
    present = [str(path) for path in (output, json_path(output)) if path.exists()]
    if present and not settings.overwrite:
        raise FileExistsError(f"--output: {', '.join(present)} exists; give --overwrite")
    if settings.batch < 0:
        raise ValueError(f"--batch: {settings.batch} is not 0 (any) or more")
    for path in settings.inputs:
        if not path.is_file():
            raise FileNotFoundError(
                f"--input {str(path)!r}: there is no such file (config overrides go before --input)"
            )
    format.require(settings.format)
    output.parent.mkdir(parents=True, exist_ok=True)
    return format


def _build(settings: Settings, bar: Bar) -> ExportModel:
    cfg = read_config(settings.config_file, settings.weights, settings.opts)
    cfg.MODEL.DEVICE = "cpu"
    for key in _FAST_PATHS:
        cfg.merge_from_list([key, False])
    bar.say(f"Loading {cfg.MODEL.WEIGHTS}")
    part = "backbone." if settings.what == "backbone" else ""
    model = load_detector(cfg, part, settings.allow_partial).model
    if cfg.TEST.FOLD_NORMS:
        model = prepare_for_inference(model, Speed(fold_norms=True))
    return (export_backbone if settings.what == "backbone" else export_detector)(cfg, model)


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
) -> dict[str, Any]:
    """The content of the JSON."""
    packages = ("torch", "torchvision", *FORMATS[settings.format].packages)
    return {
        "what": model.what,
        "format_of_file": settings.format,
        "how": how,
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
    }


def _is_deformable(network: torch.nn.Module) -> bool:
    """Whether a network uses torchvision's own operators."""
    return any(isinstance(x, (ModulatedConv, DeformConv)) for x in network.modules())
