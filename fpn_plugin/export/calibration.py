"""The images that a quantisation is calibrated on, as the exported model takes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, List, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import ImageList

from fpn_plugin.data.coco_format import needed_splits, register_own
from fpn_plugin.data.mapper import Mapper
from fpn_plugin.export.model import ExportModel
from fpn_plugin.export.verify import read_resized
from fpn_plugin.visualize.images import all_records, find_images, spread

CALIBRATE, CALIBRATE_NUM = "--calibrate", "--calibrate-num"


def calibration_records(sources: Sequence[str], num: int, cfg: CfgNode) -> List[dict[str, Any]]:
    """At most `num` images, evenly spread, of registered datasets, files, folders and patterns.

    Raises:
        FileNotFoundError: naming the source that is or has no image, and is no dataset.
        ValueError: if `num` is not positive.
    """
    if num < 1:
        raise ValueError(f"{CALIBRATE_NUM}: {num} is not a number of images of 1 or more")
    records: List[dict[str, Any]] = []
    for source in sources:
        if source in DatasetCatalog.list() or needed_splits(source):
            register_own(cfg.clone(), needed=needed_splits(source))
            records += all_records(source, CALIBRATE)
            continue
        try:
            records += [{"file_name": str(path)} for path in find_images([source])]
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{CALIBRATE} {source!r}: no registered dataset, no image, and no folder or pattern"
                " with images"
            ) from None
    return [{"file_name": record["file_name"]} for record in spread(records, num)]


def prepare_record(
    record: dict[str, Any],
    mapper: Mapper,
    model: ExportModel,
    fixed_size: Sequence[int] | None,
    batch: int,
) -> np.ndarray:
    """What a model takes of an image: resized as in an evaluation, or to the only size that it
    takes; of a backbone normalised and padded."""
    if fixed_size is not None:
        size = (fixed_size[0], fixed_size[1])
        pixels = read_resized(Path(record["file_name"]), size, model.info, CALIBRATE)
    else:
        pixels = torch.as_tensor(mapper(dict(record))["image"]).float()
    if model.what == "detector":
        return pixels.numpy()
    image = model.normalise(pixels[None])
    if fixed_size is None:
        image = _padded(image, model)
    return image.expand(max(batch, 1), *image.shape[1:]).numpy()


def _padded(image: torch.Tensor, model: ExportModel) -> torch.Tensor:
    """A normalised image `(1, C, H, W)` with zeros below and to the right, as inference pads it."""
    info = model.info
    unit = math.lcm(max(info["size_divisibility"], 1), model.step)
    square = {"square_size": info["square_size"]}
    (image,) = ImageList.from_tensors([image[0]], unit, padding_constraints=square).tensor
    wanted = [max(side, -(-model.least // unit) * unit) for side in image.shape[1:]]
    return F.pad(image, (0, wanted[1] - image.shape[2], 0, wanted[0] - image.shape[1]))[None]
