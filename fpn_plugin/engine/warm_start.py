"""`MODEL.FPN.WARM_START`: a checkpoint's weights for a model whose pyramid is another one.

The model holds both pyramids (`fpn_plugin.pyramid.warm`), so this is a matter of names, and of
channels where the width differs (`widths.py`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn

from fpn_plugin.engine.warm_source import WEIGHTS, check_state
from fpn_plugin.engine.widths import INEXACT, resize
from fpn_plugin.pyramid.backbone import PyramidBackbone
from fpn_plugin.pyramid.blocks_compound import FeatureSelection
from fpn_plugin.pyramid.warm import GATE, PREFIX, Origin, WarmPyramid

logger = logging.getLogger(__name__)

COPIED, ADAPTED, FRESH = "copied", "adapted", "fresh"


@dataclass(frozen=True)
class Row:
    """What became of one tensor of the model.

    Attributes:
        group: the node, or the part of the detector, that it belongs to.
        kind: `COPIED`, `ADAPTED` or `FRESH`.
        remark: how it was adapted, or whose copy it is.
        own: whether it belongs to what the checkpoint computes.
    """

    name: str
    group: str
    kind: str
    remark: str = ""
    own: bool = True


class WarmStart:
    """Makes a model's state of a checkpoint's, and logs what became of every node.

    Args:
        model: a detector with a `PyramidBackbone` that has `warm_from`.
        path: of the checkpoint, for messages.

    Attributes:
        rows: what became of each tensor, after a call.
        reasons: why the model does not compute what the checkpoint did; none: it does.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        modules = model.named_modules()
        found = next((name, item) for name, item in modules if isinstance(item, PyramidBackbone))
        self.model, self.path = model, path
        self.prefix, self.backbone = f"{found[0]}.", found[1]
        warm = self.backbone.warm_start
        assert warm is not None  # the config has WARM_START
        self.warm: WarmPyramid = warm
        self.selections = tuple(path for path in warm.origins if self._selects(path))
        self.rows: list[Row] = []
        self.reasons: list[str] = []

    def __call__(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """The model's state, complete, from that of the checkpoint.

        Raises:
            ValueError: naming MODEL.FPN.WARM_START_FROM, if the checkpoint has another pyramid.
        """
        state = {name: torch.as_tensor(x) for name, x in given.items()}
        wanted = self.model.state_dict()
        if all(name in state and state[name].shape == x.shape for name, x in wanted.items()):
            logger.info("%s %s is of this very model: nothing is adapted", WEIGHTS, self.path)
            return state
        self._check(state, wanted)
        self.rows = []
        made = {name: self._make(name, state, x) for name, x in wanted.items()}
        self.reasons = self._reasons()
        logger.info("%s", self.report())
        return made

    def _check(self, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
        names = [(name, self._origin(name)) for name in wanted]
        sources = [source for _, (source, origin) in names if origin and origin.exact]
        check_state(state, self.path, [name for name in sources if not _counts(name)])

    def _selects(self, path: str) -> bool:
        """Whether a part is a feature selection that begins as a plain 1x1 convolution."""
        module = self.backbone.get_submodule(path)
        plain = self.warm.origins[path].operator == "conv1x1"
        return plain and isinstance(module, FeatureSelection)

    def _origin(self, name: str) -> tuple[str, Origin | None]:
        """The name in the checkpoint of what a tensor gets, and for a pyramid's what it is there;
        ("", None) for a tensor of the new pyramid alone."""
        inner = name[len(self.prefix) :]
        if not name.startswith(self.prefix) or inner.startswith("bottom_up."):
            return name, None
        path = inner
        while path and path not in self.warm.origins:
            path = path.rpartition(".")[0]
        if not path:
            return "", None
        origin, rest = self.warm.origins[path], inner[len(path) :]
        if path in self.selections:
            rest = rest.replace(".conv.", ".", 1)  # its attention has no counterpart
        return self.prefix + origin.path + rest, origin

    def _make(self, name: str, state: Mapping[str, Tensor], now: Tensor) -> Tensor:
        source, origin = self._origin(name)
        group, own = self._group(name), origin is None or origin.exact
        own = own and bool(source)
        tensor = state.get(source)
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        if tensor is not None and (source == name or origin is not None):
            widths = (self.warm.width, self.backbone.defaults.channels)
            fitted = resize(owner, leaf, tensor, now.shape, widths)
            if fitted is not None:
                self.rows.append(_row(name, group, source, fitted is tensor, widths, own))
                # an even attention makes 1.5 x of x
                even = self._selecting(name, "conv.weight")
                return (fitted / 1.5 if even else fitted).to(now.dtype)
        self.rows.append(Row(name, group, FRESH, "", own))
        if self._selecting(name, "attention.weight"):
            return torch.zeros_like(now)
        return now if own or GATE in name else _awake(name, now)

    def _selecting(self, name: str, tensor: str) -> bool:
        return name in [f"{self.prefix}{path}.{tensor}" for path in self.selections]

    def _group(self, name: str) -> str:
        inner = name[len(self.prefix) :]
        if not name.startswith(self.prefix):
            return ".".join(name.split(".")[: 2 if name.startswith("roi_heads") else 1])
        if inner.startswith("bottom_up."):
            return "bottom_up"
        steps = [step.node.name for step in self.backbone.steps]
        return max((x for x in steps if inner.startswith((f"{x}.", f"{x}_"))), key=len)

    def _reasons(self) -> list[str]:
        lost = [name for name in self._lost() if name.startswith(self.prefix)]
        reasons = [f"the checkpoint has no {few(lost)}, or of another shape"] if lost else []
        old, new = self.warm.width, self.backbone.defaults.channels
        if new < old:
            reasons.append(f"{old - new} of {old} channels were let go")
        elif new > old:
            inexact = sorted(self.warm.operators.intersection(INEXACT))
            reasons += [f"{name} does not pass copied channels on as they are" for name in inexact]
            if new % old and self._normalises_groups():
                reasons.append(f"norms of groups see {new} channels otherwise than {old}")
        return reasons

    def _lost(self) -> list[str]:
        """What the model has in common with other checkpoints, but not with this one."""
        lost = [row.name for row in self.rows if row.own and row.kind == FRESH]
        return [name for name in lost if not _counts(name) and not name.startswith("pixel_")]

    def _normalises_groups(self) -> bool:
        kept = [self.model.get_submodule(row.name.rpartition(".")[0]) for row in self.rows]
        names = ("GroupNorm", "LayerNorm")
        return any(type(module).__name__ in names for module in kept)

    def verdict(self) -> dict[str, str]:
        """What each output of the pyramid is at first: "exactly", "up to rounding" or "no"."""
        kept = "exactly" if self.backbone.defaults.channels == self.warm.width else "up to rounding"
        kept = "no" if self.reasons else kept
        return {
            name: kept if name in self.warm.gates else "no" for name in self.backbone.output_shape()
        }

    def report(self) -> str:
        """A line per node and part of the detector, and one per output."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        for step in self.backbone.steps:
            groups.setdefault(step.node.name, [])
        lines = [f"{_label(name):<28} {_summary(rows)}" for name, rows in groups.items()]
        for name, kept in self.verdict().items():
            how = "a level that the checkpoint lacks"
            if name in self.warm.gates:
                gate = self.warm.gates[name]
                how = f"the new pyramid comes in by {gate}" if gate else "the same node in both"
            lines.append(f"{name:<28} the checkpoint's function: {kept} ({how})")
        lines += [f"not preserved: {reason}" for reason in self.reasons]
        heads = [name for name in self._lost() if not name.startswith(self.prefix)]
        lines += [f"the heads begin anew in part: {few(heads)}"] if heads else []
        head = f"MODEL.FPN.WARM_START from {self.path}, node by node:"
        return "\n  ".join([head, *lines])


def few(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _counts(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _label(name: str) -> str:
    return f"{name[len(PREFIX):]} (old)" if name.startswith(PREFIX) else name


def _row(
    name: str, group: str, source: str, same: bool, widths: tuple[int, int], own: bool
) -> Row:
    remark = "" if own else f"from {source}"
    if same:
        return Row(name, group, COPIED, remark, own)
    how = f"{'grown' if widths[1] > widths[0] else 'cut'} from {widths[0]} to {widths[1]} channels"
    return Row(name, group, ADAPTED, "; ".join(filter(None, (how, remark))), own)


def _summary(rows: list[Row]) -> str:
    if not rows:
        return "nothing to learn"
    texts = []
    for kind in (COPIED, ADAPTED, FRESH):
        of_kind = [row for row in rows if row.kind == kind]
        remarks = list(dict.fromkeys(row.remark for row in of_kind if row.remark))
        if of_kind:
            count = "" if len(of_kind) == len(rows) else f" {len(of_kind)} of {len(rows)}"
            texts.append(f"{kind}{count}" + (f" ({few(remarks, 2)})" if remarks else ""))
    return ", ".join(texts)


def _awake(name: str, now: Tensor) -> Tensor:
    """A new weight that starts at zero, made small instead: behind a gate that is zero as well it
    would have to wait for it, and what is before it once more."""
    if not name.endswith("weight") or now.any():
        return now
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(now.shape, generator=generator) * 0.01).to(now)
