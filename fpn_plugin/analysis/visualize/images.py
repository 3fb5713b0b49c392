"""Which images are shown: files, folders and patterns, or a registered dataset."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from fpn_plugin.analysis.pictures import choose
from fpn_plugin.registry import unknown_name

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def find_images(inputs: Sequence[str]) -> list[Path]:
    """The images that files, folders (not those below them) and patterns name, each once.

    Raises:
        FileNotFoundError: naming the input that is or has no image.
    """
    found: dict[Path, None] = {}
    for item in inputs:
        path = Path(item)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        else:
            matches = sorted(Path(match) for match in glob.glob(item, recursive=True))
            files = [match for match in matches if match.suffix.lower() in SUFFIXES]
        if not files:
            raise FileNotFoundError(
                f"--input {item!r}: no such image, or none in it ({', '.join(SUFFIXES)})"
            )
        found.update(dict.fromkeys(files))
    return list(found)


def dataset_records(name: str, num: int) -> list[dict[str, Any]]:
    """At most `num` images of a registered dataset, evenly spread, with their annotations.

    Raises:
        KeyError: if there is no such dataset.
        ValueError: if `num` is not positive.
    """
    if num < 1:
        raise ValueError(f"--num: {num} is not a number of images of 1 or more")
    if name not in DatasetCatalog.list():
        raise unknown_name("--dataset", name, DatasetCatalog.list())
    return choose(DatasetCatalog.get(name), num)


def records_of(paths: Sequence[Path], datasets: Sequence[str]) -> list[dict[str, Any]]:
    """A record for each file: that of a dataset which has the file, else one without annotations.

    Datasets whose files are not there are passed over: then nobody knows the truth.
    """
    known: dict[str, dict[str, Any]] = {}
    for name in datasets:
        try:
            records = DatasetCatalog.get(name)
        except (FileNotFoundError, KeyError):
            continue
        known.update({os.path.realpath(record["file_name"]): record for record in records})
    return [known.get(os.path.realpath(path), {"file_name": str(path)}) for path in paths]


def class_names(datasets: Sequence[str]) -> list[str]:
    """Of the first dataset that tells them."""
    for name in datasets:
        if names := MetadataCatalog.get(name).get("thing_classes"):
            return list(names)
    return []
