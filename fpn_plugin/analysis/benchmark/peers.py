"""Pyramids of other packages with the weights of one of ours. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Callable, Dict, Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from torch import Tensor, nn

from fpn_plugin.analysis.benchmark.neck import Given
from fpn_plugin.config import extra_levels_for
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.registry import Registry


class NoPeer(ValueError):
    """A package has nothing that equals this pyramid; the message says why."""


@dataclass(frozen=True)
class Ours:
    """What a peer is built after.

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


PEERS: Registry[Callable[[Ours], Peer]] = Registry("--peers")


class Renamed(nn.Module):
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


def _load(module: nn.Module, ours: Ours, rename: Callable[[str], str]) -> None:
    """Give a peer our weights; every one of ours must be used.

    Raises:
        NoPeer: if the two have other weights.
    """
    state, wanted = ours.state(), module.state_dict()
    names = {key: rename(key) for key in wanted}
    if set(names.values()) != set(state):
        odd = sorted(set(names.values()) ^ set(state))
        raise NoPeer(f"a {type(module).__name__} has other weights: {', '.join(odd[:3])}, …")
    module.load_state_dict({key: state[name] for key, name in names.items()})


def _need(ours: Ours, **wanted: tuple[Any, ...]) -> None:
    """Raise NoPeer unless keys of MODEL.FPN are among the values that the peer can do."""
    fpn = ours.cfg.MODEL.FPN
    for key, values in {**wanted, "REPEATS": wanted.get("REPEATS", (1,)), "GRAPH": ([],)}.items():
        if fpn[key] not in values:
            raise NoPeer(
                f"MODEL.FPN.{key} is {fpn[key]!r}, and it knows {', '.join(map(repr, values))}"
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
def detectron2_peer(ours: Ours) -> Peer:
    """Detectron2's `FPN`, or its `SimpleFeaturePyramid` for `simple`."""
    if ours.topology == "simple":
        return _simple_peer(ours)
    _need(ours, **{**_PLAIN, "FUSE_TYPE": ("sum", "avg")})
    width, (top, *_) = ours.width, reversed(ours.shapes)
    tops = {
        "none": lambda: None,
        "maxpool": LastLevelMaxPool,
        "conv_c5": lambda: LastLevelP6P7(ours.shapes[top].channels, width, top),
        "conv_p5": lambda: LastLevelP6P7(width, width, f"p{ours.inputs[top]}"),
    }
    made = FPN(
        Given(ours.shapes, ours.backbone.bottom_up),
        list(ours.shapes),
        width,
        norm=ours.cfg.MODEL.FPN.NORM,
        top_block=tops[extra_levels_for(ours.cfg)](),
        fuse_type=ours.cfg.MODEL.FPN.FUSE_TYPE,
    )
    _load(made, ours, lambda key: key)
    return Peer("detectron2 FPN", made.eval())


def _simple_peer(ours: Ours) -> Peer:
    _need(ours, LATERAL=("conv1x1",), BLOCK=("conv3x3",), ACTIVATION=("",), NORM=("LN",))
    ((name, level),) = ours.inputs.items()
    extra = extra_levels_for(ours.cfg)
    if extra not in ("none", "maxpool") or level != 4:
        raise NoPeer("it is made for a map of stride 16 and MODEL.FPN.EXTRA_LEVELS none or maxpool")
    made = SimpleFeaturePyramid(
        Given(ours.shapes, ours.backbone.bottom_up),
        name,
        ours.width,
        (4.0, 2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool() if extra == "maxpool" else None,
        norm="LN",
    )
    names = simple_names()
    _load(made, ours, lambda key: f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}")
    return Peer("detectron2 SimpleFeaturePyramid", made.eval())


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
def torchvision_peer(ours: Ours) -> Peer:
    """torchvision's `FeaturePyramidNetwork`."""
    from torchvision.ops import feature_pyramid_network as theirs

    _need(ours, **_PLAIN, FUSE_TYPE=("sum",), NORM=("",))
    channels = [shape.channels for shape in ours.shapes.values()]
    tops = {
        "none": lambda: None,
        "maxpool": theirs.LastLevelMaxPool,
        "conv_c5": lambda: theirs.LastLevelP6P7(channels[-1], ours.width),
    }
    extra = extra_levels_for(ours.cfg)
    if extra not in tops:
        raise NoPeer(f"MODEL.FPN.EXTRA_LEVELS is {extra!r}, and it knows {', '.join(tops)}")
    made = theirs.FeaturePyramidNetwork(channels, ours.width, tops[extra]())
    levels = list(ours.inputs.values())

    def rename(key: str) -> str:
        kind, index, _, last = (key.split(".") + [""])[:4]
        if kind == "extra_blocks":
            return key.replace("extra_blocks", "top_block")
        return f"fpn_{'lateral' if kind == 'inner_blocks' else 'output'}{levels[int(index)]}.{last}"

    _load(made, ours, rename)
    return Peer("torchvision FeaturePyramidNetwork", _renamed(made, ours, as_list=False))


@PEERS.register("effdet")
def effdet_peer(ours: Ours) -> Peer:
    """effdet's `BiFpn`, as its models build it."""
    from fpn_plugin.analysis.benchmark.effdet_names import our_names, rename

    repeats = ours.cfg.MODEL.FPN.REPEATS
    if ours.topology not in ("bifpn", "qufpn"):
        raise NoPeer(f"MODEL.FPN.TOPOLOGY is {ours.topology!r}, and it knows 'bifpn', 'qufpn'")
    wanted = {"FUSE_TYPE": ("fast_normalized",), "BLOCK": ("separable",)}
    _need(ours, REPEATS=(repeats,), NORM=("BN", "SyncBN"), **wanted)
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
    made = BiFpn(config, [{"num_chs": shape.channels} for shape in ours.shapes.values()])
    names = our_names(made, ours.topology, low, count)
    _load(made, ours, lambda key: rename(key, names))
    return Peer("effdet BiFpn", _renamed(made, ours, as_list=True))


@PEERS.register("mmdet")
def mmdet_peer(ours: Ours) -> Peer:
    """MMDetection's `FPN`."""
    _need(ours, **_PLAIN, FUSE_TYPE=("sum",), NORM=("",))
    extra, levels = extra_levels_for(ours.cfg), list(ours.inputs.values())
    if extra not in ("none", "maxpool"):
        raise NoPeer(f"MODEL.FPN.EXTRA_LEVELS is {extra!r}, and it knows none, maxpool")
    try:
        from mmdet.models.necks import FPN as Theirs
    except ImportError as error:
        raise ImportError(
            "--peers mmdet needs MMDetection, which needs an mmcv built for your torch: see"
            " MMDetection's installation guide (`mim install mmdet`)"
        ) from error
    channels = [shape.channels for shape in ours.shapes.values()]
    made = Theirs(channels, ours.width, len(levels) + (extra == "maxpool"))

    def rename(key: str) -> str:
        kind, index, _, last = key.split(".")
        return (
            f"fpn_{'lateral' if kind == 'lateral_convs' else 'output'}{levels[int(index)]}.{last}"
        )

    _load(made, ours, rename)
    return Peer("mmdet FPN", _renamed(made, ours, as_list=True))


def _renamed(module: nn.Module, ours: Ours, as_list: bool) -> nn.Module:
    return Renamed(module, list(ours.backbone.output_shape()), as_list).eval()
