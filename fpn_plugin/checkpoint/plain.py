"""Reading files of weights without running code of theirs: torch's, pickles, safetensors.

A pickle is a program: reading it calls the functions that it names. Here it may name only those on
a list, which make arrays, tensors and plain containers.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fpn_plugin.compat import SAFE_GLOBALS, require_torch, safe_globals

_ZIP = b"PK\x03\x04"  # the first bytes of what torch.save writes


def read_plain(file: Path, where: str, mmap: bool = False) -> Any:
    """What a file holds: tensors, arrays, and plain data around them.

    It takes what `torch.save` wrote, `.safetensors`, and pickles (`.pkl`).

    Args:
        where: the key or option and the path that it names, for messages.
        mmap: leave the tensors of what `torch.save` wrote in the file until they are used.

    Raises:
        ImportError: if it is a safetensors file and safetensors is not installed.
        ValueError: if it is broken, or names anything that makes more than plain data.
    """
    if file.suffix == ".safetensors":
        return _read_safetensors(file, where)
    if is_pickle(file):
        return read_pickle(file, where)
    return _read_torch(file, where, mmap and is_torch_file(file))


def is_torch_file(file: Path) -> bool:
    """Whether `torch.save` wrote it, in the format that it has had since torch 1.6."""
    with file.open("rb") as stream:
        return stream.read(len(_ZIP)) == _ZIP


def is_pickle(file: Path) -> bool:
    """Whether it is read as a pickle: named `.pkl`, and not written by `torch.save`."""
    return file.suffix == ".pkl" and not is_torch_file(file)


def _read_safetensors(file: Path, where: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"{where} needs safetensors: pip install safetensors"
            " (pip install 'fpn_plugin[timm]' brings it)"
        ) from error
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{where} cannot be read as safetensors: {error}") from error
    return tensors


def _read_torch(file: Path | BinaryIO, where: str, mmap: bool = False) -> Any:
    try:
        with safe_globals([argparse.Namespace, *_NUMPY]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    # torch raises errors of many classes here, all meaning "not a plain weight file"
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        called = found[1] if found else ""
        if called in _PLAIN:
            what = f"{where} cannot be read as plain weights: it calls {called}, which"
            require_torch(SAFE_GLOBALS, what, "save its state dict alone")
        raise _unreadable(where, called, error) from error


def read_pickle(file: Path, where: str) -> Any:
    """What a pickle holds, whatever the file's name ends with; otherwise as `read_plain`."""
    try:
        with file.open("rb") as stream:
            return _ArrayUnpickler(stream, encoding="latin1").load()
    except _Refused as error:
        raise _unreadable(where, str(error), error) from error
    except Exception as error:  # of many classes, as in torch
        raise _unreadable(where, "", error) from error


def _unreadable(where: str, called: str, error: Exception) -> ValueError:
    """The error for a file that is broken, or that names the function `called`."""
    # torch's message advises to run the file's code before it gives the reason
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
    if called:
        reason = (
            f"it calls {called}, and no code of a weight file is run; where you trust it, load it"
            " yourself and save its state dict alone"
        )
    return ValueError(f"{where} cannot be read as plain weights: {reason}")


# The functions that numpy's own pickling names; where they live depends on numpy's version.
_RECONSTRUCT: Any = np.zeros(0).__reduce__()[0]
_SCALAR: Any = np.float32(0).__reduce__()[0]
_FROM_BUFFER: Any = np.zeros(0).__reduce_ex__(5)[0]


class _Refused(pickle.UnpicklingError):
    """A name in a pickle that is not on the list."""


class _Array:
    """Stands for `np.ndarray`, whose constructor would take a file's bytes for the addresses of
    objects."""


def _array(cls: Any, shape: Any, dtype: Any) -> np.ndarray:
    """An empty array of numpy's own class, whatever `cls` is; the pickle's state fills it."""
    array: np.ndarray = _RECONSTRUCT(np.ndarray, shape, dtype)
    return array


def _dtype(*args: Any) -> np.dtype:
    """A data type without objects: their addresses could be taken from a file's bytes."""
    dtype: np.dtype = np.dtype(*args)
    if dtype.hasobject:
        raise _Refused("numpy.dtype of objects")
    return dtype


_MAKERS = ("_reconstruct", "scalar")
_NUMPY: list[Any] = [
    (np.ndarray, "\n"),  # torch sets the state of listed classes only; no file can have this name
    *((_Array, "numpy.ndarray"), (_dtype, "numpy.dtype"), _SCALAR),
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
]

# what `safe_globals` lets through
_PLAIN = {
    "argparse.Namespace",
    *("numpy.ndarray", "numpy.dtype"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in _MAKERS),
}


def _encode(text: str, encoding: str) -> bytes:
    """Bytes, as Python 3 writes them in old pickle protocols: encoded in `latin1` only."""
    if encoding != "latin1":
        raise _Refused(f"encode with {encoding!r}")
    return text.encode("latin1")


def _storage(content: bytes) -> Any:
    """Replaces torch's own function, which unpickles the bytes inside a tensor unrestrictedly."""
    return _read_torch(io.BytesIO(content), "a tensor")


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numpy's arrays, torch's tensors and plain containers; any other name is an error."""

    _ALLOWED: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _dtype,
        ("torch.storage", "_load_from_bytes"): _storage,
        **{
            ("torch._utils", name): getattr(torch._utils, name)
            for name in ("_rebuild_tensor_v2", "_rebuild_parameter")
        },
        **{
            (f"numpy.{core}.{module}", name): function
            for core in ("core", "_core")
            for module, name, function in (
                ("multiarray", "_reconstruct", _array),
                ("multiarray", "scalar", _SCALAR),
                ("numeric", "_frombuffer", _FROM_BUFFER),
            )
        },
    }

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        super().__init__(stream, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        """The object under a name.

        Raises:
            UnpicklingError: if it is not on the list.
        """
        if (module, name) not in self._ALLOWED:
            raise _Refused(f"{module}.{name}")
        return self._ALLOWED[module, name]
