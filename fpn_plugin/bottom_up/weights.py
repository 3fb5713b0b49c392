"""Loading a local weight file into a bottom-up network."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from fpn_plugin.paths import find_file

KEY = "MODEL.BOTTOM_UP.WEIGHTS"
logger = logging.getLogger(__name__)


def load_weights(module: nn.Module, path: str, key: str = KEY, prefix: str = "") -> list[str]:
    """Load a state dict into `module` by name, and log what matched, was missing, or was left over.

    A checkpoint that wraps its weights in `model` or `state_dict` is unwrapped. The file is read
    without running code from it.

    Args:
        key: the config key or option that named the file, for messages.
        prefix: what the names in the file may have before the network's own.

    Returns:
        the names of the network's tensors that the file does not have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if nothing in it matches, or a tensor has another shape than the network's.
    """
    tensors = read_state_dict(path, key)
    given = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    wanted = module.state_dict()
    wrong = [
        f"{name} is {tuple(given[name].shape)} in the file, {tuple(wanted[name].shape)} in"
        " the network"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if wrong:
        raise ValueError(f"{key}: {path} does not fit: {'; '.join(wrong[:5])}")
    matched = [name for name in wanted if name in given]
    if not matched:
        raise ValueError(
            f"{key}: nothing in {path} matches the network: it has {_few(given)}, the"
            f" network has {_few(wanted)}"
        )
    module.load_state_dict({name: given[name] for name in matched}, strict=False)
    missing = [
        name for name in wanted if name not in given and not name.endswith("num_batches_tracked")
    ]
    unused = [
        name for name in given if name not in wanted and not name.endswith("num_batches_tracked")
    ]
    logger.info("%s: %s: %d tensors matched", key, path, len(matched))
    if missing:
        logger.warning(
            "%s: %d tensors of the network are not in the file: %s",
            key,
            len(missing),
            _few(missing),
        )
    if unused:
        logger.info("%s: %d tensors of the file are not used: %s", key, len(unused), _few(unused))
    return missing


def read_state_dict(path: str, key: str = KEY) -> dict[str, Tensor]:
    """The tensors of a weight file by name; runs no code from it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a state dict.
    """
    file = find_file(path, key)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises many kinds here, all meaning "not a plain weight file"
        raise ValueError(f"{key}: {path} cannot be read as plain weights: {error}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(
        isinstance(value, Tensor) for value in loaded.values()
    ):
        raise ValueError(f"{key}: {path} holds no state dict (names with tensors)")
    return loaded


def _few(names: object, count: int = 4) -> str:
    listed = list(names)  # type: ignore[call-overload]
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")
