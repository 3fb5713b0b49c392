"""What an image through a network of timm's tells: which sizes it takes, what its maps depend on.

Shapes are `(N, C, H, W)`.
"""

from __future__ import annotations

from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from fpn_plugin.bottom_up.base import parameters_behind

# The stages one after another of a network whose maps come from parallel branches, all at its end
SERIAL_STAGES = {"HighResolutionNetFeatures": ("layer1", "stage2", "stage3", "stage4")}


class Run(NamedTuple):
    """What a network made of an image: its maps, and what went into each stage.

    Attributes:
        divisor: what the image's sides must be divisible by, in pixels.
    """

    maps: list[Tensor]
    stage_inputs: list[list[Tensor]]
    divisor: int


def try_sizes(network: nn.Module, source: str, in_channels: int, own_size: Any) -> Run:
    """Run the network on an image of odd sides, or else of sides that are as divisible as it needs.

    Args:
        own_size: the one size that the user made the network for, if any.

    Raises:
        ValueError: if it takes no size but its own, or its maps are not what timm promises.
    """
    sizes = [(divisor, _size(97, divisor), _size(131, divisor)) for divisor in (1, 4, 8, 16, 32)]
    if own_size is not None:
        height, width = (own_size, own_size) if isinstance(own_size, int) else own_size
        sizes.append((1, height, width))
    reason: Exception | None = None
    for divisor, height, width in sizes:
        try:
            maps, inputs = _run(network, torch.zeros(1, in_channels, height, width))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = error
            continue
        _check_channels(source, network, maps)
        return Run(maps, inputs, divisor)
    raise ValueError(
        f"MODEL.BOTTOM_UP.NAME: {source} takes no images but those of its own size ({reason});"
        " MODEL.BOTTOM_UP.ARGS: {img_size: [height, width]} makes some networks for the size that"
        " all of your images have"
    ) from reason


def _size(about: int, divisor: int) -> int:
    """An odd multiple."""
    return (about // divisor | 1) * divisor


def _run(network: nn.Module, image: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
    inputs: dict[nn.Module, list[Tensor]] = {}

    def keep(stage: nn.Module, given: Any) -> None:
        inputs[stage] = list(_tensors(given))

    stages = _stages(network)
    handles = [stage.register_forward_pre_hook(keep) for stage in stages]
    training = network.training
    try:
        with torch.enable_grad():
            maps = list(network.eval()(image))
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    return maps, [inputs[stage] for stage in stages if stage in inputs]


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (tuple, list)):
        for item in given:
            yield from _tensors(item)


def _stages(network: Any) -> list[nn.Module]:
    """The first stage that comes after the stem; of HRNet all stages."""
    names = SERIAL_STAGES.get(type(network).__name__)
    if names:
        return [network.get_submodule(name) for name in names]
    first = next((info for info in network.feature_info.info if info["reduction"] >= 4), None)
    modules = dict(network.named_modules())
    name = first["module"] if first else "?"
    # timm's wrappers flatten the first two levels of names, or put one before them
    for alias in (name, name.replace(".", "_", 1), f"model.{name}", f"body.{name}"):
        if alias in modules and any(True for _ in modules[alias].parameters()):
            return [modules[alias]]
    return []  # a mere activation at the stage's end (VGG): what gives res1 counts as its stem


def _check_channels(source: str, network: Any, maps: Sequence[Tensor]) -> None:
    dim = -1 if gives_nhwc(network) else 1
    given, promised = [y.shape[dim] for y in maps], list(network.feature_info.channels())
    if given != promised:
        raise ValueError(
            f"MODEL.BOTTOM_UP.NAME: {source} gives maps of {given} channels where timm promises"
            f" {promised}"
        )


def frozen_names(
    source: str, network: nn.Module, run: Run, positions: Mapping[str, int], freeze_at: int
) -> set[str]:
    """The names of the parameters that `MODEL.BACKBONE.FREEZE_AT` freezes."""
    if freeze_at < 1:
        return set()
    # HRNet's maps come after all of its stages
    after = len(run.stage_inputs) + 1 if type(network).__name__ in SERIAL_STAGES else 0
    points = list(enumerate(run.stage_inputs, start=1))
    points += [(after or int(name[3:]), [run.maps[i]]) for name, i in positions.items()]
    reached = [values for level, values in points if level <= freeze_at]
    if not reached:
        levels = [level for level, _ in points]
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT: {freeze_at}: where the stem of {source} ends is not known;"
            f" choose from 0, {', '.join(map(str, levels))}"
        )
    behind = parameters_behind(value for values in reached for value in values)
    return {name for name, parameter in network.named_parameters() if parameter in behind}


def unread_names(network: nn.Module, maps: Sequence[Tensor]) -> set[str]:
    """The names of the parameters that none of these maps depends on: they get no gradient."""
    behind = parameters_behind(maps)
    return {name for name, parameter in network.named_parameters() if parameter not in behind}


def gives_nhwc(network: nn.Module) -> bool:
    """Whether its maps are `(N, H, W, C)`."""
    return str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
