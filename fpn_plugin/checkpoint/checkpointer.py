"""Checkpoints that survive a kill: written whole or not at all, and read only when whole.

Everything that a run must not lose is written by :func:`write_atomically`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path, PureWindowsPath
from typing import IO, Any, Callable, Mapping

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from fpn_plugin.checkpoint.files import fetch, is_remote, read_checkpoint
from fpn_plugin.checkpoint.finite import require_finite
from fpn_plugin.checkpoint.fit import PARALLEL, Misfits, find_misfits, report_start, require_fit
from fpn_plugin.checkpoint.key_matching import match_detector, network_keys
from fpn_plugin.checkpoint.load import adapt_image_channels, kept_statistics
from fpn_plugin.checkpoint.record import RECORD

logger = logging.getLogger(__name__)

TAG = "last_checkpoint"
_CHECKPOINT = re.compile(r"model_(\d{7}|final|best)\.pth")
# no room left: on the device, in the quota, under the limit of a file's size
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    """The checkpoint from which a run in this folder resumes.

    It is the one that `last_checkpoint` names or, if that one is missing or broken, the newest
    whole one.

    Returns:
        its path, or "" if the folder holds no checkpoint at all.

    Raises:
        ValueError: if there are checkpoints, or a `last_checkpoint`, but none is whole: starting
            over silently would throw a run away; or if `last_checkpoint` names no file of the
            folder.
    """
    tagged = _tagged(folder)
    if tagged is not None and is_whole(tagged):
        return str(tagged)
    checkpoints = list_checkpoints(folder)
    newest = next((file for file in reversed(checkpoints) if is_whole(file)), None)
    if newest is not None:
        state = f"{tagged.name} is missing or broken" if tagged else "there is no last_checkpoint"
        message = (
            f"In OUTPUT_DIR {folder} {state}: going on from the newest whole one, {newest.name}"
        )
        log_first_n(logging.WARNING, message, key="message")
        return str(newest)
    if tagged is None and not checkpoints:
        return ""
    names = sorted({file.name for file in [*checkpoints, *([tagged] if tagged else [])]})
    raise ValueError(
        f"OUTPUT_DIR {folder!r}: no checkpoint in it is whole ({', '.join(names)}). "
        "Restore one, or start over with --overwrite"
    )


def _tagged(folder: str) -> Path | None:
    """The file that `last_checkpoint` names, there or not; None without a `last_checkpoint`."""
    tag = Path(folder, TAG)
    if not tag.is_file():
        return None
    name = tag.read_text(errors="replace").strip()
    # Path.name drops folders and drives, so a plain file name stays as it is on every system
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


class SaveError(OSError):
    """A file of a run could not be written; `errno` and `filename` are the system's."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any], needed: int = 0) -> None:
    """Replace a file in one step: a reader, also after a kill, sees the old one or the new one.

    Args:
        write: writes the content into an open file.
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
        cause = _first_cause(error, OSError, KeyboardInterrupt)
        if isinstance(cause, OSError):
            raise _save_error(path, cause, needed) from error
        raise cause or error
    _sync_folder(path.parent)


def disk_full_error(error: OSError, folder: str) -> SaveError | None:
    """The error to raise where something else in a run could not be written.

    Args:
        folder: the run's, for errors that do not name their file.

    Returns:
        None if it is not for want of room.
    """
    if error.errno not in _FULL:
        return None
    return _save_error(Path(error.filename or os.path.join(folder, "…")), error)


def _save_error(path: Path, error: OSError, needed: int = 0) -> SaveError:
    size = f", it needs about {_megabytes(needed)}" if needed else ""
    folder = next((place for place in path.parents if place.is_dir()), Path("."))
    free = _megabytes(shutil.disk_usage(folder).free)
    advice = "make room" if error.errno in _FULL else "see to that"
    text = (
        f"{error.strerror or error}: {path.name} was not written{size}; {free} are free. What was"
        f" saved before is as it was: {advice}, then go on from there with --resume"
    )
    return SaveError(error.errno or errno.EIO, text, str(path))


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _first_cause(error: BaseException, *classes: type[BaseException]) -> BaseException | None:
    """The error of these classes that led to an error, or while handling which it was raised."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, classes):
        cause = cause.__cause__ or cause.__context__
    return cause


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system allows folders to be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_leftovers(folder: str) -> None:
    """Remove what a save that was killed left behind."""
    for file in [*Path(folder).glob("model_*.pth.tmp"), Path(folder, TAG + ".tmp")]:
        if file.is_file():
            logger.info("Removing %s, left by a save that was interrupted", file)
            file.unlink()


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic saves, which resumes only from whole checkpoints.

    No code of the files that it loads is run. Of a detector of torchvision or MMDetection it loads
    the network and the pyramid; the first convolution is adapted to images of other than three
    channels. What a file does not hold stays as it is. The arguments are Detectron2's; `save_dir`
    is a local folder.

    Attributes:
        record: of the run, put into each checkpoint: see `fpn_plugin.checkpoint.record`.
        saving: makes a context in which the model has the weights that are to be saved.

    Args:
        key: the config key that names the files to start from, for messages.

    Raises:
        ValueError: from `load`, if nothing of the file fits the model.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        key: str = "MODEL.WEIGHTS",
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._key, self._title = key, ""
        self.record: dict[str, Any] = {}
        self.saving: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        if self.save_dir and self.save_to_disk:
            _remove_leftovers(self.save_dir)

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `name`.pth and then point `last_checkpoint` to it, each in one step.

        Args:
            name: the file's name without its suffix.
            kwargs: saved beside the model and the checkpointables.

        Raises:
            DivergedError: if a weight is not finite; nothing is written then.
            SaveError: if there is no room; what was saved before is still there.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = Path(self.save_dir, f"{name}.pth")
        with self.saving():
            states = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
            data = {"model": self.model.state_dict(), **states, **kwargs}
            if self.record:
                data[RECORD] = self.record
            require_finite(self.model, f"{path} is not written")
            logger.info("Saving checkpoint to %s", path)
            write_atomically(path, lambda file: torch.save(data, file), _tensor_bytes(data))
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Let `last_checkpoint` name this file."""
        content = last_filename_basename.encode()
        write_atomically(Path(self.save_dir, TAG), lambda file: file.write(content))

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):  # Detectron2 reads these without _torch_load
            return read_checkpoint(filename)
        return super()._load_file(filename)  # which knows the options after the path

    def _torch_load(self, filename: str) -> dict[str, Any]:
        return read_checkpoint(filename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """As Detectron2's; `path` may be "" for nothing.

        Raises:
            FileNotFoundError: for an address that cannot be fetched.
        """
        if is_remote(path or ""):
            fetch(path, self._key)  # into the cache, from which Detectron2 takes it
        is_own = bool(self.save_dir) and Path(path).parent == Path(self.save_dir)
        self._title = f"{'checkpoint' if is_own else self._key} {path!r}"
        return super().load(path, checkpointables)

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        """Returns nothing, as what does not fit is told here."""
        state = self._matched(checkpoint)
        self._tell(state, find_misfits(self.model, state))
        with kept_statistics(self.model, state):
            super()._load_model({"model": state})

    def _tell(self, state: Mapping[str, Tensor], misfits: Misfits) -> None:
        """Log what fits, or raise."""
        report_start(self._title, self.model, state, misfits)

    def _matched(self, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
        """The state dict of a checkpoint, taken out of it, by the names of the model."""
        state, wanted = checkpoint.pop("model"), self.model.state_dict()
        self._convert_ndarray_to_tensor(state)
        if checkpoint.get("matching_heuristics"):
            is_caffe2s = checkpoint.get("__author__") == "Caffe2"
            state = align_and_update_state_dicts(_with_rgb_stem(wanted), state, is_caffe2s)
        if all(name.startswith(PARALLEL) for name in state):
            consume_prefix_in_state_dict_if_present(state, PARALLEL)
        if pairs := match_detector(wanted, state):
            text = "%s: it has other names for the network and the pyramid; %d tensors are taken"
            logger.info(text, self._title, len(pairs))
            state = {name: state[source] for name, source in pairs.items()}
        return self._adapted(state, wanted)

    def _adapted(self, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        """With changes to tensors of other shapes, and what a module makes of others (see
        `PyramidBackbone.complete_state`); in place, as the state has a version."""
        state.update(adapt_image_channels(state, wanted, self._title))
        for name, module in self.model.named_modules():
            if complete := getattr(module, "complete_state", None):
                complete(state, f"{name}." if name else "")
        return state

    def has_checkpoint(self) -> bool:
        """Whether there is one to resume from; raises as :func:`find_checkpoint` does."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The path of the one to resume from, or ""; raises as :func:`find_checkpoint` does."""
        return find_checkpoint(self.save_dir) if self.save_dir else ""


