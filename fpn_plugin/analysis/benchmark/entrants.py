"""Contestants built: models with the same weights wherever names and shapes agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Mapping

import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import CNNBlockBase
from torch import Tensor, nn

from fpn_plugin.analysis.benchmark.contestants import Contestant
from fpn_plugin.analysis.benchmark.inputs import Inputs
from fpn_plugin.analysis.benchmark.neck import image_tensor
from fpn_plugin.bottom_up.weight_files import read_state_dict

WEIGHTS = "--weights"
_BRANCH = 0.25  # the weight of the last norm of a residual branch


@dataclass
class Entrant:
    """A contestant with its model.

    Attributes:
        model: on the CPU, in float32, as built: it is copied before anything is done to it.
    """

    contestant: Contestant
    model: Any
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.contestant.name

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """The shape of each weight of a part: "neck", "backbone" or "model"."""
        state = self.model.state_dict()
        prefix = "" if part == "model" else "backbone."
        below = ("backbone.bottom_up.", "backbone.net.") if part == "neck" else ()
        return {
            name: tuple(value.shape)
            for name, value in state.items()
            if name.startswith(prefix) and not (below and name.startswith(below))
        }


def build_all(
    contestants: list[Contestant], inputs: Inputs, weights: str = ""
) -> dict[str, Entrant]:
    """Build every contestant's model from one seed.

    The first that has a weight of a name and shape decides its value for all that follow. Nothing
    is downloaded. Statistics of norms that no one has set yet are measured on the inputs, so that
    features stay in the range of a trained network's: with the identities that norms start as, a
    ResNet-50's grow a thousandfold and half precision overflows.

    Args:
        weights: a checkpoint whose weights come before all others.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it cannot be read, or nothing in it matches any model.
    """
    pool = dict(read_state_dict(weights, WEIGHTS)) if weights else {}
    given = set(pool)
    entrants, used = {}, 0
    for contestant in contestants:
        torch.manual_seed(inputs.seed)
        cfg = contestant.cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cpu"
        entrant = Entrant(contestant, build_model(cfg).eval())
        loaded = _load(entrant.model, pool)
        used += len(loaded & given)
        _set_statistics(entrant.model, loaded, inputs)
        for name, value in entrant.model.state_dict().items():
            pool.setdefault(name, value)
        entrant.facts["weights"] = (
            f"{len(loaded & given)} tensors of {weights}" if weights else f"seed {inputs.seed}"
        )
        entrants[entrant.name] = entrant
    if weights and not used:
        raise ValueError(f"{WEIGHTS}: nothing in {weights} matches any of the models")
    return entrants


def _load(model: nn.Module, pool: Mapping[str, Tensor]) -> set[str]:
    """Copy what agrees in name and shape; returns the names."""
    own = model.state_dict()
    fitting = {
        name: pool[name] for name in own if name in pool and pool[name].shape == own[name].shape
    }
    model.load_state_dict(fitting, strict=False)
    return set(fitting)


@torch.no_grad()
def _set_statistics(model: Any, loaded: set[str], inputs: Inputs) -> None:
    """Set each norm's running mean and variance to those of what reaches it, in one forward."""

    def measure(norm: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].float()
        norm.running_mean.copy_(x.mean((0, 2, 3)))
        # a variance of a map of one pixel is none
        spread = x.var((0, 2, 3)) if x[:, 0].numel() > 1 else torch.ones(x.shape[1])
        norm.running_var.copy_(spread.clamp(min=1e-3))

    _damp_branches(model, loaded)
    fresh = [
        norm
        for name, norm in model.backbone.named_modules()
        if isinstance(getattr(norm, "running_var", None), Tensor)
        and f"backbone.{name}.running_var" not in loaded
    ]
    if fresh:
        with _hooked(fresh, measure):
            model.backbone(image_tensor(model, inputs.images()))


def _damp_branches(model: nn.Module, loaded: set[str]) -> None:
    """Let each residual branch of a ResNet add little to its shortcut, as trained ones do.

    Branches as large as their shortcuts enlarge rounding a hundredfold from the first stage to the
    last, and no precision would seem to agree with another.
    """
    for name, block in model.named_modules():
        if isinstance(block, CNNBlockBase) and hasattr(block, "conv2"):
            last = "conv3" if hasattr(block, "conv3") else "conv2"
            norm = getattr(block.get_submodule(last), "norm", None)
            if norm is not None and f"{name}.{last}.norm.weight" not in loaded:
                norm.weight.data.fill_(_BRANCH)


class _hooked:
    """Forward pre-hooks on some modules, for as long as the context lasts."""

    def __init__(self, modules: list[nn.Module], hook: Callable[[Any, Any], None]) -> None:
        self._handles: Iterator[Any] = iter(
            [module.register_forward_pre_hook(hook) for module in modules]
        )

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
