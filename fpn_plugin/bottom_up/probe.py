"""Probing a network with an image: which sizes it accepts and gives maps of the right size for, and
what the maps of a timm network depend on.

A map of stride `s` has `H/s` rows, rounded up or down: a place in it then is a place in the image,
and the anchors and boxes that Detectron2 puts there are right. Shapes are `(N, C, H, W)`.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from fpn_plugin.bottom_up.base import parameters_behind

logger = logging.getLogger(__name__)

# The stages of networks that compute all maps together at their end, from parallel branches
SERIAL_STAGES = {"HighResolutionNetFeatures": ("layer1", "stage2", "stage3", "stage4")}


class Probe(NamedTuple):
    """The result of running a network on one image, with gradients.

    Attributes:
        maps: all that it returns.
        stage_inputs: the tensors that enter each known stage, in order.
        divisor: the image's sides must be divisible by it, in pixels.
        is_exact: whether its maps have the sizes that their strides say, for all images that it
            takes.
    """

    maps: list[Tensor]
    stage_inputs: list[list[Tensor]]
    divisor: int
    is_exact: bool = True


def probe(
    network: Any, source: str, in_channels: int, fixed_size: Any, wanted: Sequence[int]
) -> Probe:
    """Run the network on an image with odd sides, or else with sides as divisible as it needs.

    Args:
        fixed_size: the one size that the user built the network for, in pixels, if any.
        wanted: the positions of the maps whose sizes count.

    Raises:
        ValueError: if it accepts no size but its own, or its maps are not what timm promises.
    """
    sizes = list(probe_sizes())
    if fixed_size is not None:
        own = (fixed_size, fixed_size) if isinstance(fixed_size, int) else tuple(fixed_size)
        sizes.append((1, [own]))
    strides, channels_last = network.feature_info.reduction(), is_channels_last(network)

    def map_sizes(maps: Sequence[Tensor]) -> list[torch.Size]:
        return [maps[i].shape[1:3] if channels_last else maps[i].shape[2:] for i in wanted]

    wanted_strides = [strides[i] for i in wanted]
    reason: Exception | None = None
    misfit: Probe | None = None
    for divisor, (image, *others) in sizes:
        try:
            maps, inputs = _run(network, torch.zeros(1, in_channels, *image))
            other_maps = [
                list(run_in_evaluation(network, torch.zeros(1, in_channels, *other)))
                for other in others
            ]
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = error
            continue
        _check_channels(source, network, maps)
        result = Probe(maps, inputs, divisor)
        pairs = zip((image, *others), (maps, *other_maps))
        if all(fits(map_sizes(given), wanted_strides, size) for size, given in pairs):
            return result._replace(is_exact=misfit is None)
        misfit = misfit or result._replace(is_exact=False)
    if misfit:
        log_misfit(source)
        return misfit
    raise ValueError(
        f"MODEL.BOTTOM_UP.NAME: {source} takes no images but those of its own size ({reason});"
        " MODEL.BOTTOM_UP.ARGS: {img_size: [height, width]} makes some networks for the size that"
        " all of your images have"
    ) from reason


def probe_sizes() -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Divisors in pixels, each with heights and widths of images to try.

    The first has odd multiples of the divisor as its sides, the second multiples of every stride:
    some networks give too much of the one, and some too little of the other.
    """
    for divisor in (1, 4, 8, 16):
        odd = (97 // divisor | 1) * divisor, (131 // divisor | 1) * divisor
        yield divisor, [odd, (96, 160)]
    yield 32, [(96, 160)]
    yield 64, [(192, 192)]


def fits(map_sizes: Iterable[Sequence[int]], strides: Iterable[int], image: Sequence[int]) -> bool:
    """Whether maps have the sizes that their strides say, rounded up or down.

    Args:
        map_sizes: their heights and widths.
        image: its height and width.
    """
    return all(
        image_side // stride <= side <= -(-image_side // stride)
        for size, stride in zip(map_sizes, strides)
        for side, image_side in zip(size, image)
    )


def find_divisor(
    map_sizes: Callable[[int, int], Iterable[Sequence[int]]], strides: Sequence[int]
) -> int:
    """What an image's sides must be divisible by, in pixels, for maps of the right sizes; 0 if no
    divisor is known to help.

    Args:
        map_sizes: gives the maps' heights and widths for an image's height and width; a
            RuntimeError, AssertionError or ValueError says that the network refuses such an image.
    """
    for divisor, images in probe_sizes():
        try:
            if all(fits(map_sizes(*image), strides, image) for image in images):
                return divisor
        except (RuntimeError, AssertionError, ValueError):
            continue
    return 0


def log_misfit(source: str) -> None:
    """Say that a network's maps are resampled."""
    logger.warning(
        "%s: its maps have fewer or more rows than their strides say, as in a network without"
        " padding; they are resampled to image size / stride",
        source,
    )


@torch.no_grad()
def run_in_evaluation(network: nn.Module, image: Tensor) -> Any:
    """What it returns in evaluation mode, without gradients; the modes of its modules stay."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        return network.eval()(image)
    finally:
        for module, training in modes:
            module.training = training


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
