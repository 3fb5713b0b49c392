"""Going on from a checkpoint: what it was made with is compared before anything of it is loaded.

torch loads an optimizer's state into whatever parameters have the same place in its groups; of
other shapes it breaks the process's memory, of other meaning the training. The options of the
optimizer are those of the config, not those in the checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch.optim import Optimizer

from fpn_plugin.checkpoint.checkpointer import Checkpointer
from fpn_plugin.checkpoint.fit import find_misfits
from fpn_plugin.checkpoint.plain import read_plain
from fpn_plugin.checkpoint.record import optimizer_name, record_of
from fpn_plugin.checkpoint.run_folder import config_of_checkpoint, flatten

logger = logging.getLogger(__name__)

# Keys that decide what a model or an optimizer consists of, or what its outputs mean …
_DECISIVE = (
    "MODEL.",
    "DATASETS.CLASSES.NAMES",
    "DATASETS.KEYPOINTS.NAMES",
    "SOLVER.OPTIMIZER",
    "SOLVER.BIAS_LR_FACTOR",
    "SOLVER.WEIGHT_DECAY_BIAS",
    "SOLVER.WEIGHT_DECAY_NORM",
    "model.",
    "optimizer.",
    "train.classes.names",
)
# … but for these.
_INDECISIVE = (
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.BOTTOM_UP.WEIGHTS",
    "MODEL.BOTTOM_UP.PIXELS",
    "MODEL.EMA.ENABLED",
    "MODEL.EMA.DECAY",
    "MODEL.EMA.DECAY_WARM_UP_FACTOR",
    "model.backbone.bottom_up.weights",
    "optimizer.lr",
    "optimizer.params.model",
)
_MEANINGS = {
    "DATASETS.CLASSES.NAMES": "classes",
    "DATASETS.KEYPOINTS.NAMES": "keypoints",
    "train.classes.names": "classes",
}
# of an optimizer's state: tensors that have the shape of their parameter
_MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# of a trainer's state: what it can do without
_OPTIONAL_STATES = {"hooks", "grad_scaler"}
_RATES = ("lr", "initial_lr")


class ResumeError(ValueError):
    """A checkpoint was made with something else than what would go on from it."""


def resume_run(checkpointer: Checkpointer, optimizer: Optimizer) -> None:
    """Load the last whole checkpoint of a run: the model, the optimizer's state and the rest.

    Args:
        checkpointer: with the run's record, and a folder that has a checkpoint.
        optimizer: the one in the checkpointer's checkpointables.

    Raises:
        ResumeError: before anything is loaded, if the checkpoint was made with another model,
            optimizer or other classes.
    """
    path = checkpointer.get_checkpoint_file()
    require_resumable(path, checkpointer, optimizer)
    with _configured_options(optimizer):
        checkpointer.load(path)
    _match_layouts(optimizer)


def warn_of_finished(
    checkpointer: Checkpointer, done: int, key: str, max_iter: int, output: str = "OUTPUT_DIR"
) -> None:
    """Say that a run is finished, and what to do to go on.

    Args:
        done: the number of iterations of its checkpoint.
        key: the config key of `max_iter`, for the message.
        output: the config key of the folder.
    """
    name = Path(checkpointer.get_checkpoint_file()).name
    logger.warning(
        "%s %s: the run is finished, nothing is left to train: %s has seen %d iterations and %s is"
        " %d. Raise %s to go on",
        *(output, checkpointer.save_dir, name, done, key, max_iter, key),
    )


def require_resumable(path: str, checkpointer: Checkpointer, optimizer: Optimizer) -> None:
    """Refuse a checkpoint from which a run cannot go on.

    Args:
        path: of the checkpoint, which may be an old one without a record.
        checkpointer: and `optimizer`: of the run that would go on.

    Raises:
        ResumeError: with what differs, the config keys that have changed, and the ways on.
    """
    checkpoint = read_plain(Path(path), path, mmap=True)
    recorded = record_of(checkpoint)
    before = flatten(config_of_checkpoint(path))
    now = flatten(checkpointer.record.get("config", {}))
    misfits = [
        *_changed_meanings(before, now),
        *_model_misfits(checkpointer.model, checkpoint.get("model", checkpoint)),
        *_state_misfits(checkpoint, checkpointer),
        *_optimizer_misfits(checkpoint, recorded, checkpointer, optimizer),
    ]
    if misfits:
        more = f", and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ResumeError(
            f"{path} cannot be resumed, nothing was loaded: {'; '.join(misfits[:3])}{more}."
            f" {_ways_on(path, before, now)}"
        )


def _changed_meanings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    texts = []
    for key, noun in _MEANINGS.items():
        old, new = before.get(key), now.get(key)
        if old and new and old != new:
            texts.append(f"its {noun} were {_listed(old)} and are now {_listed(new)}")
    return texts


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names[:10]))
    return f"[{shown}, … {len(names)} in all]" if len(names) > 10 else f"[{shown}]"


def _model_misfits(model: torch.nn.Module, state: Mapping[str, Any]) -> list[str]:
    misfits = find_misfits(model, state)
    return [
        *(
            f"{name} is {tuple(old)} in the checkpoint and {tuple(new)} in the model"
            for name, old, new in misfits.shapes
        ),
        *(f"{name} is not in the checkpoint" for name in misfits.missing),
        *(f"{name} is not in the model" for name in misfits.left_over),
    ]


def _state_misfits(checkpoint: Mapping[str, Any], checkpointer: Checkpointer) -> list[str]:
    """What a trainer needs to go on and a file of weights, or another trainer's, does not have."""
    texts = []
    for name, owner in checkpointer.checkpointables.items():
        state = checkpoint.get(name)
        lacking = owner.state_dict().keys() - _OPTIONAL_STATES - (state or {}).keys()
        if state is None:
            texts.append(f"it has no state of a {name}, which counts iterations")
        elif lacking:
            names = ", ".join(sorted(lacking))
            texts.append(f"the state of its {name} has no {names}: it was another kind of trainer")
    return texts


