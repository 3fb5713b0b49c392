"""Reading weight files: names with tensors, whatever wrote the file, and no code of it runs."""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path
from typing import Any, Mapping, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpn_plugin.paths import find_file
from fpn_plugin.plain_files import is_torch_file, read_plain

KEY = "MODEL.BOTTOM_UP.WEIGHTS"

# Where libraries put a state dict. Averaged weights (timm's, torchvision's) go before the raw ones,
# as timm takes them. MMEngine swaps the two when it saves: its averaged ones are in `state_dict`
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "model",
    "state_dict",
    "model_state",
    "model_state_dict",
    "module",
    "ema_state_dict",
    "teacher",
)


class WeightFile(NamedTuple):
    """What of a weight file counts.

    Attributes:
        tensors: by name.
        author: where the weights come from, in files of Detectron2's format ("torchvision",
            "Caffe2", ...); "" where nothing says so.
    """

    tensors: dict[str, Tensor]
    author: str


def read_state_dict(path: str, key: str = KEY) -> dict[str, Tensor]:
    """The tensors of a weight file by name: see :func:`read_weights`."""
    return read_weights(path, key).tensors


def read_weights(path: str, key: str = KEY) -> WeightFile:
    """The tensors of a weight file by name, and their author.

    It takes what `torch.save` wrote, `.safetensors`, and Detectron2's and Caffe2's pickles of
    arrays. What a checkpoint holds beside its weights is left out.

    Args:
        path: as it is or below the datasets' folder; or a URL, `detectron2://` or `catalog://`.
        key: the config key or option that named the file, for messages.

    Raises:
        FileNotFoundError: if there is no such file, or it cannot be fetched.
        ImportError: if it is a safetensors file and safetensors is not installed.
        ValueError: if it is not a state dict, or holds more than plain data.
    """
    file = _fetch(path, key)
    loaded = read_plain(file, f"{key}: {path}")
    if file.suffix == ".pkl" and not is_torch_file(file):
        loaded = _detectron2_named(loaded)
    tensors = _tensors(loaded)
    if not tensors:
        raise ValueError(f"{key}: {path} holds no state dict (names with tensors)")
    author = loaded.get("__author__", "") if isinstance(loaded, Mapping) else ""
    return WeightFile(tensors, str(author))


def is_remote(path: str) -> bool:
    """Whether the path is for Detectron2's PathManager."""
    return "://" in path


def _fetch(path: str, key: str) -> Path:
    if not is_remote(path):
        return find_file(path, key)
    import detectron2.checkpoint  # noqa: F401 (registers catalog://)
    from detectron2.utils.file_io import PathManager

    url = path.partition("?")[0]  # Detectron2 takes options after it
    cause: Exception | None = None
    try:
        file = Path(PathManager.get_local_path(url))
    except (OSError, RuntimeError, LookupError, ValueError, HTTPException) as error:
        file, cause = Path(url), error
    if not file.is_file():
        reason = cause or "no handler of Detectron2's PathManager knows what stands before ://"
        raise FileNotFoundError(
            f"{key}: {path!r} cannot be fetched ({reason}); download it elsewhere and give the"
            " path of the file"
        ) from cause
    return file


def _detectron2_named(loaded: Any) -> Any:
    """A pickle's content, its names as Detectron2 writes them."""
    if not isinstance(loaded, Mapping):
        return loaded
    if "model" in loaded and "__author__" in loaded:
        if loaded["__author__"] != "Caffe2":
            return loaded
        return {"model": _caffe2_renamed(loaded), "__author__": "Caffe2"}
    return _caffe2_renamed({"model": loaded.get("blobs", loaded)})


def _caffe2_renamed(checkpoint: Mapping[str, Any]) -> Any:
    from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names

    tensors = _tensors(checkpoint)
    weights = {name: tensors[name] for name in tensors if not name.endswith("_momentum")}
    return convert_c2_detectron_names(weights)[0]


def _tensors(loaded: Any) -> dict[str, Tensor]:
    """The tensors of a state dict that may be wrapped, also several times."""
    while isinstance(loaded, Mapping):
        inner = next((k for k in _WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
        if inner is None:
            break
        loaded = loaded[inner]
    found = {}
    for name, value in loaded.items() if isinstance(loaded, Mapping) else ():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        if isinstance(value, Tensor):
            found[str(name)] = value
    return found
