"""What stops a run from outside (a full disk, a killed worker, no memory) as errors that say what
to do about it."""

from __future__ import annotations

import contextlib
import logging
import re
from typing import Callable, Iterator, Sequence

import torch
from detectron2.config import CfgNode

from fpn_plugin.checkpoint.checkpointer import SaveError, disk_full_error

logger = logging.getLogger(__name__)

# torch has no class for it: the texts of its SIGCHLD handler, and of its loader on a timeout
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) .*")
# the text of DDP's errors where a promise of SOLVER.DDP.STATIC_GRAPH is broken
_CHANGED_GRAPH = "not compatible with static_graph"
# in a RuntimeError: torch has a class of its own for CUDA's allocator only
_OUT_OF_MEMORY = ("out of memory", "defaultcpuallocator", "alloc_failed")


class WorkerError(RuntimeError):
    """A process that loads data died."""


class OutOfMemoryError(torch.cuda.OutOfMemoryError):
    """Memory ran out; the message says what to lower."""


@contextlib.contextmanager
def actionable_errors(
    activity: str,
    folder: str,
    memory_hints: Callable[[], Sequence[str]],
    workers_key: str = "DATALOADER.NUM_WORKERS",
) -> Iterator[None]:
    """Replace errors that have their cause outside the run by ones that say what to do.

    Args:
        activity: what runs inside, for messages: "training", for instance.
        folder: the run's folder.
        memory_hints: gives what may help when memory runs out.
        workers_key: the config key of the number of workers.

    Raises:
        SaveError: if there was no room for what was to be written.
        WorkerError: if a process that loads data died.
        OutOfMemoryError: if memory ran out.
        ValueError: if a step used other parameters than the first, against `STATIC_GRAPH`.
    """
    try:
        yield
    except (SaveError, WorkerError, OutOfMemoryError):  # from an evaluation during training
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        better: Exception | None = None
        if isinstance(error, OSError):
            better = disk_full_error(error, folder)
        elif dead_worker := _DEAD_WORKER.search(str(error)):
            better = _worker_error(dead_worker[0], folder, workers_key)
        elif is_out_of_memory(error):
            better = _memory_error(error, activity, memory_hints())
        elif _CHANGED_GRAPH in str(error):
            better = ValueError(
                "SOLVER.DDP.STATIC_GRAPH (in a Python config train.ddp.static_graph): True, but a"
                " step of this model used other parameters than the first one: set it to False"
            )
        if better is None:
            raise
        raise better from error


def _worker_error(event: str, folder: str, workers_key: str) -> WorkerError:
    return WorkerError(
        f"{event.rstrip('. ')}. A worker that was killed often means that the system ran out of"
        f" memory (see the system's log): try a lower {workers_key} or DATALOADER.PREFETCH_FACTOR."
        f" What was saved in {folder} is unchanged: --resume goes on from there"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _OUT_OF_MEMORY)


def _memory_error(error: BaseException, activity: str, hints: Sequence[str]) -> OutOfMemoryError:
    head = f"Out of memory while {activity}: {str(error) or type(error).__name__}"
    head += "\nWhat to lower, the first that you can do without:"
    text = "\n- ".join([head, *hints])
    logger.error(text)  # for the log file; the traceback begins with the original error
    return OutOfMemoryError(text)


def training_hints(cfg: CfgNode, sizes: Sequence[tuple[int, ...]] = ()) -> list[str]:
    """What saves memory in training, with the present values of the keys.

    Args:
        sizes: heights and widths in pixels of the last batch's images.
    """
    solver, fpn, inputs = cfg.SOLVER, cfg.MODEL.FPN, cfg.INPUT
    side = f"INPUT.MIN_SIZE_TRAIN ({inputs.MIN_SIZE_TRAIN}) and MAX_SIZE_TRAIN"
    side += f" ({inputs.MAX_SIZE_TRAIN})"
    if inputs.LSJ.ENABLED:
        side = f"INPUT.LSJ.IMAGE_SIZE ({inputs.LSJ.IMAGE_SIZE})"
    hints = [
        f"SOLVER.IMS_PER_BATCH ({solver.IMS_PER_BATCH}), and SOLVER.BASE_LR ({solver.BASE_LR:g}) in"
        " proportion",
        f"or take a larger SOLVER.ACCUMULATE ({solver.ACCUMULATE}): the same batch in more parts",
        f"{side}{describe_sizes(sizes)}",
    ]
    if not solver.AMP.ENABLED:
        hints.append("or take SOLVER.AMP.ENABLED True: half of most maps")
    if not fpn.RECOMPUTE:
        hints.append("or take MODEL.FPN.RECOMPUTE True, for a pyramid whose fusions have weights")
    hints.append(f"MODEL.FPN.OUT_CHANNELS ({fpn.OUT_CHANNELS})")
    return hints


def evaluation_hints(cfg: CfgNode) -> list[str]:
    """What saves memory in evaluation, with the present values of the keys."""
    inputs = cfg.INPUT
    hints = [
        f"INPUT.MIN_SIZE_TEST ({inputs.MIN_SIZE_TEST}) and MAX_SIZE_TEST ({inputs.MAX_SIZE_TEST})",
        f"TEST.DETECTIONS_PER_IMAGE ({cfg.TEST.DETECTIONS_PER_IMAGE}), where each has a mask",
    ]
    if not cfg.SOLVER.AMP.ENABLED:
        hints.append("or take SOLVER.AMP.ENABLED True")
    return hints


def describe_sizes(sizes: Sequence[tuple[int, ...]]) -> str:
    """The end of a hint: heights and widths in pixels of the last batch's images."""
    images = ", ".join("x".join(map(str, size)) for size in sizes)
    return f"; the last batch's images, height x width: {images}" if images else ""
