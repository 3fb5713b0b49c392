"""The registries of what a pyramid is made of, and one module of a resolved graph from them."""

from __future__ import annotations

import inspect
from typing import Any, Callable

from torch import nn

from fpn_plugin.pyramid.blocks import BLOCKS, set_norm
from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.resample import DOWNSAMPLE, UPSAMPLE
from fpn_plugin.pyramid.resolve import Defaults, Part
from fpn_plugin.registry import Registry, UnknownNameError, unknown_name

REGISTRIES: dict[str, Registry[Callable[..., nn.Module]]] = {
    "block": BLOCKS,
    "fuse": FUSIONS,
    "up": UPSAMPLE,
    "down": DOWNSAMPLE,
}


def build_part(part: Part, defaults: Defaults) -> nn.Module:
    """Build one module of a resolved graph.

    Raises:
        ValueError: naming the node, if the operator does not take an argument or a value.
    """
    builder = REGISTRIES[part.kind].get(part.operator.name, part.where)
    arguments: dict[str, Any] = dict(part.operator.args)
    accepted = _options(builder)
    known: dict[str, Any] = {}  # from the graph, and so not for the user to give
    if part.kind == "fuse":
        _check_fusion(part, builder)
        facts = {"levels": part.levels, "widths": part.widths}
        known = {name: value for name, value in facts.items() if name in accepted}
        accepted = [name for name in accepted if name not in known]
    for name in arguments:
        if name not in accepted:
            raise unknown_name(f"{part.where}, arguments of {part.operator.name}", name, accepted)
    for name, value in part.operator.hints:
        if name in accepted:
            arguments.setdefault(name, value)
    if "norm" in accepted:
        arguments.setdefault("norm", defaults.norm)
    if "activation" in accepted and part.kind == "block":
        arguments.setdefault("activation", defaults.activation)
    sizes = (
        (part.in_channels, part.out_channels)
        if part.kind == "block"
        else (part.in_channels, part.amount)
    )
    try:
        module = builder(*sizes, **arguments, **known)
    except UnknownNameError as error:
        raise UnknownNameError(f"{part.where}: {error}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{part.where}: {error}") from None
    return set_norm(module, defaults.norm_eps, defaults.norm_momentum)


def _options(builder: Callable[..., nn.Module]) -> list[str]:
    """The arguments of an operator that have a default."""
    parameters = inspect.signature(builder).parameters
    return [name for name, given in parameters.items() if given.default is not given.empty]


def _check_fusion(part: Part, builder: Callable[..., nn.Module]) -> None:
    """Raise a ValueError if a fusion cannot take that many maps, or maps of those channels."""
    name, arity = part.operator.name, getattr(builder, "arity", 0)
    if arity not in (0, part.amount):
        raise ValueError(
            f"{part.where}: {name} fuses {arity} maps, but the node has {part.amount} inputs"
        )
    if "widths" in _options(builder) or set(part.widths) <= {part.in_channels}:
        return
    takers = [name for name in FUSIONS.names() if "widths" in _options(FUSIONS.get(name))]
    given = f"{', '.join(map(str, part.widths[:-1]))} and {part.widths[-1]}"
    one_width = (
        "maps of one width"
        if len(set(part.widths)) > 1
        else f"maps of the pyramid's width, {part.in_channels} channels"
    )
    raise ValueError(
        f"{part.where}: {name} fuses {one_width}, but its inputs have {given} channels; project"
        f" them (leave out project: identity), or fuse by {', '.join(takers)}"
    )
