"""Checkpoints that survive a kill: written whole or not at all, and read only when whole.

Everything that a run must not lose is written by :func:`write_atomically`.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path, PureWindowsPath
from typing import IO, Any, Callable, Iterable, Mapping, NamedTuple, Sequence

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.logger import log_first_n
from torch import nn

from fpn_plugin.checkpoint.files import read_checkpoint
from fpn_plugin.checkpoint.finite import require_finite
from fpn_plugin.checkpoint.record import RECORD

logger = logging.getLogger(__name__)

TAG = "last_checkpoint"
PARTIAL_HELP = "evaluate although the checkpoint lacks weights of the model, or has others"
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

    No code of the files that it loads is run. The arguments are Detectron2's; `save_dir` is a local
    folder.

    Attributes:
        record: of the run, put into each checkpoint: see `fpn_plugin.checkpoint.record`.
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
        self.record: dict[str, Any] = {}
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
        states = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **states, **kwargs}
        if self.record:
            data[RECORD] = self.record
        path = Path(self.save_dir, f"{name}.pth")
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
        super().__init__(model)
        self._prefix, self._allow_partial, self._key, self._path = prefix, allow_partial, key, ""
        self._is_renamed = False

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        self._path = path
        return super().load(path, checkpointables)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self._is_renamed = bool(checkpoint.get("matching_heuristics"))
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        left_over = [] if self._is_renamed else incompatible.unexpected_keys
        misfits = Misfits(incompatible.missing_keys, left_over, incompatible.incorrect_shapes)
        title = f"{self._key} {self._path!r}"
        require_fit(title, self.model, misfits, self._prefix, self._allow_partial)


class Misfits(NamedTuple):
    """The names in which a checkpoint and a model differ.

    Attributes:
        missing: those that the model alone has.
        left_over: those that the checkpoint alone has.
        shapes: those of another shape, with that in the checkpoint and that in the model.
    """

    missing: Sequence[str]
    left_over: Sequence[str]
    shapes: Sequence[tuple[str, Sequence[int], Sequence[int]]]


def compare_tensors(model: nn.Module, state: Mapping[str, Any]) -> Misfits:
    """How the tensors in a checkpoint differ from a model's, but for those that need not be there.

    Args:
        state: the checkpoint's, by the model's names, or by those of the model in DDP.
    """
    prefix = "module." if state and all(name.startswith("module.") for name in state) else ""
    given = {name[len(prefix) :]: x for name, x in state.items()}
    wanted = model.state_dict()
    return Misfits(
        [name for name in wanted if name not in given and _counts(name, "")],
        [name for name in given if name not in wanted and _counts(name, "")],
        [
            (name, tuple(given[name].shape), tuple(x.shape))
            for name, x in wanted.items()
            if name in given and given[name].shape != x.shape
        ],
    )


def require_fit(
    title: str, model: nn.Module, misfits: Misfits, prefix: str = "", allow_partial: bool = False
) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of a model.

    Args:
        title: the key or option and the file that it names, for messages.
        prefix: of the names that must match; "" for all.
        allow_partial: warn instead.

    Raises:
        ValueError: naming the first tensors that do not match and the keys that they depend on.
    """
    reasons = {
        name: f"is {tuple(ours)} in the checkpoint and {tuple(wanted)} in the config's model"
        for name, ours, wanted in misfits.shapes
    }
    for name in _without_shared(model, misfits.missing):
        reasons.setdefault(name, "is not in the checkpoint")  # fvcore counts other shapes here too
    lacking = [name for name in reasons if _counts(name, prefix)]
    reasons |= dict.fromkeys(misfits.left_over, "is not in the config's model")
    names = [name for name in reasons if _counts(name, prefix)]
    if not names:
        return
    texts = "; ".join(f"{name} {reasons[name]}" for name in names[:3])
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    total = sum(_counts(name, prefix) for name in model.state_dict())
    text = (
        f"{title} does not fit the config: {texts}{more} (of the model's {total} tensors it lacks"
        f" {len(lacking)}, and it has {len(names) - len(lacking)} that the model has not)"
    )
    if allow_partial:
        logger.warning("%s. What it lacks keeps its initial, mostly random values", text)
        return
    raise ValueError(
        f"{text}. Take the config.yaml of the run that wrote it; these depend on"
        f" {', '.join(_keys_behind(names))}. To go on with a model that is random in part, give"
        " --allow-partial"
    )


# Tensors that need not be in a checkpoint, and may be, as the model has its own
_FOLLOWS_FROM_CONFIG = re.compile(
    r"num_batches_tracked$|(^|\.)pixel_(mean|std)$|anchor_generator\.cell_anchors"
)
# Which keys decide what tensors a part of a detector has; the first that matches counts
_KEYS_BEHIND = (
    (r"backbone\.bottom_up\.", ("MODEL.BOTTOM_UP", "MODEL.RESNETS")),
    (r"backbone\.(stem|res\d)\.", ("MODEL.BACKBONE.NAME", "MODEL.RESNETS")),
    (r"backbone\.", ("MODEL.FPN", "MODEL.BACKBONE.NAME")),
    (r"proposal_generator\.", ("MODEL.PROPOSAL_GENERATOR", "MODEL.RPN", "MODEL.ANCHOR_GENERATOR")),
    (r"roi_heads\.mask_head\.", ("MODEL.MASK_ON", "MODEL.ROI_MASK_HEAD", "NUM_CLASSES")),
    (r"roi_heads\.keypoint_head\.", ("MODEL.KEYPOINT_ON", "MODEL.ROI_KEYPOINT_HEAD")),
    (r"roi_heads\.box_predictor\.", ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_BOX_HEAD")),
    (r"roi_heads\.", ("MODEL.ROI_HEADS", "MODEL.ROI_BOX_HEAD")),
    (r"head\.", ("MODEL.RETINANET", "MODEL.FCOS", "MODEL.ANCHOR_GENERATOR")),
    (r"", ("MODEL.META_ARCHITECTURE",)),
)


def _counts(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and not _FOLLOWS_FROM_CONFIG.search(name)


def _keys_behind(names: Iterable[str]) -> list[str]:
    """The config keys on which it depends whether a model has these tensors, and in which shape."""
    keys: dict[str, None] = {}
    for name in names:
        keys.update(dict.fromkeys(next(ks for part, ks in _KEYS_BEHIND if re.match(part, name))))
    return list(keys)


def _without_shared(model: nn.Module, missing: Sequence[str]) -> list[str]:
    """The missing names but those of tensors that the model has under another name too, which is
    not missing."""
    absent = set(missing)
    state = model.state_dict(keep_vars=True)
    loaded = {id(x) for name, x in state.items() if name not in absent}
    return [name for name in missing if name not in state or id(state[name]) not in loaded]


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
