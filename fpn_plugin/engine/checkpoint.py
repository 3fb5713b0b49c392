"""Checkpoints that survive a kill: written whole or not at all, and read only when whole."""

from __future__ import annotations

import functools
import logging
import os
import re
import zipfile
from pathlib import Path, PureWindowsPath
from typing import IO, Any, Callable

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.logger import log_first_n
from torch import nn

from fpn_plugin.engine.checkpoint_forms import check_model, conversion, read_checkpoint
from fpn_plugin.engine.faults.finite import refuse_broken
from fpn_plugin.engine.faults.saving import first_cause, save_error, tensor_bytes

logger = logging.getLogger(__name__)

TAG = "last_checkpoint"
_CHECKPOINT = re.compile(r"model_(\d{7}|final|best)\.pth")


def list_checkpoints(folder: str) -> list[Path]:
    """The files of a folder that a trainer wrote as checkpoints, oldest first, whole or not."""
    files = [file for file in Path(folder).glob("model_*.pth") if _CHECKPOINT.fullmatch(file.name)]
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name))


def is_whole(path: str | Path) -> bool:
    """Whether a file is a checkpoint of torch written to its end, by the check sums in it."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return False
    return _is_whole(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _is_whole(path: str, size: int, mtime: int) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError):
        return False


def find_checkpoint(folder: str) -> str:
    """The checkpoint that a run in this folder goes on from.

    That is the one its `last_checkpoint` names or, if that file is missing or broken, the newest
    whole one.

    Returns:
        its path, or "" if the folder holds no checkpoint at all.

    Raises:
        ValueError: if there are checkpoints, or a `last_checkpoint`, but none is whole: starting
            over by itself would throw a run away; or if `last_checkpoint` names no file of the
            folder.
    """
    tagged = _tagged(folder)
    if tagged is not None and is_whole(tagged):
        return str(tagged)
    found = list_checkpoints(folder)
    whole = next((file for file in reversed(found) if is_whole(file)), None)
    if whole is not None:
        state = (
            "there is no last_checkpoint"
            if tagged is None
            else f"{tagged.name} is missing or broken"
        )
        message = (
            f"In OUTPUT_DIR {folder} {state}: going on from the newest whole one, {whole.name}"
        )
        log_first_n(logging.WARNING, message, key="message")
        return str(whole)
    if tagged is None and not found:
        return ""
    names = ", ".join(sorted({file.name for file in found} | ({tagged.name} if tagged else set())))
    raise ValueError(
        f"OUTPUT_DIR {folder!r}: no checkpoint in it is whole ({names}). "
        "Restore one, or start over with --overwrite"
    )


def _tagged(folder: str) -> Path | None:
    """The file that `last_checkpoint` names, there or not; None without a `last_checkpoint`."""
    tag = Path(folder, TAG)
    if not tag.is_file():
        return None
    name = tag.read_text(errors="replace").strip()
    # Path.name leaves a folder, a drive or ".." out: what is left must be all of it
    if (
        name == ".."
        or not name.isprintable()
        or {name} != {Path(name).name, PureWindowsPath(name).name}
    ):
        raise ValueError(
            f"OUTPUT_DIR {folder!r}: {TAG} in it says {name!r}, which is no name of a file in that"
            f" folder: write the checkpoint's name into it, or remove it to go on from the newest"
        )
    return Path(folder, name)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any], needed: int = 0) -> None:
    """Replace a file in one step: whoever reads it, also after a kill, sees the old or the new.

    Args:
        needed: about how many bytes it will have, for the error; 0: unknown.

    Raises:
        SaveError: if it cannot be written; nothing of it stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save fails once more when it ends the file that it could not write
        cause = first_cause(error, OSError, KeyboardInterrupt)
        if isinstance(cause, OSError):
            raise save_error(path, cause, needed) from error
        raise cause or error
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system allows folders to be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: str) -> None:
    """Remove what a save that was killed left behind."""
    for file in [*Path(folder).glob("model_*.pth.tmp"), Path(folder, TAG + ".tmp")]:
        if file.is_file():
            logger.info("Removing %s, left by a save that was interrupted", file)
            file.unlink()


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic saves, which resumes from a whole checkpoint only and
    runs no code of the files that it loads.

    Args:
        model: as in Detectron2.
        save_dir: a local folder.
        save_to_disk: by default, in the main process.
        checkpointables: as in Detectron2.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        if self.save_dir and self.save_to_disk:
            remove_leftovers(self.save_dir)

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `name`.pth and then point `last_checkpoint` to it, each in one step.

        Args:
            name: the file's name without its ending.
            kwargs: more to save beside the model and the checkpointables.

        Raises:
            DivergedError: if a weight is not finite; nothing is written then.
            SaveError: if there is no room; what was saved before is still there.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **states, **kwargs}
        path = Path(self.save_dir, f"{name}.pth")
        refuse_broken(self.model, f"{path} is not written")
        logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda file: torch.save(data, file), tensor_bytes(data))
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Let `last_checkpoint` name this file."""
        content = last_filename_basename.encode()
        write_atomically(Path(self.save_dir, TAG), lambda file: file.write(content))

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Detectron2's forms of checkpoints, read without running code of the file.

        Raises:
            ValueError: naming the file, if it holds more than plain data, or no model.
        """
        convert = conversion(filename)
        loaded = convert(filename) if convert else super()._load_file(filename)
        check_model(loaded["model"], filename)
        return loaded

    def _torch_load(self, filename: str) -> dict[str, Any]:
        return read_checkpoint(filename)

    def has_checkpoint(self) -> bool:
        """Whether there is one to resume from; see, also for what it raises, `find_checkpoint`."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The path of the one to resume from, or ""; see `find_checkpoint` as well."""
        return find_checkpoint(self.save_dir) if self.save_dir else ""
