"""Probing a timm network with an image: which sizes it accepts, and what its maps depend on.

Shapes are `(N, C, H, W)`.
"""

from __future__ import annotations

from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from fpn_plugin.bottom_up.base import parameters_behind

# The stages of networks that compute all maps together at their end, from parallel branches
SERIAL_STAGES = {"HighResolutionNetFeatures": ("layer1", "stage2", "stage3", "stage4")}


class Probe(NamedTuple):
    """The result of running a network on one image, with gradients.

    Attributes:
        maps: all that it returns.
        stage_inputs: the tensors that enter each known stage, in order.
        divisor: the image's sides must be divisible by it, in pixels.
    """

    maps: list[Tensor]
    stage_inputs: list[list[Tensor]]
    divisor: int


def probe(network: nn.Module, source: str, in_channels: int, fixed_size: Any) -> Probe:
    """Run the network on an image with odd sides, or else with sides as divisible as it needs.

    Args:
        fixed_size: the one size that the user built the network for, in pixels, if any.

    Raises:
        ValueError: if it accepts no size but its own, or its maps are not what timm promises.
    """
    sizes = [(d, _odd_multiple(97, d), _odd_multiple(131, d)) for d in (1, 4, 8, 16, 32)]
    if fixed_size is not None:
        height, width = (fixed_size, fixed_size) if isinstance(fixed_size, int) else fixed_size
        sizes.append((1, height, width))
    reason: Exception | None = None
    for divisor, height, width in sizes:
        try:
            maps, inputs = _run(network, torch.zeros(1, in_channels, height, width))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = error
            continue
        _check_channels(source, network, maps)
        return Probe(maps, inputs, divisor)
    raise ValueError(
        f"MODEL.BOTTOM_UP.NAME: {source} takes no images but those of its own size ({reason});"
        " MODEL.BOTTOM_UP.ARGS: {img_size: [height, width]} makes some networks for the size that"
        " all of your images have"
    ) from reason


def _odd_multiple(about: int, divisor: int) -> int:
    return (about // divisor | 1) * divisor


def _run(network: nn.Module, image: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
    inputs: dict[nn.Module, list[Tensor]] = {}

    def record(stage: nn.Module, args: Any) -> None:
        inputs[stage] = list(_tensors(args))

    stages = _stages(network)
    handles = [stage.register_forward_pre_hook(record) for stage in stages]
    training = network.training
    try:
        with torch.enable_grad():
            maps = list(network.eval()(image))
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    return maps, [inputs[stage] for stage in stages if stage in inputs]


def _tensors(args: Any) -> Iterator[Tensor]:
    if isinstance(args, Tensor):
        yield args
    elif isinstance(args, (tuple, list)):
        for arg in args:
            yield from _tensors(arg)


def _stages(network: Any) -> list[nn.Module]:
    """The first stage after the stem; all stages of HRNet."""
    names = SERIAL_STAGES.get(type(network).__name__)
    if names:
        return [network.get_submodule(name) for name in names]
    first = next((info for info in network.feature_info.info if info["reduction"] >= 4), None)
    modules = dict(network.named_modules())
    name = first["module"] if first else "?"
    # timm's feature wrappers join the first two parts of a name, or put another before them
    for alias in (name, name.replace(".", "_", 1), f"model.{name}", f"body.{name}"):
        if alias in modules and any(True for _ in modules[alias].parameters()):
            return [modules[alias]]
    return []  # only an activation ends the stage (VGG): the stem then ends with res1


def _check_channels(source: str, network: Any, maps: Sequence[Tensor]) -> None:
    dim = -1 if is_channels_last(network) else 1
    channels, promised = [y.shape[dim] for y in maps], list(network.feature_info.channels())
    if channels != promised:
        raise ValueError(
            f"MODEL.BOTTOM_UP.NAME: {source} gives maps of {channels} channels where timm promises"
            f" {promised}"
        )


def frozen_names(
    source: str, network: nn.Module, probed: Probe, positions: Mapping[str, int], freeze_at: int
) -> set[str]:
    """The names of the parameters that `MODEL.BACKBONE.FREEZE_AT` freezes.

    These are all that the tensors at the frozen levels depend on: the input of the first stage is
    level 1, the map `res2` level 2, and so on.

    Args:
        positions: the position of each map in `probed.maps`, by name.
    """
    if freeze_at < 1:
        return set()
    # HRNet computes its maps after all of its stages
    after = len(probed.stage_inputs) + 1 if type(network).__name__ in SERIAL_STAGES else 0
    points = list(enumerate(probed.stage_inputs, start=1))
    points += [(after or int(name[3:]), [probed.maps[i]]) for name, i in positions.items()]
    frozen = [tensors for level, tensors in points if level <= freeze_at]
    if not frozen:
        levels = [level for level, _ in points]
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT: {freeze_at}: where the stem of {source} ends is not known;"
            f" choose from 0, {', '.join(map(str, levels))}"
        )
    parameters = parameters_behind(tensor for tensors in frozen for tensor in tensors)
    return {name for name, parameter in network.named_parameters() if parameter in parameters}


def unused_names(network: nn.Module, maps: Sequence[Tensor]) -> set[str]:
    """The names of the parameters that none of these maps depends on: they get no gradient."""
    used = parameters_behind(maps)
    return {name for name, parameter in network.named_parameters() if parameter not in used}


def is_channels_last(network: nn.Module) -> bool:
    """Whether its maps are `(N, H, W, C)`."""
    return str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
