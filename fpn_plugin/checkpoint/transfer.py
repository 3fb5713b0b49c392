"""Files of one process of a run for others, whose hosts share no folder with it."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fpn_plugin.checkpoint.checkpointer import SaveError, write_atomically

_CHUNK = 2**24  # bytes that are in memory at a time


def checkpoint_digest(path: str | Path) -> int:
    """A number that tells checkpoints apart, from the check sums that are in the file: its tensors
    are not read."""
    with zipfile.ZipFile(path) as archive:
        members = [(x.filename, x.file_size, x.CRC) for x in archive.infolist()]
    return zlib.crc32(repr(sorted(members)).encode())


def send_files(
    folder: str, names: Sequence[str], source: int, group: dist.ProcessGroup, keep: bool = True
) -> dict[int, str]:
    """Send files from one process's folder to those of the others, which replace each in one step.

    All processes of the group call it. What is no file in the source's folder is left out.

    Args:
        folder: of this process.
        names: of the files, in the order in which they are written; the source's count.
        source: its rank in the run.
        group: of the source and the receivers, on the CPU.
        keep: whether this process, if it is not the source, writes what it receives.

    Returns:
        the errors of those that could not write, by their ranks: for all of the group.
    """
    is_source = dist.get_rank() == source
    files = [name for name in names if Path(folder, name).is_file()] if is_source else []
    listed: list[Any] = [[(name, Path(folder, name).stat().st_size) for name in files]]
    dist.broadcast_object_list(listed, source, group)
    failure = ""
    for name, size in listed[0]:
        path = Path(folder, name)
        chunks = _sent(path, size) if is_source else _empty(size)
        received = _broadcast(chunks, source, group)
        try:
            if keep and not is_source and not failure:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, lambda file: _write_all(file, received), size)
        except (SaveError, OSError) as error:
            failure = str(error)
        for _ in received:  # the others go on, also where this one cannot write
            pass
    failures: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, (dist.get_rank(), failure), group)
    return {rank: text for rank, text in failures if text}


def _write_all(file: Any, chunks: Iterator[Tensor]) -> None:
    for chunk in chunks:
        file.write(chunk.numpy().data)


def _broadcast(chunks: Iterator[Tensor], source: int, group: dist.ProcessGroup) -> Iterator[Tensor]:
    for chunk in chunks:
        dist.broadcast(chunk, source, group)
        yield chunk


def _sizes(size: int) -> Iterator[int]:
    for start in range(0, size, _CHUNK):
        yield min(_CHUNK, size - start)


def _sent(path: Path, size: int) -> Iterator[Tensor]:
    with open(path, "rb") as file:
        for length in _sizes(size):
            yield torch.frombuffer(bytearray(file.read(length)), dtype=torch.uint8)


def _empty(size: int) -> Iterator[Tensor]:
    for length in _sizes(size):
        yield torch.empty(length, dtype=torch.uint8)
