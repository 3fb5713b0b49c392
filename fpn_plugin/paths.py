"""Where configs, data and weights live on disk, found as Detectron2 finds its own."""

from __future__ import annotations

import os
from pathlib import Path

import detectron2

_PACKAGE = Path(__file__).resolve().parent


def configs_dir() -> Path:
    """The folder of this plugin's configs: in the installed package, or of the checkout."""
    return _shipped("configs")


def makers_dir() -> Path:
    """The folder of the scripts that make the small datasets: `datasets/` of the checkout."""
    return _shipped("datasets")


def zoo_dir() -> Path:
    """The folder of Detectron2's configs, as its `model_zoo` finds it."""
    return Path(detectron2.__file__).resolve().parent / "model_zoo" / "configs"


def _shipped(folder: str) -> Path:
    """A folder that stands beside the package in a checkout, and that a wheel has inside of it."""
    installed = _PACKAGE / folder
    return installed if installed.is_dir() else _PACKAGE.parent / folder


def from_folder(path: str, folder: str = "") -> str:
    """A path relative to a folder as an absolute one; "" and URLs stay.

    Args:
        folder: "" for the current one.
    """
    if not path or "://" in path:
        return path
    return os.path.abspath(os.path.join(folder, os.path.expanduser(path)))


def dataset_root() -> Path:
    """The folder of all datasets: `$DETECTRON2_DATASETS`, or `datasets` in the current folder."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def download_advice(address: str, key: str, cache: str, variable: str) -> str:
    """What to do about weights that cannot be downloaded, in two lines.

    Args:
        key: the config key or option that takes the file.
        cache: where the file would be; "" if it is not known.
        variable: the environment variable that moves that folder.
    """
    by_hand = f"Download {address} elsewhere and give the path of the file as {key}"
    if not cache:
        return by_hand
    return f"{by_hand},\nor put it where it is found without a network: {cache} (${variable})"


def find_file(path: str, key: str) -> Path:
    """A file that a config names: the path as it is, or below `dataset_root`.

    Args:
        key: the config key, for the error message.

    Raises:
        FileNotFoundError: naming the key and the places that were looked at.
    """
    expanded = Path(os.path.expanduser(path))
    places = dict.fromkeys([expanded, dataset_root() / expanded])  # one if it is absolute
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"{key}: there is no file {path!r}; looked at {' and '.join(map(str, places))}"
        " (weights/tf_efficientnet_lite0.pth is made by `fpn demo trees --data-only`)"
    )
