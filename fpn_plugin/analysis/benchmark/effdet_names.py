"""How the modules of `effdet`'s BiFpn are called in this plugin, to carry weights over."""

from __future__ import annotations

from typing import Any


def node_names(topology: str, low: int, high: int) -> list[str]:
    """Our nodes, without the topology's name before them, in the order of effdet's `fnode` list.

    Args:
        topology: "bifpn" or "qufpn".
        low: the finest level.
        high: the coarsest.
    """
    middle, every = range(low + 1, high), range(low, high + 1)
    down_up = [f"td{level}" for level in reversed(middle)] + [f"out{level}" for level in every]
    if topology == "bifpn":
        return down_up
    up_down = [f"bu{level}" for level in middle] + [f"out{level}" for level in reversed(every)]
    return (
        [f"a_{name}" for name in down_up]
        + [f"b_{name}" for name in up_down]
        + [f"out{level}" for level in every]
    )


def our_names(model: Any, topology: str, low: int, inputs: int) -> dict[str, str]:
    """Our name of each of effdet's modules that have parameters, and of its fusion weights.

    Args:
        model: an `effdet.efficientdet.BiFpn`.
        topology: "bifpn" or "qufpn".
        low: the finest level.
        inputs: how many bottom-up maps it reads.
    """
    first = f"{topology}_in{low + inputs}_edge0.project"
    names = {f"resample.{inputs}.conv.conv": first, f"resample.{inputs}.conv.bn": f"{first}.norm"}
    nodes = node_names(topology, low, low + model.num_levels - 1)
    for run, cell in enumerate(model.cell):
        prefix = f"r{run + 1}_" if run else ""
        for index, (name, fnode) in enumerate(zip(nodes, cell.fnode, strict=True)):
            theirs, mine = f"cell.{run}.fnode.{index}", f"{prefix}{topology}_{name}"
            names[f"{theirs}.combine.edge_weights"] = f"{mine}_fuse.weights"
            for edge, offset in enumerate(fnode.combine.inputs_offsets):
                projection = f"{theirs}.combine.resample.{offset}.conv"
                names[f"{projection}.conv"] = f"{mine}_edge{edge}.project"
                names[f"{projection}.bn"] = f"{mine}_edge{edge}.project.norm"
            block = f"{theirs}.after_combine.conv"
            names[f"{block}.conv_dw"] = f"{mine}.depthwise"
            names[f"{block}.conv_pw"] = f"{mine}.pointwise"
            names[f"{block}.bn"] = f"{mine}.pointwise.norm"
    return names


def rename(key: str, names: dict[str, str]) -> str:
    """Our key of a tensor, by the names of :func:`our_names`."""
    if key in names:
        return names[key]
    module, _, kind = key.rpartition(".")
    return f"{names[module]}.{kind}"
