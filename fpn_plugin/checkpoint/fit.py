"""How well a checkpoint fits a model: what evaluation refuses, and what training starts with."""

from __future__ import annotations

import logging
import re
from typing import Collection, Iterable, Mapping, NamedTuple, Sequence

from torch import Tensor, nn

from fpn_plugin.checkpoint.key_matching import match_keys, network_keys
from fpn_plugin.checkpoint.load import few

logger = logging.getLogger(__name__)

# A recursive pyramid's further networks, which begin as the one below it
_COPY = re.compile(r"\.rfp\.networks\.\d+\.stages\.")
PARALLEL = "module."  # before all names, where a DistributedDataParallel was saved
PARTIAL_HELP = "evaluate although the checkpoint lacks weights of the model, or has others"


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


def find_misfits(model: nn.Module, state: Mapping[str, Tensor]) -> Misfits:
    """Compare a checkpoint's state dict with a model.

    Tensors that follow from the config do not count, nor missing ones that the model has under
    another name too.
    """
    if all(name.startswith(PARALLEL) for name in state):
        state = {name.removeprefix(PARALLEL): x for name, x in state.items()}
    wanted = {name: x for name, x in model.state_dict(keep_vars=True).items() if _counts(name)}
    loaded = {id(x) for name, x in wanted.items() if name in state}
    return Misfits(
        [name for name, x in wanted.items() if name not in state and id(x) not in loaded],
        [name for name in state if name not in wanted and _counts(name)],
        [
            (name, tuple(state[name].shape), tuple(x.shape))
            for name, x in wanted.items()
            if name in state and state[name].shape != x.shape
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
    reasons |= dict.fromkeys(misfits.missing, "is not in the checkpoint")
    lacking = [name for name in reasons if name.startswith(prefix)]
    reasons |= dict.fromkeys(misfits.left_over, "is not in the config's model")
    names = [name for name in reasons if name.startswith(prefix)]
    if not names:
        return
    texts = "; ".join(f"{name} {reasons[name]}" for name in names[:3])
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    total = sum(name.startswith(prefix) and _counts(name) for name in model.state_dict())
    text = (
        f"{title} does not fit the config: {texts}{more} (of the model's {total} tensors"
        f" {len(lacking)} are missing or differ, {len(names) - len(lacking)} are left over)"
    )
    if allow_partial:
        logger.warning("%s. What it lacks keeps its initial, mostly random values", text)
        return
    raise ValueError(
        f"{text}. Take the config.yaml of the run that wrote it; these depend on"
        f" {', '.join(_keys_behind(names))}. To go on with a model that is random in part, give"
        " --allow-partial"
    )


def report_start(
    title: str, model: nn.Module, file_names: Collection[str], misfits: Misfits
) -> None:
    """Log what of a model a file to start training from has, and what starts anew.

    Args:
        title: the key and the file, for messages.
        file_names: all names in the file.

    Raises:
        ValueError: if nothing of the file fits.
    """
    state = {name: x for name, x in model.state_dict().items() if _counts(name)}
    anew = {*misfits.missing, *(name for name, *_ in misfits.shapes)}
    loaded = [name for name in state if name not in anew]
    if state and not loaded:
        advice = _network_alone(state, file_names)
        raise ValueError(
            f"{title}: nothing of it fits the model: it has {few(list(file_names))}, the model has"
            f" {few(_examples(state))}.{advice} To start without it, set it to ''"
        )
    if not anew and not misfits.left_over:
        logger.info("%s: all %d tensors of the model are in it", title, len(state))
        return
    share = sum(state[name].numel() for name in loaded) / sum(x.numel() for x in state.values())
    shapes = [f"{name} ({a} in it, {b} in the model)" for name, a, b in misfits.shapes]
    rows = {
        "start anew": _parts(misfits.missing),
        "start anew, as their shapes differ": ", ".join(_first(shapes)),
        "left over": _parts(misfits.left_over),
    }
    text = f"{len(loaded)} of the model's {len(state)} tensors are in it"
    text += f" ({100 * share:.1f}% of its numbers)"
    text += "".join(f"\n  {status}: {names}" for status, names in rows.items() if names)
    logger.log(_level(state, anew), "%s: %s", title, text)


def _level(state: Collection[str], anew: Collection[str]) -> int:
    """INFO where all is there, or all but parts that usually start anew: the heads, or the pyramid
    and the heads."""
    parts: dict[str, set[bool]] = {}
    network = set(network_keys(state))
    for name in state:
        part = "network" if name in network or _COPY.search(name) else name.split(".")[0]
        parts.setdefault(part, set()).add(name in anew)
    is_whole = parts.pop("network", {False}) == {False}
    return (
        logging.INFO if is_whole and all(len(x) == 1 for x in parts.values()) else logging.WARNING
    )


def _parts(names: Iterable[str]) -> str:
    """The parts of a detector that these tensors belong to, with their numbers."""
    counts: dict[str, int] = {}
    for name in names:
        words = name.split(".")[:-1] or [name]
        # `backbone.fpn_lateral2`, `roi_heads.box_head`, `proposal_generator`
        depth = 2 if words[0] in ("backbone", "roi_heads", "head") else 1
        part = ".".join(words[:depth])
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(_first([f"{part} ({count})" for part, count in counts.items()], 12))


def _first(texts: Sequence[str], count: int = 3) -> list[str]:
    more = [f"and {len(texts) - count} more"] if len(texts) > count else []
    return [*texts[:count], *more]


def _examples(state: Collection[str]) -> list[str]:
    """A name of each part of a model."""
    return list({name.split(".")[0]: name for name in reversed(list(state))}.values())[::-1]


def _network_alone(state: Collection[str], file_names: Collection[str]) -> str:
    """Where the names of a file are those of the network alone: which key takes them."""
    pairs = match_keys(network_keys(state), file_names).pairs
    if not pairs:
        return ""
    return " It has weights of the network alone: these go to MODEL.BOTTOM_UP.WEIGHTS."


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


def _counts(name: str) -> bool:
    return not _FOLLOWS_FROM_CONFIG.search(name)


def _keys_behind(names: Iterable[str]) -> list[str]:
    """The config keys on which it depends whether a model has these tensors, and in which shape."""
    keys: dict[str, None] = {}
    for name in names:
        keys.update(dict.fromkeys(next(ks for part, ks in _KEYS_BEHIND if re.match(part, name))))
    return list(keys)
