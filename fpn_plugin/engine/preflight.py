"""What is found out before any process is started or any weights are downloaded: whether the
processes, the batch, the norms and the weights go together."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
from typing import Iterator

import torch
from detectron2.config import CfgNode
from torch import nn

from fpn_plugin.bottom_up.detectron2 import BUILDERS
from fpn_plugin.checkpoint.checkpointer import Checkpointer, StrictCheckpointer
from fpn_plugin.checkpoint.files import fetch, is_remote
from fpn_plugin.config.defaults import OWN_BUILDERS
from fpn_plugin.config.files import leaves
from fpn_plugin.config.validate import RESNET_BUILDERS
from fpn_plugin.engine.accumulate import PARTS_KEY, check_parts
from fpn_plugin.modeling.build import build_model

WEIGHTS, NETWORK_WEIGHTS = "MODEL.WEIGHTS", "MODEL.BOTTOM_UP.WEIGHTS"
_SYNCED = "SyncBN"
_NETWORKS = {builder.__name__ for builder in BUILDERS}  # beside <library>/<model>
# Detectron2's weights of ResNets and ResNeXts, such as .../ImageNetPretrained/MSRA/R-50.pkl
_RESNET = re.compile(
    r"ImageNetPretrained/.*\b(?P<kind>[RX])-(?P<depth>\d+)(?:-(?P<groups>\d+)x(?P<width>\d+)d)?\b"
)


def check_batch(
    key: str, batch: int, processes: int, parts: int = 1, parts_key: str = PARTS_KEY
) -> None:
    """Check that a batch can be divided among the processes, and in parts there.

    Args:
        key: the config key of `batch`, for messages.
        parts: `SOLVER.ACCUMULATE`.
        parts_key: the config key of `parts`.

    Raises:
        ValueError: naming the key.
    """
    check_parts(parts_key, parts)
    whole = processes * parts
    if batch < whole or batch % whole:
        split = f", in {parts} parts each ({parts_key})" if parts > 1 else ""
        raise ValueError(
            f"{key}: {batch} images cannot be divided among {processes}"
            f" process{'es' * (processes > 1)}{split}: choose a multiple of {whole}"
        )


def check_reference(cfg: CfgNode, processes: int, scheduled: int = 0) -> None:
    """Check `SOLVER.IMS_PER_BATCH` for a number of processes, also where Detectron2 scales it by
    `SOLVER.REFERENCE_WORLD_SIZE`.

    Args:
        scheduled: for how many it is scaled, if not for as many as there are.

    Raises:
        ValueError: naming the keys.
    """
    scheduled = scheduled or processes
    key, solver = "SOLVER.IMS_PER_BATCH", cfg.SOLVER
    batch, reference = solver.IMS_PER_BATCH, solver.REFERENCE_WORLD_SIZE
    if reference in (0, scheduled):
        check_batch(key, batch, processes, solver.ACCUMULATE)
    elif reference < 0 or batch % reference:
        raise ValueError(
            f"SOLVER.REFERENCE_WORLD_SIZE: {reference} processes cannot divide {key}: {batch}:"
            f" choose a divisor of {batch}, or 0 to scale nothing"
        )
    elif scheduled == processes:  # a process keeps its share
        check_batch(key, batch, reference, solver.ACCUMULATE)
    else:
        check_batch(key, batch // reference * scheduled, processes, solver.ACCUMULATE)


def check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Fetch the weights that a run starts from, if they are an address, before its data is read.

    Args:
        cfg: without the weights that are not read.

    Raises:
        FileNotFoundError: naming the key and the address, if one cannot be fetched.
        ValueError: for an address that names weights of another network.
    """
    key, path = WEIGHTS, cfg.MODEL.WEIGHTS
    if not path:  # else that may hold the network's weights as well
        key, path = NETWORK_WEIGHTS, cfg.MODEL.BOTTOM_UP.WEIGHTS
    if is_remote(path):
        if not args.eval_only:
            _check_named_network(cfg, key, path)
        fetch(path, key)


def check_model(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Build the model and load what it starts from, for a run of several processes: what would be
    an error in each of them is one before they are started.

    Raises:
        ValueError: as building and loading does; for SyncBN that is to be trained on the CPU.
    """
    cfg = cfg.clone()
    cfg.defrost()
    is_cpu, cfg.MODEL.DEVICE = cfg.MODEL.DEVICE == "cpu", "cpu"
    with torch.random.fork_rng(devices=[]), silence():
        model = build_model(cfg)
        if is_cpu and not args.eval_only:
            refuse_synced(cfg, model)
        if args.eval_only:
            StrictCheckpointer(model, "", args.allow_partial, WEIGHTS).load(cfg.MODEL.WEIGHTS)
        elif cfg.MODEL.WEIGHTS and not cfg.MODEL.FPN.WARM_START:
            Checkpointer(model).load(cfg.MODEL.WEIGHTS)


def _check_named_network(cfg: CfgNode, key: str, path: str) -> None:
    match = _RESNET.search(path)
    if match is None:
        return
    model, backbone = cfg.MODEL, cfg.MODEL.BACKBONE.NAME
    network = model.BOTTOM_UP.NAME if backbone in OWN_BUILDERS else backbone
    depth, groups = int(match["depth"]), int(match["groups"] or 1)
    title = f"{key}: {path!r} is of a ResNe{'X' * (match['kind'] == 'X')}t-{depth}"
    if network in RESNET_BUILDERS:
        wanted = {"DEPTH": depth, "NUM_GROUPS": groups}
        for name, value in wanted.items():
            if model.RESNETS[name] != value:
                raise ValueError(
                    f"{title}, but MODEL.RESNETS.{name} is {model.RESNETS[name]}: set it to"
                    f" {value}, or take other weights"
                )
    elif "/" in network or network in _NETWORKS:
        family = "resnext" if match["kind"] == "X" else "resnet"
        if f"{family}{depth}" not in network:
            name = "MODEL.BOTTOM_UP.NAME"
            raise ValueError(
                f"{title}, but {name} is {network!r}: set {key} to '', and {NETWORK_WEIGHTS} to"
                " weights of that network"
            )


def refuse_synced(cfg: CfgNode | None, model: nn.Module) -> None:
    """Refuse a model with SyncBN for several processes on the CPU.

    Args:
        cfg: for the keys that ask for it; None where these are not known.

    Raises:
        ValueError: naming the keys, or the first of these norms.
    """
    names = [name for name, x in model.named_modules() if isinstance(x, nn.SyncBatchNorm)]
    if names:
        values = leaves(cfg.MODEL, "MODEL.") if cfg else {}
        keys = [f"{key}: {value!r}" for key, value in values.items() if _SYNCED in str(value)]
        raise ValueError(
            f"{', '.join(keys) or names[0]}: {_SYNCED} of several processes needs GPUs, but"
            " the device is the CPU: take BN or GN"
        )


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Log nothing inside: the processes of the run will."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
