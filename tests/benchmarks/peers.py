"""Pyramids of other packages with the weights of one of ours. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from torch import Tensor, nn
from torchvision.ops import feature_pyramid_network as torchvision_fpn

from fpn_plugin.benchmark.inputs import Inputs
from fpn_plugin.benchmark.measure import Pair, Section
from fpn_plugin.benchmark.models import (
    BenchmarkModel,
    GivenMaps,
    PreparedModel,
    prepare,
)
from fpn_plugin.benchmark.workloads import (
    backward_workload,
    forward_workload,
    neck_inputs,
)
from fpn_plugin.config import extra_levels_for
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.registry import Registry
from fpn_plugin.visualize.complexity import count_parameters, padded_size


class NoPeer(ValueError):
    """A package has no counterpart of this pyramid; the message says why."""


@dataclass(frozen=True)
class OurPyramid:
    """The pyramid that a peer is built to equal.

    Attributes:
        backbone: in evaluation mode, on the CPU.
        size: of the padded image, in pixels.
    """

    backbone: PyramidBackbone
    cfg: CfgNode
    size: tuple[int, int]

    @property
    def topology(self) -> str:
        return "" if self.cfg.MODEL.FPN.GRAPH else self.cfg.MODEL.FPN.TOPOLOGY

    @property
    def inputs(self) -> Mapping[str, int]:
        """The levels of the maps that are read."""
        return self.backbone.graph.inputs

    @property
    def shapes(self) -> dict[str, ShapeSpec]:
        given = self.backbone.bottom_up.output_shape()
        return {name: given[name] for name in self.inputs}

    @property
    def width(self) -> int:
        return self.backbone.defaults.channels

    def state(self) -> dict[str, Tensor]:
        """The pyramid's tensors."""
        state = self.backbone.state_dict()
        return {name: x for name, x in state.items() if not name.startswith("bottom_up.")}


@dataclass(frozen=True)
class Peer:
    """Another package's pyramid.

    Attributes:
        name: package and class.
        module: a dict of bottom-up maps in, ours of the same names out; in evaluation mode.
    """

    name: str
    module: nn.Module


PEERS: Registry[Callable[[OurPyramid], Peer]] = Registry("--peers")


class RenamedOutputs(nn.Module):
    """A pyramid whose outputs get the names of ours.

    Args:
        module: what is called, with a list of maps or with a dict.
        names: of the outputs, from high to low resolution.
        as_list: whether it takes a list.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], as_list: bool) -> None:
        super().__init__()
        self.module = module
        self.names = tuple(names)
        self.as_list = as_list

    def forward(self, maps: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Bottom-up maps to pyramid maps."""
        outputs = self.module(list(maps.values()) if self.as_list else OrderedDict(maps))
        maps_out = outputs.values() if isinstance(outputs, dict) else outputs
        return dict(zip(self.names, maps_out, strict=True))


def _copy_weights(module: nn.Module, ours: OurPyramid, rename: Callable[[str], str]) -> None:
    """Give a peer our weights; every one of ours must be used.

    Raises:
        NoPeer: if the two do not have the same weights.
    """
    state = ours.state()
    names = {key: rename(key) for key in module.state_dict()}
    if set(names.values()) != set(state):
        unmatched = sorted(set(names.values()) ^ set(state))
        raise NoPeer(f"a {type(module).__name__} has other weights: {', '.join(unmatched[:3])}, …")
    module.load_state_dict({key: state[name] for key, name in names.items()})


def _require(ours: OurPyramid, **supported: tuple[Any, ...]) -> None:
    """Raise NoPeer unless keys of MODEL.FPN have one of the values that the peer supports."""
    fpn = ours.cfg.MODEL.FPN
    supported = {**supported, "REPEATS": supported.get("REPEATS", (1,)), "GRAPH": ([],)}
    for key, values in supported.items():
        if fpn[key] not in values:
            raise NoPeer(
                f"MODEL.FPN.{key} is {fpn[key]!r}; it supports {', '.join(map(repr, values))}"
            )


