"""What several tests build: Detectron2's zoo configs, small pyramids, and their inputs."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, Mapping

import torch
from detectron2 import model_zoo, modeling
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.registry import Registry as Detectron2Registry
from torch import Tensor, nn

from fpn_plugin import add_fpn_config, plugins
from fpn_plugin.config.settings import PyramidSettings
from fpn_plugin.evaluation.build import EVALUATORS
from fpn_plugin.pyramid import (
    ACTIVATIONS,
    BLOCKS,
    DOWNSAMPLE,
    FUSIONS,
    NORMS,
    TOPOLOGIES,
    UPSAMPLE,
)
from fpn_plugin.pyramid.build import REGISTRIES
from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.graph import Graph, Node, Step, node, op, step
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.topologies import OWN_LEVELS, Style

LEVELS = {"res2": 2, "res3": 3, "res4": 4, "res5": 5}
CHANNELS = {"res2": 8, "res3": 16, "res4": 24, "res5": 32}
OPERATORS = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.names()]
CASES = [*OPERATORS, *(("topology", name) for name in TOPOLOGIES.names())]
"""Every name that a pyramid can be made of."""


def zoo_config(path: str, *overrides: Any) -> CfgNode:
    """A Detectron2 zoo config with our keys, on the CPU, without weights."""
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(path))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *overrides])
    return cfg


@contextmanager
def own_datasets() -> Iterator[None]:
    """Forget the datasets that are registered inside, and before that those of one's own data that
    another test has left."""
    before = set(DatasetCatalog.list()) - {"own_train", "own_val"}
    _forget_datasets(before)
    try:
        yield
    finally:
        _forget_datasets(before)


@contextmanager
def own_imports() -> Iterator[None]:
    """Forget what a user's own code is imported as inside, and the names that it registers."""
    registries = (
        *(ACTIVATIONS, BLOCKS, DOWNSAMPLE, EVALUATORS, FUSIONS, NORMS, TOPOLOGIES, UPSAMPLE),
        *(each for each in vars(modeling).values() if isinstance(each, Detectron2Registry)),
    )
    names = [dict(vars(r).get("_objects", vars(r).get("_obj_map"))) for r in registries]
    modules, path, trusted = set(sys.modules), list(sys.path), plugins._trusted
    loaded = dict(plugins._loaded)
    plugins._has_installed = False
    try:
        with own_datasets():
            yield
    finally:
        for registry, before in zip(registries, names):
            objects = vars(registry).get("_objects", vars(registry).get("_obj_map"))
            objects.clear()
            objects.update(before)
        for name in set(sys.modules) - modules:
            if not str(getattr(sys.modules[name], "__file__", "")).startswith(sys.prefix):
                del sys.modules[name]
        sys.path[:] = path
        plugins.trust(trusted)
        plugins._loaded.clear()
        plugins._loaded.update(loaded)
        plugins._has_installed = False
        PyramidSettings.check.cache_clear()


def _forget_datasets(kept: set[str]) -> None:
    for name in set(DatasetCatalog.list()) - kept:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def small_maps(height: int = 64, width: int = 96, batch: int = 1) -> dict[str, Tensor]:
    """Random bottom-up maps for an image of that size, sizes rounded up as a ResNet does."""
    return {
        name: torch.randn(batch, CHANNELS[name], -(-height // 2**level), -(-width // 2**level))
        for name, level in LEVELS.items()
    }


def levels_of(topology: str) -> dict[str, int]:
    """The inputs that a topology takes: those of a plain ViT read one map, or several of a level."""
    return {"res4": 4} if topology in OWN_LEVELS else LEVELS


def finest_of(topology: str) -> int:
    """The finest level that a topology gives on `LEVELS`: YOLOv6's only reads level 2, and LW-DETR's
    makes one level finer than its input."""
    return 3 if topology in ("bifusion", "projector") else 2


def small_pyramid(
    topology: str = "fpn", extra: str = "none", repeats: int = 1, **defaults: Any
) -> Pyramid:
    """A catalogue pyramid of width 32 on `small_maps`, of steps that run several times one alone."""
    name = re.sub("dyhead|sepc", r"\g<0>(depth=1)", topology)
    graph = build_graph(name, levels_of(topology), Style(), repeats, extra)
    return randomize(Pyramid(graph, CHANNELS, Defaults(32, **defaults)))


def operator_pyramid(kind: str, name: str) -> Pyramid:
    """A node that reads two maps, of which one is resampled, or a step over both, with one of
    `OPERATORS`."""
    level, block = 5 if kind == "down" else 4, name if kind == "block" else "conv3x3"
    given = {"fuse": "sum", "up": "nearest", "down": "maxpool", kind: name}
    defaults = Defaults(
        32, op(given["fuse"]), op(given["up"]), op(given["down"]), norm="BN", activation="relu"
    )
    last: Node | Step = node("out", level, ["res5", "res4"], block=block)
    if kind == "step":
        last = step("out", {4: "res4", 5: "res5"}, name)
    graph = Graph({"res4": 4, "res5": 5}, (last,), tuple(last.maps()))
    return randomize(Pyramid(graph, CHANNELS, defaults))


def pyramid_of(kind: str, name: str) -> Pyramid:
    """The pyramid of one of `CASES`."""
    return small_pyramid(name) if kind == "topology" else operator_pyramid(kind, name)


class FromImage(nn.Module):
    """Computes a pyramid's inputs from an image, so that an export knows how their sizes relate."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid
        convs, channels, below = {}, 3, 0
        for name, level in pyramid.graph.inputs.items():
            convs[name] = nn.Conv2d(
                channels, CHANNELS[name], 3, stride=2 ** (level - below), padding=1
            )
            channels, below = CHANNELS[name], level
        self.convs = nn.ModuleDict(convs)

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        maps = {}
        for name, conv in self.convs.items():
            x = conv(x)
            maps[name] = x
        return self.pyramid(maps)


def randomize(module: nn.Module) -> Any:
    """Give every parameter a random value, so that biases and fusion weights are seen to count.

    Fusion weights stay positive: fast_normalized takes no gradient below zero. So do the biases
    before ReLU of what scales a whole map.
    """
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.1)
        if name.endswith((".weights", ".scale.bias")):
            parameter.data.abs_()
    return module


def assert_same(
    one: Mapping[str, Tensor], two: Mapping[str, Tensor], tolerance: float = 0.0
) -> None:
    """The same maps in the same order: bit for bit, or up to `tolerance`."""
    assert list(one) == list(two)
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=0, atol=tolerance), name


def rounding(fusions: Iterable[str], maps: Iterable[Tensor]) -> float:
    """How far the one-pass sums of these fusions may be from plain operations.

    With a learned weight per map a product and a sum round once in one pass and twice apart: 1e-6
    of the largest value. All others have the same bits.
    """
    if not {"weighted", "softmax", "fast_normalized"} & set(fusions):
        return 0.0
    return 1e-6 * max(float(x.detach().abs().max()) for x in maps)


def rounding_of(pyramid: Pyramid, maps: Mapping[str, Tensor]) -> float:
    """:func:`rounding` of all fusions in a pyramid, whose outputs are given."""
    names = [step.fuse.operator.name for step in pyramid.steps if step.fuse]
    return rounding(names, maps.values())
