"""A run's log: what a reader follows is on the terminal, all of it in log.txt, and what is looked
up, in files of its own: the environment, the config, the modules.

It is what Detectron2's `default_setup` does by the same functions, but that prints all of these.
"""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from fpn_plugin.config.pixels import FILE_ONLY
from fpn_plugin.report.mistakes import mistake_of

ENVIRONMENT, MODULES = "environment.txt", "model.txt"
# Loggers of which the terminal gets warnings alone: how data is stored, sampled and collated, names
# in checkpoints, and results once more as a table for spreadsheets
_QUIET = (
    "detectron2.data.",
    "detectron2.checkpoint.",
    "detectron2.engine.defaults",
    "detectron2.evaluation.testing",
    "fvcore.",
)

logger = logging.getLogger(__name__)


class _Terminal(logging.Filter):
    """What a log's stream to the terminal lets pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] and mistake_of(record.exc_info[1]):
            return False  # its message is the last line of the command
        if record.levelno >= logging.WARNING:
            return True
        return not record.name.startswith(_QUIET) and not getattr(record, FILE_ONLY, False)


_TERMINAL = _Terminal()


def set_up_logger(name: str, folder: str, on_terminal: bool = True) -> None:
    """Let a package's loggers write to a folder's log.txt and, in the main process, to the
    terminal."""
    named = setup_logger(folder, comm.get_rank(), name=name, configure_stdout=on_terminal)
    for handler in named.handlers:
        if getattr(handler, "stream", None) in (sys.stdout, sys.__stdout__):
            handler.addFilter(_TERMINAL)


def begin_log(folder: str, seed: int, cudnn_benchmark: bool) -> None:
    """Set up the logs of Detectron2, and this process's random numbers; in the main process also
    write the environment to its file.

    Args:
        seed: of the run; each process has its own. Negative: random.
        cudnn_benchmark: whether cuDNN tries out which algorithms are fastest.
    """
    if comm.is_main_process():
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, ENVIRONMENT).write_text(collect_env_info() + "\n", encoding="utf-8")
    set_up_logger("fvcore", folder)
    set_up_logger("detectron2", folder)
    program = "fpn" if Path(sys.argv[0]).name == "__main__.py" else sys.argv[0]
    logger.info("Command: %s", shlex.join([program, *sys.argv[1:]]))
    seed_all_rng(None if seed < 0 else seed + comm.get_rank())
    torch.backends.cudnn.benchmark = cudnn_benchmark


def write_modules(folder: str, model: nn.Module) -> None:
    """Write the tree of a model's modules to its file."""
    Path(folder, MODULES).write_text(f"{model}\n", encoding="utf-8")