_PLAIN: dict[str, tuple[Any, ...]] = {
    "TOPOLOGY": ("fpn",),
    "UPSAMPLE": ("nearest",),
    "LATERAL": ("conv1x1",),
    "BLOCK": ("conv3x3",),
    "ACTIVATION": ("",),
    "NORM_EPS": (0.0,),
}


@PEERS.register("detectron2")
def detectron2_peer(ours: OurPyramid) -> Peer:
    """Detectron2's `FPN`, or its `SimpleFeaturePyramid` for `simple`."""
    if ours.topology == "simple":
        return _simple_peer(ours)
    _require(ours, **{**_PLAIN, "FUSE_TYPE": ("sum", "avg")})
    width, (top, *_) = ours.width, reversed(ours.shapes)
    tops = {
        "none": lambda: None,
        "maxpool": LastLevelMaxPool,
        "conv_c5": lambda: LastLevelP6P7(ours.shapes[top].channels, width, top),
        "conv_p5": lambda: LastLevelP6P7(width, width, f"p{ours.inputs[top]}"),
    }
    peer = FPN(
        GivenMaps(ours.shapes, ours.backbone.bottom_up),
        list(ours.shapes),
        width,
        norm=ours.cfg.MODEL.FPN.NORM,
        top_block=tops[extra_levels_for(ours.cfg)](),
        fuse_type=ours.cfg.MODEL.FPN.FUSE_TYPE,
    )
    _copy_weights(peer, ours, lambda key: key)
    return Peer("detectron2 FPN", peer.eval())


def _simple_peer(ours: OurPyramid) -> Peer:
    _require(ours, LATERAL=("conv1x1",), BLOCK=("conv3x3",), ACTIVATION=("",), NORM=("LN",))
    ((name, level),) = ours.inputs.items()
    extra = extra_levels_for(ours.cfg)
    if extra not in ("none", "maxpool") or level != 4:
        raise NoPeer("it is made for a map of stride 16 and MODEL.FPN.EXTRA_LEVELS none or maxpool")
    peer = SimpleFeaturePyramid(
        GivenMaps(ours.shapes, ours.backbone.bottom_up),
        name,
        ours.width,
        (4.0, 2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool() if extra == "maxpool" else None,
        norm="LN",
    )
    names = simple_names()
    _copy_weights(
        peer, ours, lambda key: f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}"
    )
    return Peer("detectron2 SimpleFeaturePyramid", peer.eval())


def simple_names() -> dict[str, str]:
    """Our name of each module of Detectron2's SimpleFeaturePyramid, by stage `simfp_{level}` and
    place in it."""
    names = {
        "simfp_2.0": "simple_output2_edge0.resample.layers.0",
        "simfp_2.1": "simple_output2_edge0.resample.layers.1",
        "simfp_2.3": "simple_output2_edge0.resample.layers.3",
        "simfp_3.0": "simple_output3_edge0.resample.layers.0",
    }
    for level, place in {2: 4, 3: 1, 4: 0, 5: 1}.items():
        for step, mine in enumerate((f"simple_output{level}_edge0.block", f"simple_output{level}")):
            names[f"simfp_{level}.{place + step}"] = mine
            names[f"simfp_{level}.{place + step}.norm"] = f"{mine}.norm"
    return names


@PEERS.register("torchvision")
def torchvision_peer(ours: OurPyramid) -> Peer:
    """torchvision's `FeaturePyramidNetwork`."""
    _require(ours, **_PLAIN, FUSE_TYPE=("sum",), NORM=("",))
    channels = [shape.channels for shape in ours.shapes.values()]
    tops = {
        "none": lambda: None,
        "maxpool": torchvision_fpn.LastLevelMaxPool,
        "conv_c5": lambda: torchvision_fpn.LastLevelP6P7(channels[-1], ours.width),
    }
    extra = extra_levels_for(ours.cfg)
    if extra not in tops:
        raise NoPeer(f"MODEL.FPN.EXTRA_LEVELS is {extra!r}; it supports {', '.join(tops)}")
    peer = torchvision_fpn.FeaturePyramidNetwork(channels, ours.width, tops[extra]())
    levels = list(ours.inputs.values())

    def rename(key: str) -> str:
        module, index, _, parameter = (key.split(".") + [""])[:4]
        if module == "extra_blocks":
            return key.replace("extra_blocks", "top_block")
        role = "lateral" if module == "inner_blocks" else "output"
        return f"fpn_{role}{levels[int(index)]}.{parameter}"

    _copy_weights(peer, ours, rename)
    return Peer("torchvision FeaturePyramidNetwork", _with_our_names(peer, ours, as_list=False))


