"""Reading files of weights without running code of theirs: torch's, pickles, safetensors.

A pickle is a program: what it names is called while it is read. Here only names on a list are,
those of arrays, tensors and plain containers.
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

_ZIP = b"PK\x03\x04"  # how what torch.save writes begins


def read_plain(file: Path, where: str) -> Any:
    """What a file holds: tensors, arrays, and plain data around them.

    It takes what `torch.save` wrote, `.safetensors`, and pickles (`.pkl`).

    Args:
        where: the key or option and the path that it names, for messages.

    Raises:
        ImportError: if it is a safetensors file and safetensors is not installed.
        ValueError: if it is broken, or calls anything else than what makes up plain data.
    """
    if file.suffix == ".safetensors":
        return _read_safetensors(file, where)
    return (read_pickle if is_pickle(file) else _read_torch)(file, where)


def is_pickle(file: Path) -> bool:
    """Whether it is read as a pickle: named `.pkl`, and not written by `torch.save`."""
    if file.suffix != ".pkl":
        return False
    with file.open("rb") as stream:
        return stream.read(len(_ZIP)) != _ZIP


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


def _read_torch(file: Path | BinaryIO, where: str) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_NUMPY]):
            return torch.load(file, map_location="cpu", weights_only=True)
    # torch raises errors of many classes here, all meaning "not a plain weight file"
    except Exception as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        raise _unreadable(where, called[1] if called else "", error) from error


def read_pickle(file: Path, where: str) -> Any:
    """What a pickle holds, whatever the file's name ends with; otherwise as `read_plain`."""
    try:
        with file.open("rb") as stream:
            return _ArrayUnpickler(stream, encoding="latin1").load()
    except _Refused as error:
        raise _unreadable(where, str(error), error) from error
    except Exception as error:  # as for torch
        raise _unreadable(where, "", error) from error


def _unreadable(where: str, called: str, error: Exception) -> ValueError:
    """The error for a file that is broken, or calls something when it is read."""
    # torch puts advice before the reason: to run the file's code
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
    """A name in a pickle that is not admitted."""


class _Array:
    """Stands for `np.ndarray`, which a file could call with bytes that it would take for objects'
    addresses."""


def _array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    """An empty array, which its state fills."""
    array: np.ndarray = _RECONSTRUCT(np.ndarray, shape, dtype)
    return array


def _dtype(*args: Any) -> np.dtype:
    """A type of numbers or texts: the state of one with objects in it can call them bytes."""
    dtype: np.dtype = np.dtype(*args)
    if dtype.hasobject:
        raise _Refused("numpy.dtype of objects")
    return dtype


_NUMPY: list[Any] = [
    (np.ndarray, "\n"),  # torch fills only what is here; no file can name it so
    *((_Array, "numpy.ndarray"), (_dtype, "numpy.dtype"), _SCALAR),
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
]


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes in an old pickle protocol: only `latin1`."""
    if encoding != "latin1":
        raise _Refused(f"encode with {encoding!r}")
    return text.encode("latin1")


def _storage(content: bytes) -> Any:
    """In the place of torch's own, which reads the bytes inside a pickled tensor as any pickle."""
    return _read_torch(io.BytesIO(content), "a tensor")


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy's arrays, torch's tensors and plain containers; any other name is an error."""

    _ADMITTED: dict[tuple[str, str], Any] = {
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
        """The object under a name, if it is admitted.

        Raises:
            UnpicklingError: if it is not.
        """
        if (module, name) not in self._ADMITTED:
            raise _Refused(f"{module}.{name}")
        return self._ADMITTED[module, name]
