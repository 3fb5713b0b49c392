"""The forms of checkpoint files that Detectron2 takes, read without running code of theirs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from fpn_plugin.plain_files import is_torch_file, read_plain

logger = logging.getLogger(__name__)


def read_checkpoint(filename: str) -> dict[str, Any]:
    """What a checkpoint file holds, by name.

    Raises:
        ValueError: naming the file, if it cannot be read as plain data, or holds no names.
    """
    loaded = read_plain(Path(filename), f"checkpoint {filename}")
    if not isinstance(loaded, dict):
        raise _no_state_dict(filename)
    return loaded


def check_model(state: Any, filename: str) -> None:
    """Refuse what is no state dict.

    Raises:
        ValueError: naming the file, and the entry that is no tensor of numbers.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise _no_state_dict(filename)
    for name, value in state.items():
        numeric = isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
        if not numeric and not isinstance(value, torch.Tensor):
            raise ValueError(
                f"checkpoint {filename}: {name!r} is a {type(value).__name__}, not a tensor of"
                " numbers; load the file yourself and save its state dict alone"
            )


def conversion(filename: str) -> Callable[[str], dict[str, Any]] | None:
    """What reads a file that Detectron2 would read by itself, by the file's name."""
    if filename.endswith(".pkl"):
        return _read_torch if is_torch_file(Path(filename)) else _read_pickle
    return _read_pycls if filename.endswith(".pyth") else None


def _read_torch(filename: str) -> dict[str, Any]:
    loaded = read_checkpoint(filename)
    return loaded if "model" in loaded else {"model": loaded}


def _read_pickle(filename: str) -> dict[str, Any]:
    """A pickle of Detectron2's zoo as it is; one of Caffe2 as Detectron2 takes it."""
    loaded = read_checkpoint(filename)
    if "model" in loaded and "__author__" in loaded:
        logger.info("Reading a file from %r", loaded["__author__"])
        return loaded
    blobs = loaded.get("blobs", loaded)
    if not isinstance(blobs, dict):
        raise _no_state_dict(filename)
    weights = {name: blobs[name] for name in blobs if not str(name).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _read_pycls(filename: str) -> dict[str, Any]:
    state = read_checkpoint(filename).get("model_state")
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {filename}: pycls' files have a 'model_state', this has none")
    weights = {k: state[k] for k in state if not str(k).endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _no_state_dict(filename: str) -> ValueError:
    return ValueError(f"checkpoint {filename} holds no state dict (names with tensors)")