@PEERS.register("effdet")
def effdet_peer(ours: OurPyramid) -> Peer:
    """effdet's `BiFpn`, as its models build it."""
    repeats = ours.cfg.MODEL.FPN.REPEATS
    if ours.topology not in ("bifpn", "qufpn"):
        raise NoPeer(f"MODEL.FPN.TOPOLOGY is {ours.topology!r}; it supports 'bifpn', 'qufpn'")
    _require(
        ours,
        REPEATS=(repeats,),
        NORM=("BN", "SyncBN"),
        FUSE_TYPE=("fast_normalized",),
        BLOCK=("separable",),
    )
    try:
        from effdet import get_efficientdet_config
        from effdet.config import get_fpn_config, set_config_writeable
        from effdet.efficientdet import BiFpn
    except ImportError as error:
        raise ImportError("--peers effdet needs `pip install effdet`") from error
    low, count = min(ours.inputs.values()), len(ours.inputs)
    high = low + len(ours.backbone.output_shape()) - 1
    config = copy.deepcopy(get_efficientdet_config("efficientdet_d0"))
    set_config_writeable(config)
    config.fpn_channels, config.fpn_cell_repeats = ours.width, repeats
    config.min_level, config.max_level, config.num_levels = low, high, high - low + 1
    config.image_size = list(ours.size)
    config.fpn_config = get_fpn_config(f"{ours.topology}_fa", min_level=low, max_level=high)
    peer = BiFpn(config, [{"num_chs": shape.channels} for shape in ours.shapes.values()])
    names = effdet_names(peer, ours.topology, low, count)
    _copy_weights(peer, ours, lambda key: rename_effdet(key, names))
    return Peer("effdet BiFpn", _with_our_names(peer, ours, as_list=True))


@PEERS.register("mmdet")
def mmdet_peer(ours: OurPyramid) -> Peer:
    """MMDetection's `FPN`."""
    _require(ours, **_PLAIN, FUSE_TYPE=("sum",), NORM=("",))
    extra, levels = extra_levels_for(ours.cfg), list(ours.inputs.values())
    if extra not in ("none", "maxpool"):
        raise NoPeer(f"MODEL.FPN.EXTRA_LEVELS is {extra!r}; it supports none, maxpool")
    try:
        from mmdet.models.necks import FPN as MMDetFPN
    except ImportError as error:
        raise ImportError(
            "--peers mmdet needs MMDetection, which needs an mmcv built for your torch: see"
            " MMDetection's installation guide (`mim install mmdet`)"
        ) from error
    channels = [shape.channels for shape in ours.shapes.values()]
    peer = MMDetFPN(channels, ours.width, len(levels) + (extra == "maxpool"))

    def rename(key: str) -> str:
        module, index, _, parameter = key.split(".")
        role = "lateral" if module == "lateral_convs" else "output"
        return f"fpn_{role}{levels[int(index)]}.{parameter}"

    _copy_weights(peer, ours, rename)
    return Peer("mmdet FPN", _with_our_names(peer, ours, as_list=True))


def _with_our_names(module: nn.Module, ours: OurPyramid, as_list: bool) -> nn.Module:
    return RenamedOutputs(module, list(ours.backbone.output_shape()), as_list).eval()


