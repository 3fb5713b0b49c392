"""`MODEL.FPN.WARM_START`: loads a checkpoint into a model with a different pyramid.

The model holds both pyramids (`fpn_plugin.pyramid.warm`), so the weights need new names only, and
other channels where the width differs (`widths.py`). The log says of every node whether its weights
are copied, adapted or fresh, and of every output whether its function is preserved.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Iterable, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from fpn_plugin.checkpoint.files import read_state_dict
from fpn_plugin.checkpoint.load import adapt_image_channels
from fpn_plugin.config.warm_start import FROM, KEY, WEIGHTS
from fpn_plugin.engine.warm.widths import INEXACT, UNEVEN, resize, shapes_at_width
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.pyramid.warm import GATE, PREFIX, Origin, WarmPyramid

logger = logging.getLogger(__name__)

COPIED, ADAPTED, FRESH = "copied", "adapted", "fresh"
RECURSION = (
    "rfp."  # before the names of what a recursive pyramid has beside a network and a pyramid
)
EXACTLY, ROUNDED, LOST = "exactly", "up to rounding", "no"


def start_warm(model: nn.Module, cfg: CfgNode) -> None:
    """Load `MODEL.WEIGHTS` into a model with another pyramid, and log what became of every node.

    Args:
        model: built from `cfg`, which has `MODEL.FPN.WARM_START`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the key, if it is no checkpoint, or not one of the pyramid in the config.
    """
    path, width = cfg.MODEL.WEIGHTS, cfg.MODEL.FPN.OUT_CHANNELS
    old = cfg.MODEL.FPN.WARM_START_FROM.get("OUT_CHANNELS", width)
    shapes = shapes_at_width(cfg, old) if old != width else None
    load_adapted(model, path, shapes)


def load_adapted(
    model: nn.Module,
    path: str,
    shapes: Mapping[str, torch.Size] | None = None,
    key: str = WEIGHTS,
) -> None:
    """Load a file into a model with another pyramid. Arguments and errors are those of `WarmStart`.

    Args:
        key: the config key of the file, for messages.
    """
    start = WarmStart(model, f"{key} {path!r}", shapes)
    state = adapt_image_channels(read_state_dict(path, key), model.state_dict(), start.source)
    model.load_state_dict(start(state))


def holds_two_pyramids(model: nn.Module) -> bool:
    """Whether a model was built to start as one with another pyramid."""
    return any(isinstance(x, PyramidBackbone) and x.warm_start for x in model.modules())


def find_pyramid(model: nn.Module) -> tuple[str, PyramidBackbone]:
    """A model's pyramid, and the prefix of its tensors' names."""
    return next(
        (f"{name}.", module)
        for name, module in model.named_modules()
        if isinstance(module, PyramidBackbone)
    )


@dataclass(frozen=True)
class TensorRow:
    """What became of one tensor of the model.

    Attributes:
        group: the node, or the part of the detector, that it belongs to.
        outcome: `COPIED`, `ADAPTED` or `FRESH`.
        remark: how it was adapted, which tensor it copies, or why it is fresh.
        original: whether it belongs to what the checkpoint computes.
    """

    name: str
    group: str
    outcome: str
    remark: str = ""
    original: bool = True


class WarmStart:
    """Converts the state of a checkpoint to that of a model.

    Args:
        model: a detector with a `PyramidBackbone`.
        source: the name of the checkpoint in messages.
        shapes: the shapes of the model's tensors at the width of the checkpoint's pyramid; None if
            the width is the same.

    Attributes:
        rows: what became of each tensor, after a call.
        reasons: why the model's pyramid does not compute what the checkpoint's did; empty if it
            does.
        unused: the tensors of the checkpoint that are not in the model.

    Raises:
        ValueError: if the widths differ and there are no `shapes`.
    """

    def __init__(
        self, model: nn.Module, source: str, shapes: Mapping[str, torch.Size] | None = None
    ) -> None:
        self.model, self.source = model, source
        self.prefix, self.backbone = find_pyramid(model)
        self.warm: WarmPyramid | None = self.backbone.warm_start
        self.origins = self.warm.origins if self.warm else {}
        width = self.backbone.defaults.channels
        self.widths = (self.warm.width if self.warm else width, width)
        if shapes is None and self.widths[0] != width:
            raise ValueError(
                f"{source} has a pyramid of {self.widths[0]} channels, not {width}:"
                " another width takes MODEL.FPN.OUT_CHANNELS of a YAML config"
            )
        self.shapes = shapes or {name: x.shape for name, x in model.state_dict().items()}
        self.rows: list[TensorRow] = []
        self.reasons: list[str] = []
        self.unused: list[str] = []

    def __call__(self, checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The complete state of the model, from that of the checkpoint.

        Raises:
            ValueError: naming MODEL.WEIGHTS, if its pyramid is not that of
                MODEL.FPN.WARM_START_FROM, or nothing of it fits.
        """
        initial = self.model.state_dict()
        fits = {
            name: name in checkpoint and checkpoint[name].shape == x.shape
            for name, x in initial.items()
        }
        missing = [name for name, fit in fits.items() if not fit and not _is_constant(name)]
        # Another run may have trained both pyramids and the gates, perhaps with other heads.
        if not any(name.startswith(self.prefix) for name in missing):
            rest = f"; the heads begin anew in part: {_few(missing)}" if missing else ""
            logger.info("%s: %s has this very pyramid: nothing to do%s", KEY, self.source, rest)
            return {name: checkpoint[name] if fits[name] else x for name, x in initial.items()}
        state = dict(checkpoint) if self.warm else self._insert_bottom_up(checkpoint, initial)
        self._check(state)
        self.backbone.complete_state(state, self.prefix)
        self.rows = []
        converted = {name: self._convert(name, state, now) for name, now in initial.items()}
        self.reasons = self._reasons()
        used = {self._origin(row.name)[0] for row in self.rows if row.outcome != FRESH}
        self.unused = [name for name in state if name not in used and not _is_constant(name)]
        logger.info("%s", self.report())
        return converted

    def _insert_bottom_up(
        self, checkpoint: Mapping[str, Tensor], initial: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state of a detector without a pyramid, with `bottom_up` in the names of its network.

        In Detectron2's C4 detectors the network's last stage is part of the heads.
        """
        network = f"{self.prefix}bottom_up."
        state = {}
        for name, x in checkpoint.items():
            inner = name.removeprefix(self.prefix).removeprefix("roi_heads.")
            moved = name not in initial and network + inner in initial
            state[network + inner if moved else name] = x
        if not any(name.startswith(network) for name in state):
            raise ValueError(
                f"{self.source}: nothing of it fits the network"
                f" (MODEL.BOTTOM_UP.NAME): it has {_few(list(checkpoint))}"
            )
        return state

    def _check(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a checkpoint if a tensor of the old pyramid is missing or of another shape."""
        where = f"{self.source} is not as {FROM} says"
        if gate := next((x for x in state if x.startswith(self.prefix + GATE)), ""):
            raise ValueError(
                f"{where}: it holds two pyramids ({gate}), and other ones than this config's model;"
                " start from the first checkpoint, or take the config.yaml of its run"
            )
        for name, shape in self.shapes.items():
            source, origin = self._origin(name)
            if origin is None or not origin.exact or _is_constant(name):
                continue
            if source not in state:
                raise ValueError(f"{where}: it has no {source}")
            if state[source].shape != shape:
                raise ValueError(
                    f"{where}: {source} has the shape {tuple(state[source].shape)} in it, and"
                    f" {tuple(shape)} in that pyramid on this network (MODEL.BOTTOM_UP.NAME)"
                )

    def _origin(self, name: str) -> tuple[str, Origin | None]:
        """A tensor's name in the checkpoint, with its origin if it belongs to a pyramid; ("", None)
        for a tensor that only the new pyramid has."""
        inner = name[len(self.prefix) :]
        if not name.startswith(self.prefix) or inner.startswith(("bottom_up.", RECURSION)):
            return name, None
        path = inner
        while path and path not in self.origins:
            path = path.rpartition(".")[0]
        if not path:
            return "", None
        origin = self.origins[path]
        return self.prefix + origin.path + inner[len(path) :], origin

    def _convert(self, name: str, state: Mapping[str, Tensor], now: Tensor) -> Tensor:
        """One tensor of the model's state; adds a row that says what became of it."""
        source, origin = self._origin(name)
        group, original = self._group(name), bool(source) and (origin is None or origin.exact)
        x = state.get(source)
        if x is None and name.startswith(self.prefix + RECURSION):  # it starts as nothing
            self.rows.append(TensorRow(name, group, FRESH, "without effect at first", False))
            return now
        if x is None or x.shape != self.shapes[name]:
            remark = ""
            if x is not None:
                ours, wanted = tuple(x.shape), tuple(self.shapes[name])
                remark = f"the checkpoint's is {ours}, not {wanted}"
            is_gate = group.startswith(GATE)
            row = TensorRow(name, group, FRESH, "zero" if is_gate else remark, original)
            self.rows.append(row)
            return now if original or is_gate else _small_random(name, now)
        outcome, remarks = COPIED, [] if original else [f"from {source}"]
        if now.shape != x.shape:
            parent, _, leaf = name.rpartition(".")
            x = resize(self.model.get_submodule(parent), leaf, x, now.shape, self.widths)
            verb = "grown" if self.widths[1] > self.widths[0] else "cut"
            outcome = ADAPTED
            remarks.insert(0, "{} from {} to {} channels".format(verb, *self.widths))
        self.rows.append(TensorRow(name, group, outcome, "; ".join(remarks), original))
        return x.to(now.dtype)

    def _group(self, name: str) -> str:
        inner = name[len(self.prefix) :]
        if not name.startswith(self.prefix):
            return ".".join(name.split(".")[: 2 if name.startswith("roi_heads") else 1])
        if inner.startswith(("bottom_up.", RECURSION)):
            return inner.partition(".")[0]
        steps = [step.node.name for step in self.backbone.steps]
        return max((x for x in steps if inner.startswith((f"{x}.", f"{x}_"))), key=len)

    def _reasons(self) -> list[str]:
        if self.warm is None:
            return ["the checkpoint has no pyramid"]
        old, new = self.widths
        one_width = sorted(self.shapes.keys() ^ self.model.state_dict().keys())
        reasons = []
        if one_width:
            reasons.append(f"{_few(one_width)} is there at {old} or at {new} channels alone")
        lost = [n for n in self._lost() if n.startswith(self.prefix) and n not in one_width]
        reasons += [f"the checkpoint has no {_few(lost)}, or of another shape"] if lost else []
        if new < old:
            reasons.append(f"{old - new} of {old} channels were let go")
        elif new > old:
            inexact = sorted(self.warm.operators.intersection(INEXACT))
            reasons += [f"{name} does not pass copied channels on as they are" for name in inexact]
            uneven = sorted(self.warm.operators.intersection(UNEVEN)) if new % old else []
            reasons += [f"{name} sees {new} channels otherwise than {old}" for name in uneven]
            if new % old and self._normalises_groups():
                reasons.append(f"norms of groups see {new} channels otherwise than {old}")
        return reasons

    def _lost(self) -> list[str]:
        """The tensors of what the checkpoint computes that could not be taken from it."""
        lost = [row.name for row in self.rows if row.original and row.outcome == FRESH]
        return [name for name in lost if not _is_constant(name)]

    def _normalises_groups(self) -> bool:
        names = [row.name.rpartition(".")[0] for row in self.rows if row.outcome == ADAPTED]
        classes = {type(self.model.get_submodule(name)).__name__ for name in names}
        return bool(classes & {"GroupNorm", "LayerNorm"})

    def verdict(self) -> dict[str, str]:
        """Whether each level of the pyramid, and "the detector", computes what the checkpoint
        computed: `EXACTLY`, `ROUNDED` or `LOST`."""
        kept = EXACTLY if self.widths[0] == self.widths[1] else ROUNDED
        kept = LOST if self.reasons else kept
        gates = self.warm.gates if self.warm else {}
        levels = {name: kept if name in gates else LOST for name in self.backbone.output_shape()}
        changed = self._lost() or (self.warm and self.warm.left)
        whole = LOST if LOST in levels.values() or changed else kept
        return {**levels, "the detector": whole}

    def report(self) -> str:
        """A line per node and part of the detector, and one per output."""
        lines = _node_lines(self.rows, [step.node.name for step in self.backbone.steps])
        lines += _verdict_lines(self.verdict(), self.warm.gates if self.warm else {})
        lines += [f"not preserved: {reason}" for reason in self.reasons]
        heads = [name for name in self._lost() if not name.startswith(self.prefix)]
        lines += [f"not preserved: the heads begin anew in part: {_few(heads)}"] if heads else []
        if self.warm and self.warm.left:
            lines.append(f"not preserved: the heads get no {_few(self.warm.left)} any more")
        lines += [f"in the checkpoint alone: {_few(self.unused)}"] if self.unused else []
        head = f"{KEY} from {self.source}, node by node:"
        return "\n  ".join([head, *lines])


def _is_constant(name: str) -> bool:
    """Whether a tensor follows from the config, so that a checkpoint need not have it."""
    constants = ("num_batches_tracked", "pixel_mean", "pixel_std")
    return name.endswith(constants) or "anchor_generator." in name


def _small_random(name: str, now: Tensor) -> Tensor:
    """A new weight, small and random where it would start at zero.

    A zero weight behind a gate that is zero gets no gradient until the gate has moved, and what is
    before it gets none until the weight has moved as well.
    """
    if not name.endswith("weight") or now.any():
        return now
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(now.shape, generator=generator) * 0.01).to(now)


