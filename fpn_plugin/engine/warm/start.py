"""`MODEL.FPN.WARM_START`: a checkpoint's weights for a model whose pyramid is another one.

The model holds both pyramids (`fpn_plugin.pyramid.warm`), so this is a matter of names, and of
channels where the width differs (`widths.py`).
"""

from __future__ import annotations

import logging
from typing import Mapping

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from fpn_plugin.bottom_up.weight_files import read_state_dict
from fpn_plugin.config.warm_start import FROM, KEY, WEIGHTS
from fpn_plugin.engine.warm.report import (
    ADAPTED,
    COPIED,
    EXACTLY,
    FRESH,
    LOST,
    ROUNDED,
    Row,
    few,
    node_lines,
    verdict_lines,
)
from fpn_plugin.engine.warm.widths import INEXACT, resize, shapes_at_width
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.pyramid.warm import GATE, Origin, WarmPyramid

logger = logging.getLogger(__name__)


def start_warm(model: nn.Module, cfg: CfgNode) -> None:
    """Load `MODEL.WEIGHTS` into a model with another pyramid, and log what became of every node.

    Args:
        model: built from `cfg`, which has `MODEL.FPN.WARM_START`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the key, if it is no checkpoint, or not the one that the config tells of.
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
    """Load a file into a model with another pyramid; the arguments and errors of `WarmStart`.

    Args:
        key: the config's key that names the file, for messages.
    """
    start = WarmStart(model, f"{key} {path!r}", shapes)
    model.load_state_dict(start(read_state_dict(path, key)))


def holds_two_pyramids(model: nn.Module) -> bool:
    """Whether a model was built to start as one with another pyramid."""
    modules = model.modules()
    return any(isinstance(item, PyramidBackbone) and item.warm_start for item in modules)


def find_pyramid(model: nn.Module) -> tuple[str, PyramidBackbone]:
    """A model's pyramid, and what its tensors' names begin with."""
    return next(
        (f"{name}.", item)
        for name, item in model.named_modules()
        if isinstance(item, PyramidBackbone)
    )


class WarmStart:
    """Makes a model's state of a checkpoint's.

    Args:
        model: a detector with a `PyramidBackbone`.
        source: what the checkpoint is called in messages.
        shapes: of the model's tensors at the width of the checkpoint's pyramid; None: at its own.

    Attributes:
        rows: what became of each tensor, after a call.
        reasons: why the model's pyramid does not compute what the checkpoint's did; none: it does.
        left: what of the checkpoint is not in the model.

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
        self.rows: list[Row] = []
        self.reasons: list[str] = []
        self.left: list[str] = []

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's state, complete, from that of the checkpoint.

        Raises:
            ValueError: naming MODEL.WEIGHTS, if its pyramid is not that of
                MODEL.FPN.WARM_START_FROM, or nothing of it fits.
        """
        wanted = self.model.state_dict()
        fits = {n: n in given and given[n].shape == x.shape for n, x in wanted.items()}
        anew = [name for name, fit in fits.items() if not fit and not _is_constant(name)]
        # also where heads differ: another run may have trained both pyramids and the gates
        if not any(name.startswith(self.prefix) for name in anew):
            rest = f"; the heads begin anew in part: {few(anew)}" if anew else ""
            logger.info("%s: %s has this very pyramid: nothing to do%s", KEY, self.source, rest)
            return {name: given[name] if fits[name] else x for name, x in wanted.items()}
        state = dict(given) if self.warm else self._below_pyramid(given, wanted)
        self._check(state)
        self.rows = []
        made = {name: self._make(name, state, now) for name, now in wanted.items()}
        self.reasons = self._reasons()
        taken = {self._origin(row.name)[0] for row in self.rows if row.kind != FRESH}
        self.left = [name for name in state if name not in taken and not _is_constant(name)]
        logger.info("%s", self.report())
        return made

    def _below_pyramid(
        self, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state of a detector without a pyramid, whose network is not below one.

        In Detectron2's C4 detectors the network's last stage is part of the heads.
        """
        own = f"{self.prefix}bottom_up."
        state = {}
        for name, x in given.items():
            inner = name.removeprefix(self.prefix).removeprefix("roi_heads.")
            state[name if name in wanted or own + inner not in wanted else own + inner] = x
        if not any(name.startswith(own) for name in state):
            raise ValueError(
                f"{self.source}: nothing of it fits the network"
                f" (MODEL.BOTTOM_UP.NAME): it has {few(list(given))}"
            )
        return state

    def _check(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a checkpoint that lacks a part of the old pyramid, or has it in another shape."""
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
        """The name in the checkpoint of what a tensor gets, and for a pyramid's what it is there;
        ("", None) for a tensor of the new pyramid alone."""
        inner = name[len(self.prefix) :]
        if not name.startswith(self.prefix) or inner.startswith("bottom_up."):
            return name, None
        path = inner
        while path and path not in self.origins:
            path = path.rpartition(".")[0]
        if not path:
            return "", None
        origin = self.origins[path]
        return self.prefix + origin.path + inner[len(path) :], origin

    def _make(self, name: str, state: Mapping[str, Tensor], now: Tensor) -> Tensor:
        """One tensor of the model's state; what became of it goes to `rows`."""
        source, origin = self._origin(name)
        group, own = self._group(name), bool(source) and (origin is None or origin.exact)
        found = state.get(source)
        if found is None or found.shape != self.shapes[name]:
            shapes = () if found is None else (tuple(found.shape), tuple(self.shapes[name]))
            remark = "the checkpoint's is {}, not {}".format(*shapes) if shapes else ""
            gate = group.startswith(GATE)
            self.rows.append(Row(name, group, FRESH, "zero" if gate else remark, own))
            return now if own or gate else _awake(name, now)
        kind, remarks = COPIED, [] if own else [f"from {source}"]
        if now.shape != found.shape:
            owner, _, leaf = name.rpartition(".")
            found = resize(self.model.get_submodule(owner), leaf, found, now.shape, self.widths)
            verb = "grown" if self.widths[1] > self.widths[0] else "cut"
            kind = ADAPTED
            remarks.insert(0, "{} from {} to {} channels".format(verb, *self.widths))
        self.rows.append(Row(name, group, kind, "; ".join(remarks), own))
        return found.to(now.dtype)

    def _group(self, name: str) -> str:
        inner = name[len(self.prefix) :]
        if not name.startswith(self.prefix):
            return ".".join(name.split(".")[: 2 if name.startswith("roi_heads") else 1])
        if inner.startswith("bottom_up."):
            return "bottom_up"
        steps = [step.node.name for step in self.backbone.steps]
        return max((x for x in steps if inner.startswith((f"{x}.", f"{x}_"))), key=len)

    def _reasons(self) -> list[str]:
        if self.warm is None:
            return ["the checkpoint has no pyramid"]
        old, new = self.widths
        apart = sorted(self.shapes.keys() ^ self.model.state_dict().keys())
        reasons = [f"{few(apart)} is there at {old} or at {new} channels alone"] if apart else []
        lost = [name for name in self._lost() if name.startswith(self.prefix) and name not in apart]
        reasons += [f"the checkpoint has no {few(lost)}, or of another shape"] if lost else []
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
        return [name for name in lost if not _is_constant(name)]

    def _normalises_groups(self) -> bool:
        names = [row.name.rpartition(".")[0] for row in self.rows if row.kind == ADAPTED]
        kinds = {type(self.model.get_submodule(name)).__name__ for name in names}
        return bool(kinds & {"GroupNorm", "LayerNorm"})

    def verdict(self) -> dict[str, str]:
        """How far each level of the pyramid, and "the detector", computes what the checkpoint
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
        lines = node_lines(self.rows, [step.node.name for step in self.backbone.steps])
        lines += verdict_lines(self.verdict(), self.warm.gates if self.warm else {})
        lines += [f"not preserved: {reason}" for reason in self.reasons]
        heads = [name for name in self._lost() if not name.startswith(self.prefix)]
        lines += [f"not preserved: the heads begin anew in part: {few(heads)}"] if heads else []
        if self.warm and self.warm.left:
            lines.append(f"not preserved: the heads get no {few(self.warm.left)} any more")
        lines += [f"in the checkpoint alone: {few(self.left)}"] if self.left else []
        head = f"{KEY} from {self.source}, node by node:"
        return "\n  ".join([head, *lines])


def _is_constant(name: str) -> bool:
    """Whether a tensor is none that a checkpoint must have, or that anything is lost with."""
    constants = ("num_batches_tracked", "pixel_mean", "pixel_std")
    return name.endswith(constants) or "anchor_generator." in name


def _awake(name: str, now: Tensor) -> Tensor:
    """A new weight that starts at zero, made small instead: behind a gate that is zero as well it
    would have to wait for it, and what is before it once more."""
    if not name.endswith("weight") or now.any():
        return now
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(now.shape, generator=generator) * 0.01).to(now)
