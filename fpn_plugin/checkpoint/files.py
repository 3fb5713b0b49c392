"""Checkpoints and weight files in the forms that libraries write; no code of a file is run.

`read_checkpoint` is for whole detectors: it accepts what Detectron2's checkpointer accepts and
returns it in Detectron2's format. `read_weights` is for networks whose names are matched later: it
also looks into the wrappers of other libraries, and leaves out all that is no tensor.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from http.client import HTTPException
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch

# importing its package registers catalog:// with PathManager
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.checkpoint.catalog import ModelCatalog, ModelCatalogHandler
from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import get_cache_dir
from torch import Tensor

from fpn_plugin.checkpoint.plain import is_pickle, read_plain
from fpn_plugin.paths import download_advice, find_file

logger = logging.getLogger(__name__)

KEY = "MODEL.BOTTOM_UP.WEIGHTS"
_PATIENCE = 15.0  # seconds without a sign of life from a server

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
    """The weights in a file.

    Attributes:
        tensors: by name.
        author: where the weights come from, in files of Detectron2's format ("torchvision",
            "Caffe2", ...); "" where the file does not say.
    """

    tensors: dict[str, Tensor]
    author: str


def read_checkpoint(filename: str) -> dict[str, Any]:
    """A checkpoint in Detectron2's format: its state dict under "model", and what is beside it.

    Raises:
        ImportError: if it is a safetensors file and safetensors is not installed.
        ValueError: naming the file, if it holds more than plain data, or no state dict.
    """
    file, where = Path(filename), f"checkpoint {filename}"
    content = read_plain(file, where)
    if not isinstance(content, dict):
        raise _no_state_dict(where)
    if is_pickle(file):
        content = _from_model_zoo(content, where)
        logger.info("Reading a file from %r", content["__author__"])
    elif file.suffix == ".pyth":
        content = _from_pycls(content, where)
    elif "model" not in content:
        content = {"model": _unwrap(content)}
    _check_state_dict(content["model"], where)
    return content


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
    file, where = fetch(path, key), f"{key}: {path}"
    content = read_plain(file, where)
    author = content.get("__author__", "") if isinstance(content, Mapping) else ""
    if is_pickle(file):
        checkpoint = _from_model_zoo(content, where)
        tensors = _tensors(checkpoint)
        if checkpoint["__author__"] == "Caffe2":
            # the layout alone says it, where a name of Caffe2's is there too
            author = author or ("Caffe2" if any(name.endswith("_w") for name in tensors) else "")
            tensors = convert_c2_detectron_names(tensors)[0]
    else:
        tensors = _tensors(content)
    if not tensors:
        raise _no_state_dict(where)
    return WeightFile(tensors, str(author))


def read_shapes(path: str, key: str = KEY) -> dict[str, torch.Size]:
    """The shapes of a checkpoint's tensors by name, without reading these where the file allows it.

    Returns:
        {} if it cannot be read, which is an error where it is loaded.
    """
    try:
        content = read_plain(fetch(path, key), f"{key}: {path}", mmap=True) if path else {}
    except (ImportError, OSError, ValueError):
        return {}
    state = _unwrap(content)
    tensors = state if isinstance(state, Mapping) else {}
    shapes = {str(name): torch.Size(x.shape) for name, x in tensors.items() if hasattr(x, "shape")}
    if all(name.startswith("module.") for name in shapes):
        return {name.removeprefix("module."): shape for name, shape in shapes.items()}
    return shapes


def read_state_dict(path: str, key: str = KEY) -> dict[str, Tensor]:
    """The tensors of a weight file by name: see :func:`read_weights`."""
    return read_weights(path, key).tensors


def is_remote(path: str) -> bool:
    """Whether the path is for Detectron2's PathManager."""
    return "://" in path


def fetch(path: str, key: str) -> Path:
    """The file of a path, which is downloaded into Detectron2's cache if it is an address.

    Args:
        path: see :func:`read_weights`.
        key: the config key or option that named it, for messages.

    Raises:
        FileNotFoundError: if there is no such file, or it cannot be fetched; a server that does
            not answer is waited for some seconds only.
    """
    if not is_remote(path):
        return find_file(path, key)
    url = path.partition("?")[0]  # Detectron2 takes options after it
    cause: Exception | None = None
    try:
        with _limited_patience():
            file = Path(PathManager.get_local_path(url))
    except (OSError, RuntimeError, LookupError, ValueError, HTTPException) as error:
        file, cause = Path(url), error
    if not file.is_file():
        reason = cause or "no handler of Detectron2's PathManager knows what stands before ://"
        raise FileNotFoundError(
            f"{key}: {path!r} cannot be fetched: {reason}\n{_advice(url, key)}"
        ) from cause
    return file


@contextlib.contextmanager
def _limited_patience() -> Iterator[None]:
    """Let connections that are opened inside fail if nothing is heard of the other side."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _advice(url: str, key: str) -> str:
    """What to do about an address that cannot be reached, in two lines."""
    address = url.replace(Detectron2Handler.PREFIX, Detectron2Handler.S3_DETECTRON2_PREFIX)
    if url.startswith(ModelCatalogHandler.PREFIX):
        with contextlib.suppress(RuntimeError, LookupError):  # for a name that is not in it
            address = ModelCatalog.get(url.removeprefix(ModelCatalogHandler.PREFIX))
    is_cached = address.startswith(("https://", "http://"))
    place = Path(get_cache_dir(), urlparse(address).path.lstrip("/")) if is_cached else ""
    return download_advice(address, key, str(place), "FVCORE_CACHE")


def _from_model_zoo(content: Any, where: str) -> dict[str, Any]:
    """A pickle in Detectron2's format; one without an author is Caffe2's, from Detectron1.

    What Caffe2 saved of its optimizer is left out. Its names stay: Detectron2's checkpointer
    converts them while it loads them.
    """
    if not isinstance(content, dict):
        raise _no_state_dict(where)
    if "model" not in content or "__author__" not in content:
        state = content.get("blobs", content)  # ImageNet's files have no "blobs"
        content = {"model": state, "__author__": "Caffe2", "matching_heuristics": True}
    state = content["model"]
    if content["__author__"] == "Caffe2" and isinstance(state, dict):
        weights = {name: state[name] for name in state if not str(name).endswith("_momentum")}
        content = {**content, "model": weights}
    return content


def _from_pycls(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    state = content.get("model_state")
    if not isinstance(state, dict):
        raise ValueError(f"{where}: pycls' files have a 'model_state', this has none")
    weights = {k: state[k] for k in state if not str(k).endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _check_state_dict(state: Any, where: str) -> None:
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise _no_state_dict(where)
    for name, value in state.items():
        if not isinstance(value, Tensor) and not _is_numeric_array(value):
            raise ValueError(
                f"{where}: {name!r} is a {type(value).__name__}, not a tensor of numbers; load the"
                " file yourself and save its state dict alone"
            )


def _unwrap(content: Any) -> Any:
    """What is in the innermost wrapper around a state dict."""
    while isinstance(content, Mapping):
        wrapper = next((k for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    return content


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a state dict that may be wrapped, also several times."""
    content = _unwrap(content)
    tensors = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if _is_numeric_array(value):
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        if isinstance(value, Tensor):
            tensors[str(name)] = value
    return tensors


def _is_numeric_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"


def _no_state_dict(where: str) -> ValueError:
    return ValueError(f"{where} holds no state dict (names with tensors)")