def _few(names: Sequence[str], count: int = 3) -> str:
    """The first few names as a text."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _node_lines(rows: Iterable[TensorRow], nodes: Iterable[str]) -> list[str]:
    """A line per node and per part of the detector.

    Args:
        nodes: all nodes of the pyramid, including those without parameters.
    """
    groups: dict[str, list[TensorRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    for name in nodes:
        groups.setdefault(name, [])
    return [_line(_label(name), _summary(group)) for name, group in groups.items()]


def _verdict_lines(kept: Mapping[str, str], gates: Mapping[str, str]) -> list[str]:
    """A line per level of the pyramid, and one for the detector.

    Args:
        kept: `EXACTLY`, `ROUNDED` or `LOST` by level, and for "the detector".
        gates: the gate of each level that the checkpoint's pyramid has too; "" if it needs none.
    """
    lines = []
    for name, how in kept.items():
        text = f"the checkpoint's function: {how}"
        if name in gates:
            text += f" ({gates[name]} lets the new pyramid in)" if gates[name] else " (as it was)"
        lines.append(_line(name, text))
    return lines


def _line(name: str, text: str) -> str:
    return f"{name:<28} {text}"


def _label(name: str) -> str:
    return f"{name[len(PREFIX):]} (old)" if name.startswith(PREFIX) else name


def _summary(rows: list[TensorRow]) -> str:
    if not rows:
        return "nothing to learn"
    texts = []
    for outcome in (COPIED, ADAPTED, FRESH):
        matching = [row for row in rows if row.outcome == outcome]
        remarks = list(dict.fromkeys(row.remark for row in matching if row.remark))
        if matching:
            count = "" if len(matching) == len(rows) else f" {len(matching)} of {len(rows)}"
            texts.append(f"{outcome}{count}" + (f" ({_few(remarks, 2)})" if remarks else ""))
    return ", ".join(texts)