class StrictCheckpointer(Checkpointer):
    """Loads a checkpoint only if its tensors are exactly the model's: to evaluate, draw or export a
    model, which nothing trains afterwards.

    What Detectron2 itself lets pass is no difference: pixel statistics and anchors, which follow
    from the config; counters of batches; in files of other names, such as Caffe2's, what the model
    does not have.

    Args:
        prefix: of the names that must match; "" for all.
        allow_partial: only warn of tensors that are missing or left over.
        key: the config key or option that named the file, for messages.

    Raises:
        ValueError: from `load`, naming the file, the first tensors that do not match and the config
            keys that they depend on.
    """

    def __init__(
        self,
        model: nn.Module,
        prefix: str = "",
        allow_partial: bool = False,
        key: str = "--weights (MODEL.WEIGHTS)",
    ) -> None:
        super().__init__(model, key=key)
        self._prefix, self._allow_partial = prefix, allow_partial
        self._is_renamed = False

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        self._is_renamed = bool(checkpoint.get("matching_heuristics"))
        super()._load_model(checkpoint)

    def _adapted(self, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        return super()._adapted(state, wanted) if self._allow_partial else state

    def _tell(self, state: Mapping[str, Tensor], misfits: Misfits) -> None:
        misfits = misfits._replace(left_over=[]) if self._is_renamed else misfits
        require_fit(self._title, self.model, misfits, self._prefix, self._allow_partial)


def _with_rgb_stem(wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model with a first convolution for three channels, as files of weights have
    it, for Detectron2's matching of names and shapes."""
    stem = next((name for name in network_keys(wanted) if wanted[name].ndim == 4), "")
    if not stem:
        return dict(wanted)
    x = wanted[stem]
    return {**wanted, stem: x[:, :1].expand(-1, 3, *x.shape[2:])}


def _tensor_bytes(state: Any) -> int:
    """The memory of all tensors in nested dicts, lists and tuples, each storage once."""
    storages: dict[int, int] = {}
    pending = [state]
    while pending:
        node = pending.pop()
        if isinstance(node, torch.Tensor):
            storage = node.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(node, dict):
            pending.extend(node.values())
        elif isinstance(node, (list, tuple)):
            pending.extend(node)
    return sum(storages.values())
