"""Reading weight files: names with tensors, whatever wrote the file, and no code of it runs."""

from __future__ import annotations

import argparse
import pickle
import re
from collections import OrderedDict
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, Mapping, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpn_plugin.paths import find_file

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
_ZIP = b"PK\x03\x04"  # how what torch.save writes begins


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
    if file.suffix == ".safetensors":
        return WeightFile(_read_safetensors(file, path, key), "")
    with file.open("rb") as stream:
        is_zip = stream.read(len(_ZIP)) == _ZIP
    loaded = (_read_torch if is_zip or file.suffix != ".pkl" else _read_pickle)(file, path, key)
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


def _read_safetensors(file: Path, path: str, key: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"{key}: {path} needs safetensors: pip install safetensors"
            " (pip install 'fpn_plugin[timm]' brings it)"
        ) from error
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{key}: {path} cannot be read as safetensors: {error}") from error
    return tensors


def _read_torch(file: Path, path: str, key: str) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_NUMPY]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises many kinds here, all meaning "not a plain weight file"
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise _unreadable(path, key, found[1] if found else "", error) from error


def _read_pickle(file: Path, path: str, key: str) -> Any:
    """Detectron2's or Caffe2's pickle, its names as Detectron2 writes them."""
    try:
        with file.open("rb") as stream:
            loaded = _ArrayUnpickler(stream, encoding="latin1").load()
    except _Refused as error:
        raise _unreadable(path, key, str(error), error) from error
    except Exception as error:  # as for torch
        raise _unreadable(path, key, "", error) from error
    if not isinstance(loaded, Mapping):
        return loaded
    if "model" in loaded and "__author__" in loaded:
        if loaded["__author__"] != "Caffe2":
            return loaded
        return {"model": _caffe2_renamed(loaded), "__author__": "Caffe2"}
    return _caffe2_renamed({"model": loaded.get("blobs", loaded)})


def _unreadable(path: str, key: str, called: str, error: Exception) -> ValueError:
    """The error for a file that is broken, or calls something when it is read."""
    # torch puts advice before the reason: to run the file's code
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
    if called:
        reason = (
            f"it calls {called}, and no code of a weight file is run; where you trust it, load it"
            " yourself and save its state dict alone"
        )
    return ValueError(f"{key}: {path} cannot be read as plain weights: {reason}")


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


# The functions that numpy's own pickling names; where they live depends on numpy's version.
_RECONSTRUCT: Any = np.zeros(0).__reduce__()[0]
_SCALAR: Any = np.float32(0).__reduce__()[0]
_FROM_BUFFER: Any = np.zeros(0).__reduce_ex__(5)[0]
_NUMPY: list[Any] = [
    *(np.ndarray, np.dtype, _RECONSTRUCT, _SCALAR),
    *(
        (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
        (_SCALAR, "numpy.core.multiarray.scalar"),
    ),
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
]


class _Refused(pickle.UnpicklingError):
    """A name in a pickle that is not admitted."""


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes in an old pickle protocol: only `latin1`."""
    if encoding != "latin1":
        raise _Refused(f"encode with {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy's arrays and plain containers; any other name in the file is an error."""

    _ADMITTED: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        **{
            (f"numpy.{core}.{module}", name): function
            for core in ("core", "_core")
            for module, name, function in (
                ("multiarray", "_reconstruct", _RECONSTRUCT),
                ("multiarray", "scalar", _SCALAR),
                ("numeric", "_frombuffer", _FROM_BUFFER),
            )
        },
    }

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        super().__init__(stream, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        """The object under a name, if it is admitted.

        Raises:
            UnpicklingError: if it is not.
        """
        if (module, name) not in self._ADMITTED:
            raise _Refused(f"{module}.{name}")
        return self._ADMITTED[module, name]
