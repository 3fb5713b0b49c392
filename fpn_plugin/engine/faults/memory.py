"""What to lower when memory runs out."""

from __future__ import annotations

import logging
from typing import Sequence

import torch
from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# of a RuntimeError: torch has a class of its own for CUDA's allocator alone
_TEXTS = ("out of memory", "defaultcpuallocator", "alloc_failed")


class OutOfMemoryError(torch.OutOfMemoryError):
    """Memory ran out; the message says what to lower."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _TEXTS)


def memory_error(error: BaseException, doing: str, hints: Sequence[str]) -> OutOfMemoryError:
    """What to raise where memory ran out.

    Args:
        doing: what ran, for the message.
        hints: what may help.
    """
    lines = [f"Out of memory while {doing}: {str(error) or type(error).__name__}"]
    lines += ["What to lower, the first that you can do without:"]
    text = "\n- ".join(["\n".join(lines), *hints])
    logger.error(text)  # the log has it too, beside the trace of the original
    return OutOfMemoryError(text)


def training_hints(cfg: CfgNode, sizes: Sequence[tuple[int, ...]] = ()) -> list[str]:
    """What to lower in training, with the present values.

    Args:
        sizes: heights and widths in pixels of the last batch's images.
    """
    solver, fpn, inputs = cfg.SOLVER, cfg.MODEL.FPN, cfg.INPUT
    hints = [
        f"SOLVER.IMS_PER_BATCH ({solver.IMS_PER_BATCH}), and SOLVER.BASE_LR ({solver.BASE_LR:g}) in"
        " proportion",
        f"INPUT.MIN_SIZE_TRAIN ({inputs.MIN_SIZE_TRAIN}) and MAX_SIZE_TRAIN"
        f" ({inputs.MAX_SIZE_TRAIN}){shown(sizes)}",
    ]
    if not solver.AMP.ENABLED:
        hints.append("or take SOLVER.AMP.ENABLED True: half of most maps")
    if not fpn.RECOMPUTE:
        hints.append("or take MODEL.FPN.RECOMPUTE True, for a pyramid whose fusions have weights")
    hints.append(f"MODEL.FPN.OUT_CHANNELS ({fpn.OUT_CHANNELS})")
    return hints


def evaluation_hints(cfg: CfgNode) -> list[str]:
    """What to lower in evaluation, with the present values."""
    inputs = cfg.INPUT
    hints = [
        f"INPUT.MIN_SIZE_TEST ({inputs.MIN_SIZE_TEST}) and MAX_SIZE_TEST ({inputs.MAX_SIZE_TEST})",
        f"TEST.DETECTIONS_PER_IMAGE ({cfg.TEST.DETECTIONS_PER_IMAGE}), where each has a mask",
    ]
    if not cfg.SOLVER.AMP.ENABLED:
        hints.append("or take SOLVER.AMP.ENABLED True")
    return hints


def shown(sizes: Sequence[tuple[int, ...]]) -> str:
    """What a hint says of a batch's images."""
    images = ", ".join("x".join(map(str, size)) for size in sizes)
    return f"; the last batch's images, height x width: {images}" if images else ""