class PeersOfModels:
    """The peers of a benchmark's pyramids, one for all models whose pyramids have the same weights.

    Args:
        names: of PEERS.

    Attributes:
        notes: why a pyramid has no peer, for the report.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.notes: list[str] = []
        self._names = names
        self._peers: list[tuple[str, Peer, list[BenchmarkModel]]] | None = None

    def add_to(
        self, section: Section, models: Mapping[str, BenchmarkModel], inputs: Inputs
    ) -> None:
        """Let the peers run in a section of necks.

        They run as their packages ship them: float32, plain layout, on the maps of such a config.

        Raises:
            ImportError: if a peer's package is not installed.
        """
        workload_of = {"neck": forward_workload, "neck_train": backward_workload}.get(section.name)
        if workload_of is None:
            return
        if self._peers is None:
            self._peers = list(self._build(models.values(), inputs))
        for name, peer, equals in self._peers:
            plain = without_levers(equals[0].config.cfg)
            maps = neck_inputs(prepare(equals[0].model, plain, training=False), inputs)
            module = peer.module.to(plain.MODEL.DEVICE).train(section.name == "neck_train")
            workload = workload_of(module, maps, PreparedModel(module, inputs.device, None), inputs)
            workload.facts["parameters"] = count_parameters(module)
            section.workloads[name] = workload
            section.pairs += [Pair(model.name, name) for model in equals]

    def _build(
        self, models: Iterable[BenchmarkModel], inputs: Inputs
    ) -> Iterator[tuple[str, Peer, list[BenchmarkModel]]]:
        groups: dict[str, list[BenchmarkModel]] = {}
        for model in models:
            if isinstance(model.model.backbone, PyramidBackbone):
                groups.setdefault(repr(sorted(model.shapes("neck").items())), []).append(model)
        for name in self._names:
            for group in groups.values():
                first = group[0]
                backbone = first.model.backbone
                ours = OurPyramid(backbone, first.config.cfg, padded_size(backbone, inputs.size))
                try:
                    peer = PEERS.get(name)(ours)
                except NoPeer as reason:
                    self.notes.append(f"{first.name} has no peer in {name}: {reason}")
                    continue
                label = peer.name if len(groups) == 1 else f"{peer.name} ({first.name})"
                yield label, peer, group


def without_levers(cfg: CfgNode, *, keep_types: bool = False) -> CfgNode:
    """The config uncompiled, and in full precision and plain layout too.

    Args:
        keep_types: leave precision and layout as they are.
    """
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.COMPILE = ""
    if not keep_types:
        plain.MODEL.CHANNELS_LAST = plain.SOLVER.AMP.ENABLED = plain.TEST.FOLD_NORMS = False
    return plain


def _effdet_nodes(topology: str, low: int, high: int) -> list[str]:
    """Our nodes in the order of effdet's `fnode` list, without the topology's name before them.

    Args:
        topology: "bifpn" or "qufpn".
        low: the finest level.
        high: the coarsest.
    """
    inner, levels = range(low + 1, high), range(low, high + 1)
    down_up = [f"td{level}" for level in reversed(inner)] + [f"out{level}" for level in levels]
    if topology == "bifpn":
        return down_up
    up_down = [f"bu{level}" for level in inner] + [f"out{level}" for level in reversed(levels)]
    return (
        [f"a_{name}" for name in down_up]
        + [f"b_{name}" for name in up_down]
        + [f"out{level}" for level in levels]
    )


def effdet_names(model: Any, topology: str, low: int, inputs: int) -> dict[str, str]:
    """Our name of each of effdet's modules with parameters, and of its fusion weights.

    Args:
        model: an `effdet.efficientdet.BiFpn`.
        topology: "bifpn" or "qufpn".
        low: the finest level.
        inputs: how many bottom-up maps it reads.
    """
    first = f"{topology}_in{low + inputs}_edge0.project"
    names = {f"resample.{inputs}.conv.conv": first, f"resample.{inputs}.conv.bn": f"{first}.norm"}
    nodes = _effdet_nodes(topology, low, low + model.num_levels - 1)
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


def rename_effdet(key: str, names: Mapping[str, str]) -> str:
    """Our key of one of effdet's tensors, by the names of :func:`effdet_names`."""
    if key in names:
        return names[key]
    module, _, parameter = key.rpartition(".")
    return f"{names[module]}.{parameter}"
