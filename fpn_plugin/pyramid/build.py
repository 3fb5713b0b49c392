"""The registries of operators, and the modules of a resolved graph that are built from them."""

from __future__ import annotations

import inspect
from typing import Any, Callable

from torch import nn

from fpn_plugin.pyramid import aifi, blocks_csp, blocks_rep  # noqa: F401  register
from fpn_plugin.pyramid.blocks import BLOCKS
from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.norms import set_norm
from fpn_plugin.pyramid.resample import DOWNSAMPLE, UPSAMPLE
from fpn_plugin.pyramid.resolve import Defaults, ModuleSpec
from fpn_plugin.pyramid.steps import STEPS
from fpn_plugin.registry import Registry, UnknownNameError, unknown_name

REGISTRIES: dict[str, Registry[Callable[..., nn.Module]]] = {
    "block": BLOCKS,
    "fuse": FUSIONS,
    "up": UPSAMPLE,
    "down": DOWNSAMPLE,
    "step": STEPS,
}


def build_module(spec: ModuleSpec, defaults: Defaults) -> nn.Module:
    """Build one module of a resolved graph.

    Raises:
        ValueError: naming the node, if the operator does not take an argument or a value.
    """
    builder = REGISTRIES[spec.kind].get(spec.operator.name, spec.where)
    options = _options(builder)
    arguments: dict[str, Any] = dict(spec.operator.args)
    from_graph: dict[str, Any] = {}  # arguments that are not for the user to give
    if spec.kind == "fuse":
        _check_fusion(spec, builder)
        facts = {"levels": spec.levels, "widths": spec.widths}
        from_graph = {name: value for name, value in facts.items() if name in options}
        options = [name for name in options if name not in from_graph]
    for name in arguments:
        if name not in options:
            raise unknown_name(f"{spec.where}, arguments of {spec.operator.name}", name, options)
    # what the user does not say, the topology does, and then the defaults
    for name, value in spec.operator.hints:
        if name in options:
            arguments.setdefault(name, value)
    if "norm" in options:
        arguments.setdefault("norm", defaults.norm)
    if "activation" in options and spec.kind in ("block", "step"):
        arguments.setdefault("activation", defaults.activation)
    of_kind = {"block": spec.out_channels, "step": spec.levels}
    second = of_kind.get(spec.kind, spec.amount)
    try:
        module = builder(spec.in_channels, second, **arguments, **from_graph)
    except UnknownNameError as error:
        raise UnknownNameError(f"{spec.where}: {error}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{spec.where}: {error}") from None
    return set_norm(module, defaults.norm_eps, defaults.norm_momentum)


def _options(builder: Callable[..., nn.Module]) -> list[str]:
    """The arguments of an operator that have a default."""
    parameters = inspect.signature(builder).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is not parameter.empty]


def _check_fusion(spec: ModuleSpec, builder: Callable[..., nn.Module]) -> None:
    """Raise a ValueError if a fusion does not take that many maps, or maps of those channels."""
    name, arity = spec.operator.name, getattr(builder, "arity", 0)
    if arity not in (0, spec.amount):
        raise ValueError(
            f"{spec.where}: {name} fuses {arity} maps, but the node has {spec.amount} inputs"
        )
    if "widths" in _options(builder) or set(spec.widths) <= {spec.in_channels}:
        return
    any_width = [other for other in FUSIONS.names() if "widths" in _options(FUSIONS.get(other))]
    given = f"{', '.join(map(str, spec.widths[:-1]))} and {spec.widths[-1]}"
    one_width = (
        "maps of one width"
        if len(set(spec.widths)) > 1
        else f"maps of the pyramid's width, {spec.in_channels} channels"
    )
    raise ValueError(
        f"{spec.where}: {name} fuses {one_width}, but its inputs have {given} channels; project"
        f" them (leave out project: identity), or fuse by {', '.join(any_width)}"
    )
