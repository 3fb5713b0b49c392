"""One copy of the dataset dicts for all processes of a host.

Detectron2's serialised list is shared by a process with the workers that it forks. But each rank
has a list of its own, and while it reads the JSON all of it as Python's objects, which take several
times as much. Here the first rank of each host reads and serialises, and the others map its file.
"""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import tempfile
from typing import Any, Callable, Iterable, Sequence

import numpy as np
import torch.utils.data as torchdata
from detectron2.data import DatasetFromList, MetadataCatalog
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class SharedRecords(torchdata.Dataset):
    """Pickled items in a file that is mapped into memory.

    The file's pages are there once for all processes that map it and the workers that they fork.
    It may be removed as soon as all have opened it.

    Args:
        path: written by :func:`write_records`.
    """

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = int(np.frombuffer(self._map[-8:], dtype=np.int64)[0])
        self._ends = np.frombuffer(self._map[-8 * (count + 2) : -8], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):  # also ends a `for` over the items
            raise IndexError(index)
        return pickle.loads(self._map[self._ends[index] : self._ends[index + 1]])


def write_records(records: Iterable[Any], path: str) -> None:
    """Write the items, one after the other, and then where each of them ends."""
    ends = [0]
    with open(path, "wb") as file:
        for record in records:
            ends.append(ends[-1] + file.write(pickle.dumps(record, protocol=-1)))
        np.asarray([*ends, len(ends) - 1], dtype=np.int64).tofile(file)


def one_copy_per_host(load: Callable[[], Any], names: Sequence[str]) -> Any:
    """The dataset that `load` gives, read by the first process of each host.

    Args:
        load: gives a list of dataset dicts, the same in every process; or a stream, which each
            process loads for itself.
        names: of the datasets, whose metadata loading may set.

    Returns:
        Detectron2's serialised list in a process that has its host for itself, else a
        :class:`SharedRecords`; or the stream.

    Raises:
        Exception: what `load` raises, in every process.
    """
    if comm.get_local_size() == 1:
        records = load()
        return DatasetFromList(records, copy=False) if isinstance(records, list) else records
    offer = _offer(load, names) if comm.get_local_rank() == 0 else None
    offers = comm.all_gather(offer)
    for each in offers:
        if isinstance(each, Exception):
            raise each
    # a host's processes have ranks that follow each other
    path, metadata = offers[comm.get_rank() - comm.get_local_rank()]
    if path is None:
        return load()
    shared = SharedRecords(path)
    for name, values in metadata.items():
        _complete(name, values)
    comm.synchronize()
    if comm.get_local_rank() == 0:
        os.remove(path)
        logger.info("%d images serve %d processes", len(shared), comm.get_local_size())
    return shared


def _offer(
    load: Callable[[], Any], names: Sequence[str]
) -> tuple[str | None, dict[str, Any]] | Exception:
    """The file of what was loaded, None for a stream; and the metadata. Or what went wrong."""
    path = None
    try:
        records = load()
        if not isinstance(records, list):
            return None, {}
        handle, path = tempfile.mkstemp(prefix="fpn_records_")
        os.close(handle)
        write_records(records, path)
        return path, {name: MetadataCatalog.get(name).as_dict() for name in names}
    except Exception as error:  # the other processes wait for the answer
        if path is not None:
            os.remove(path)
        # other classes may not survive the way to another process
        plain = type(error) in (ValueError, KeyError, FileNotFoundError)
        return error if plain else RuntimeError(f"{type(error).__name__}: {error}")


def _complete(name: str, values: dict[str, Any]) -> None:
    """Set a dataset's metadata, as far as it is not known."""
    known = MetadataCatalog.get(name)
    for key, value in values.items():
        if key not in known.as_dict():
            known.set(**{key: value})
