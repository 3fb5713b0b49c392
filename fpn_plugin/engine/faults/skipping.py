"""`DATALOADER.ON_ERROR`: training images that cannot be read stop the run, or are replaced."""

from __future__ import annotations

import errno
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterator

from detectron2.engine import HookBase
from detectron2.utils import comm

from fpn_plugin.checkpoint.checkpointer import write_atomically
from fpn_plugin.data.image_checks import READ_ERRORS, read_fault
from fpn_plugin.registry import unknown_name

logger = logging.getLogger(__name__)

KEY = "DATALOADER.ON_ERROR"
ON_ERROR = ("raise", "skip")
REPORT = "skipped.json"
# the key of a sample under which the images that it replaces are listed: pairs of file and error
SKIPPED = "skipped"
# errors of the machine, not of the image
_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class ImageError(ValueError):
    """An image cannot be read or mapped; the message names the file."""


def check_on_error(value: str) -> str:
    """The value of `DATALOADER.ON_ERROR`.

    Raises:
        KeyError: if it is unknown.
    """
    if value not in ON_ERROR:
        raise unknown_name(KEY, value, ON_ERROR)
    return value


def image_fault(error: Exception) -> str | None:
    """What is wrong with an image for which a mapper raised one of `READ_ERRORS`.

    Returns:
        a text, or None if the machine is at fault: no memory, too many open files.
    """
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
        return None
    return f"{type(error).__name__}: {read_fault(error)}"


class TestMapper:
    """A mapper whose errors name the test image. None is skipped, as AP is over all of them.

    Args:
        mapper: a dataset dict -> the model's input.
        dataset: the dataset's name.
    """

    __test__ = False  # not a test class for pytest

    def __init__(self, mapper: Callable[[dict], Any], dataset: str) -> None:
        self.mapper = mapper
        self.dataset = dataset

    def __call__(self, record: dict) -> Any:
        try:
            return self.mapper(record)
        except READ_ERRORS as error:
            fault = image_fault(error)
            if fault is None:
                raise
            raise ImageError(
                f"test image {record['file_name']} of {self.dataset} (DATASETS.TEST) cannot be"
                f" used: {fault}. {KEY} 'skip' is for training alone: AP needs all test images"
            ) from error


class CountedLoader:
    """A training loader that passes the records of skipped images to a :class:`SkipCounter`."""

    def __init__(self, loader: Any, counter: SkipCounter) -> None:
        self.loader = loader
        self.counter = counter

    @property
    def dataset(self) -> Any:
        """The loader's own."""
        return self.loader.dataset

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            for sample in batch:
                if SKIPPED in sample:
                    self.counter.pending += sample.pop(SKIPPED)
            yield batch


class SkipCounter(HookBase):
    """Counts the skipped images of all processes, and lists them in `skipped.json`.

    An image counts each time that it had to be replaced in a batch that the run trained on. The
    counts are part of the checkpoint, so a run that was killed and resumed has those of an unbroken
    one. The file is written when an image is skipped for the first time, and at the end, when the
    log lists the images as well.

    Args:
        folder: where the file is written.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.pending: list[tuple[str, str]] = []  # of the current batch
        self._times: Counter[str] = Counter()
        self._errors: dict[str, str] = {}

    def after_step(self) -> None:
        """Called by the trainer after each iteration, before the checkpoint's hook."""
        skipped = [pair for pairs in comm.gather(self.pending) for pair in pairs]
        self.pending = []
        fresh = sorted({pair for pair in skipped if pair[0] not in self._times})
        for file, fault in skipped:
            self._times[file] += 1
            self._errors.setdefault(file, fault)
        for file, fault in fresh:
            logger.warning("Training image %s is skipped: %s", file, fault)
        if fresh:
            self._write()

    def after_train(self) -> None:
        """Called by the trainer at the end, also after an error."""
        if self._times and comm.is_main_process():
            self._write()
            lines = [
                f"{n} x {file}: {self._errors[file]}" for file, n in sorted(self._times.items())
            ]
            logger.warning(
                "%s 'skip': %d training images were replaced, %d times in all (%s):\n  %s",
                *(KEY, len(lines), sum(self._times.values()), REPORT, "\n  ".join(lines)),
            )

    def _write(self) -> None:
        report = json.dumps(self._report(), indent=1, sort_keys=True).encode() + b"\n"
        write_atomically(Path(self.folder, REPORT), lambda file: file.write(report))

    def _report(self) -> dict[str, dict[str, Any]]:
        return {
            file: {"times": times, "error": self._errors[file]}
            for file, times in self._times.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The counts go into the checkpoint."""
        return self._report()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counts of the run that goes on."""
        self._times = Counter({file: entry["times"] for file, entry in state.items()})
        self._errors = {file: entry["error"] for file, entry in state.items()}