def _optimizer_misfits(
    checkpoint: Mapping[str, Any],
    recorded: Mapping[str, Any],
    checkpointer: Checkpointer,
    optimizer: Optimizer,
) -> list[str]:
    state = _find_optimizer_state(checkpoint)
    if state is None:
        return []
    old, new = recorded.get("optimizer", ""), optimizer_name(optimizer)
    saved, groups = state["param_groups"], optimizer.param_groups
    lost = {key for group in saved for key in group} - {key for g in groups for key in g}
    lost -= {*_RATES, "param_names"}
    if (old and old != new) or (not old and lost):
        return [f"its optimizer was {old or 'another'} and is now {new}"]
    named = _name_misfits(recorded.get("parameters", []), checkpointer.record.get("parameters", []))
    if named:
        return named
    sizes, wanted = [[len(group["params"]) for group in side] for side in (saved, groups)]
    if sizes != wanted:
        return [f"its optimizer had groups of {sizes} parameters and now has groups of {wanted}"]
    parameters = [parameter for group in groups for parameter in group["params"]]
    numbers = [number for group in saved for number in group["params"]]
    moments = [
        (tuple(value.shape), tuple(parameter.shape))
        for number, parameter in zip(numbers, parameters)
        for key, value in state["state"].get(number, {}).items()
        if key in _MOMENTS and value is not None
    ]
    return [
        f"its optimizer has a state of {old} for a parameter of {new}"
        for old, new in moments
        if old != new
    ]


def _name_misfits(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """How the names of an optimizer's parameters differ; a checkpoint may not have them."""
    if not old or list(old) == list(new):
        return []
    frozen = [f"{name} was trained and is not any more" for name in old if name not in set(new)]
    thawed = [f"{name} was not trained and is now" for name in new if name not in set(old)]
    order = "its optimizer had the parameters in other groups or in another order"
    return [*frozen, *thawed] or [order]


def _find_optimizer_state(node: Any) -> Mapping[str, Any] | None:
    """The state of the optimizer in a checkpoint, wherever a trainer has put it."""
    if not isinstance(node, Mapping):
        return None
    if {"state", "param_groups"} <= node.keys():
        return node
    states = (_find_optimizer_state(value) for key, value in node.items() if key != "model")
    return next((state for state in states if state is not None), None)


def _ways_on(path: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [
        key
        for key in now
        if key.startswith(_DECISIVE)
        and key not in _INDECISIVE
        and before.get(key, now[key]) != now[key]
    ]
    if changed:
        texts = [f"{key} {before[key]!r} -> {now[key]!r}" for key in changed]
        difference = f"The config differs from the checkpoint's: {'; '.join(texts)}."
    elif before:
        difference = (
            "The config is the checkpoint's, so another version of the code or of a library, or"
            " your own code, made it."
        )
    else:
        difference = "What config it was made with is not recorded."
    lazy = "MODEL.META_ARCHITECTURE" not in now
    output, weights = (
        ("train.output_dir", "train.init_checkpoint") if lazy else ("OUTPUT_DIR", "MODEL.WEIGHTS")
    )
    warm = ""
    if not lazy and any(key.startswith("MODEL.FPN.") for key in changed):
        warm = (
            "; with MODEL.FPN.WARM_START True it starts as the model with the old pyramid, and the"
            " new one is blended in"
        )
    return (
        f"{difference} Go on with the old values, or start a new run from its weights, without"
        f" --resume: another {output}, and {weights} {path}{warm}"
    )


@contextlib.contextmanager
def _configured_options(optimizer: Optimizer) -> Iterator[None]:
    """Within it, an optimizer that loads a state keeps the options that it was made with.

    torch would take those of the checkpoint: its rate, decay and momentum, and its kernels (fused).
    A rate that a schedule has lowered stays as much lower. Optimizers that are not torch's may keep
    a state of theirs among the options, which is loaded.
    """
    kind = type(optimizer)
    while kind.__name__.endswith("WithGradientClip"):  # Detectron2's
        kind = kind.__bases__[0]
    if not kind.__module__.startswith("torch.optim"):
        yield
        return
    handle = optimizer.register_load_state_dict_pre_hook(_with_own_options)
    try:
        yield
    finally:
        handle.remove()


def _with_own_options(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(optimizer.param_groups, state["param_groups"])
    return {**state, "param_groups": [_merge_group(ours, saved) for ours, saved in pairs]}


def _merge_group(ours: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in ours.items() if key not in ("params", *_RATES)}
    merged = {**saved, **options}
    base = ours.get("initial_lr", ours["lr"])
    old = saved.get("initial_lr", base)
    if old != base:
        share = saved["lr"] / old if old else 1.0
        merged |= {"initial_lr": base, "lr": base * share if math.isfinite(share) else base}
    return merged


def _match_layouts(optimizer: Optimizer) -> None:
    """Give tensors of an optimizer's state the memory layout of their parameters.

    It is another one where `MODEL.CHANNELS_LAST` has changed.
    """
    for parameter, state in optimizer.state.items():
        for key in _MOMENTS:
            moment = state.get(key)
            if moment is not None and moment.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
