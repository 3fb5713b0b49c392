"""The settings of a pyramid, as one record.

Each field of `PyramidSettings` is a key of `MODEL.FPN` and an argument of `PyramidBackbone`. The
defaults of a config, the constructor, `MODEL.FPN.WARM_START_FROM` and docs/config.md follow from
the record, so that a new key is one field here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields, replace
from typing import Any, Callable, Mapping, Sequence

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from fpn_plugin.pyramid.blocks import ACTIVATIONS, BLOCKS
from fpn_plugin.pyramid.compose import EXTRA_LEVELS, add_extra_levels, build_graph, stages
from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.graph import Graph, Operator, OperatorLike, as_operator
from fpn_plugin.pyramid.graph_yaml import parse_graph
from fpn_plugin.pyramid.norms import norm_layer
from fpn_plugin.pyramid.resample import DOWNSAMPLE, UPSAMPLE
from fpn_plugin.pyramid.resolve import Defaults, ResolvedNode, resolve
from fpn_plugin.pyramid.topologies import INNER_LEVELS, OWN_LEVELS, TOPOLOGIES, Style
from fpn_plugin.registry import Registry, bad_argument, unknown_name

SECTION = "MODEL.FPN"
_MAX_RFP_STEPS = 8  # a whole network each; the paper has 2
_MAX_CHANNELS = 8192  # one 3x3 convolution of so many takes 2.4 GB
# what parts of a pyramid get that say nothing else
_OPERATORS = ("fuse_type", "upsample", "downsample", "lateral", "block")
# Detectron2's own choices: build_retinanet_resnet_fpn_backbone, and its FCOS config
_EXTRA_LEVELS = {"RetinaNet": "conv_c5", "FCOS": "conv_p5"}


def _setting(
    default: Any, doc: str, registry: Registry[Any] | None = None, key_default: Any = None
) -> Any:
    """A field of the record.

    Args:
        doc: the meaning of its key, in Markdown.
        registry: the names that it may have, or that of a mapping `{name: ..., argument: ...}`.
        key_default: of the config's key, if another than the argument's.
    """
    key_default = default if key_default is None else key_default
    return field(
        default=default, metadata={"doc": doc, "registry": registry, "key_default": key_default}
    )


@dataclass(frozen=True, eq=False)
class PyramidSettings:
    """What a pyramid follows from, beside the maps that it reads.

    Records are equal if they are written in the same way: `True` is not `1`. Hence the values may
    be lists and mappings, as a config has them.
    """

    topology: str = _setting(
        "fpn",
        "one of [the catalogue](catalogue.md), or several joined by `+`, each on the maps that the"
        " one before gives: `fpn+pafpn+bfp`; a step's arguments stand in brackets:"
        " `fpn+dyhead(depth=4)`",
        TOPOLOGIES,
    )
    graph: Sequence[Mapping[str, Any]] = _setting(
        (),
        "a pyramid of your own instead of `TOPOLOGY`: a list of nodes (`name`, `level`, `inputs`,"
        " `fuse`, `block`, `output`) and of steps over several levels (`name`, `step`, `inputs`,"
        " `output`), whose map of level 3 is called `<name>_p3`. `LATERAL`, `BLOCK` and `REPEATS`"
        " do not apply to it: a node names its own block",
        key_default=[],
    )
    repeats: int = _setting(
        1, "how often the topology runs, each time on the maps that the last run gave"
    )
    in_features: Sequence[str] = _setting(
        (), "the bottom-up maps to read, from high to low resolution", key_default=[]
    )
    inner_levels: int = _setting(
        -1,
        "how many coarser levels the topologies that fuse them"
        f" ({', '.join(f'`{name}`' for name in sorted(INNER_LEVELS))}) make from the top map that"
        " they read, in a stack the first of them; `-1`: what it takes to have five (`bfp`,"
        " `msdeform` and those that are not the first of a stack: none)",
    )
    extra_levels: str = _setting(
        "none",
        "levels coarser than the last of these, made at the end: `none`; `maxpool` (P6, the top"
        " output subsampled); `conv_c5` or `conv_p5` (P6 and P7 by 3x3 convolutions with stride 2"
        " from the top bottom-up or output map); `auto`: `none` for a `GRAPH` and for topologies"
        " that make levels of their own, else as in Detectron2, `conv_c5` for RetinaNet, `conv_p5`"
        " for FCOS and `maxpool` for everything else",
        key_default="auto",
    )
    out_channels: int = _setting(256, "the width of all maps")
    fuse_type: OperatorLike = _setting("sum", "how maps are fused", FUSIONS)
    upsample: OperatorLike = _setting(
        "nearest", "how a coarser map is brought to a finer level", UPSAMPLE
    )
    downsample: OperatorLike = _setting(
        "maxpool", "how a finer map is brought to a coarser level", DOWNSAMPLE
    )
    lateral: OperatorLike = _setting(
        "conv1x1",
        "the block on each bottom-up map; arguments of its own, here as in every key that names an"
        ' operator, stand in brackets: `conv1x1(norm="")`',
        BLOCKS,
    )
    block: OperatorLike = _setting("conv3x3", "the block of each output", BLOCKS)
    norm: str = _setting(
        "", "of all convolutions in the pyramid: `GN`, `BN`, `SyncBN`, `FrozenBN`, `LN`"
    )
    norm_eps: float = _setting(
        0.0, "of all norms in the pyramid; `0`: the layer's own (EfficientDet: 0.001)"
    )
    norm_momentum: float = _setting(
        0.0, "of all norms with running statistics; `0`: the layer's own (EfficientDet: 0.01)"
    )
    activation: str = _setting(
        "", 'of the blocks (`""`: none, or what a topology prescribes)', ACTIVATIONS
    )

    rfp_steps: int = _setting(
        1,
        "how often network and pyramid run, DetectoRS' recursive feature pyramid (its own: `2`):"
        " each further run is that of a network of its own, which reads the image and the maps"
        " before, and begins as a copy of the first; Detectron2's ResNets alone. The pyramid's"
        " weights are the same in all runs, so take norms without statistics",
    )

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and repr(other) == repr(self)

    def __hash__(self) -> int:
        return hash(repr(self))

    def as_keys(self) -> dict[str, Any]:
        """The values by the names of their keys: `{"TOPOLOGY": ...}`."""
        return {each.name.upper(): getattr(self, each.name) for each in fields(self)}

    @functools.lru_cache(maxsize=64)
    def check(self) -> None:
        """Check what can be checked without knowing the bottom-up maps, once for each record.

        Raises:
            ValueError: (KeyError for an unknown name) naming the argument, the value and the
                choices.
        """
        stages(self.topology)
        for each in fields(self):
            registry = each.metadata["registry"]
            if registry is not None and each.name != "topology":
                registry.get(self._operator(each.name).name, each.name)
        if self.extra_levels not in EXTRA_LEVELS:
            raise unknown_name("extra_levels", self.extra_levels, EXTRA_LEVELS)
        if type(self.out_channels) is not int or not 1 <= self.out_channels <= _MAX_CHANNELS:
            raise bad_argument(
                "out_channels",
                f"{self.out_channels!r} is not a whole number from 1 to {_MAX_CHANNELS}",
            )
        if type(self.rfp_steps) is not int or not 1 <= self.rfp_steps <= _MAX_RFP_STEPS:
            raise bad_argument(
                "rfp_steps", f"{self.rfp_steps!r} is not a whole number from 1 to {_MAX_RFP_STEPS}"
            )
        if self.rfp_steps > 1 and self.out_channels % 4:
            raise bad_argument(
                "rfp_steps",
                f"{self.rfp_steps} divides the channels among four convolutions, but"
                f" `out_channels` {self.out_channels} is not divisible by 4",
            )
        if not is_names(self.in_features):
            raise bad_argument("in_features", f"{self.in_features!r} is not a list of names")
        for name in ("norm_eps", "norm_momentum"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise bad_argument(name, f"{value!r} is not a number from 0 to 1")
        norm_layer(self.norm, self.out_channels)
        if self.graph and self.repeats != 1:
            raise bad_argument(
                "repeats",
                f"{self.repeats} repeats a `topology`, but `graph` is given: write its nodes as"
                " often as they shall run",
            )

    def build_graph(self, levels: Mapping[str, int]) -> Graph:
        """The pyramid's graph, built once for each record and levels.

        Args:
            levels: of the bottom-up maps, by name.

        Raises:
            ValueError: what `check` raises, and for a graph that cannot be built on these levels.
        """
        self.check()
        functions = tuple(TOPOLOGIES.get(each.name) for each in stages(self.topology))
        return _build_graph(self, tuple(levels.items()), functions)

    def refuse_unread(self, levels: Mapping[str, int], channels: Mapping[str, int]) -> None:
        """Refuse an operator that is set to another than its default, but that no part of the
        pyramid follows from, as `downsample` of `pafpn`, which has its own.

        Args:
            levels: and `channels`: of the bottom-up maps, by name.

        Raises:
            ValueError: naming the argument.
        """
        parts = self._parts(levels, channels)
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name not in _OPERATORS or value == each.default:
                continue
            default: Any = each.default
            plain = replace(self, **{each.name: default})
            try:
                is_read = plain._parts(levels, channels) != parts
            except ValueError:  # it cannot be built with the default
                is_read = True
            if not is_read:
                pyramid = "`graph`" if self.graph else f"`topology` {self.topology!r}"
                raise bad_argument(
                    each.name,
                    f"{value!r} is set, but nothing reads it: no part of {pyramid} on"
                    f" {', '.join(levels)} takes it from there. Leave it out",
                )

    def _parts(
        self, levels: Mapping[str, int], channels: Mapping[str, int]
    ) -> tuple[ResolvedNode, ...]:
        return resolve(self.build_graph(levels), channels, self.defaults())

    def defaults(self) -> Defaults:
        """What nodes and edges get that do not say otherwise."""
        return Defaults(
            self.out_channels,
            self._operator("fuse_type"),
            self._operator("upsample"),
            self._operator("downsample"),
            self.norm,
            self.activation,
            self.norm_eps,
            self.norm_momentum,
        )

    def style(self) -> Style:
        """What a topology leaves open."""
        return Style(self._operator("lateral"), self._operator("block"), self.activation)

    def _operator(self, name: str) -> Operator:
        operator = as_operator(getattr(self, name), name)
        if operator is None:
            raise bad_argument(name, "None is not an operator")
        return operator


@functools.lru_cache(maxsize=64)
def _build_graph(
    settings: PyramidSettings, levels: tuple[tuple[str, int], ...], functions: tuple[Callable, ...]
) -> Graph:
    """`functions`, those of the topologies, are there for the cache: one may be registered anew."""
    if settings.graph:
        graph = parse_graph(dict(levels), settings.graph)
        graph = add_extra_levels(graph, settings.extra_levels)
    else:
        graph = build_graph(
            settings.topology,
            dict(levels),
            settings.style(),
            settings.repeats,
            settings.extra_levels,
            settings.inner_levels,
        )
    graph.check()
    return graph


def pyramid_keys() -> list[str]:
    """The keys of `MODEL.FPN` that a pyramid follows from."""
    return [each.name.upper() for each in fields(PyramidSettings)]


def add_pyramid_keys(fpn: CfgNode) -> None:
    """Add the record's keys to `MODEL.FPN`; those that Detectron2 has keep their defaults."""
    for each in fields(PyramidSettings):
        if each.name.upper() not in fpn:
            default = each.metadata["key_default"]
            fpn[each.name.upper()] = list(default) if isinstance(default, list) else default


def make_settings(**arguments: Any) -> PyramidSettings:
    """A record from the arguments of a pyramid."""
    return PyramidSettings(**arguments)


def settings_from_keys(keys: Mapping[str, Any]) -> PyramidSettings:
    """A record from values by the names of their keys."""
    return PyramidSettings(**{key.lower(): value for key, value in keys.items()})


def settings_of_python(config: Mapping[str, Any]) -> PyramidSettings | None:
    """The record of a Python config's pyramid, which is not built; None where it has none, or
    holds two.

    Args:
        config: what a run of it wrote down.
    """
    whole = OmegaConf.create(dict(config), flags={"allow_objects": True})
    backbone = OmegaConf.select(whole, "model.backbone")
    if not isinstance(backbone, DictConfig):
        return None
    if not str(backbone.get("_target_")).endswith("PyramidBackbone") or "warm_from" in backbone:
        return None
    names = [name.lower() for name in pyramid_keys() if name.lower() in backbone]
    values = OmegaConf.to_container(OmegaConf.create({name: backbone[name] for name in names}))
    return make_settings(**values)  # type: ignore[arg-type]


def read_settings(cfg: CfgNode) -> PyramidSettings:
    """The record of a config, with `EXTRA_LEVELS: auto` resolved.

    Raises:
        UnknownNameError: (a KeyError) for an unknown `MODEL.FPN.TOPOLOGY`.
    """
    keys = {key: cfg.MODEL.FPN[key] for key in pyramid_keys()}
    return settings_from_keys({**keys, "EXTRA_LEVELS": extra_levels_for(cfg)})


def extra_levels_for(cfg: CfgNode) -> str:
    """`MODEL.FPN.EXTRA_LEVELS`, with "auto" replaced by what Detectron2 would do."""
    fpn = cfg.MODEL.FPN
    choices = ("auto", *EXTRA_LEVELS)
    if fpn.EXTRA_LEVELS not in choices:
        raise unknown_name("extra_levels", fpn.EXTRA_LEVELS, choices)
    if fpn.EXTRA_LEVELS != "auto":
        return fpn.EXTRA_LEVELS
    first = stages(fpn.TOPOLOGY)[0].name
    if fpn.GRAPH or INNER_LEVELS.get(first) or fpn.INNER_LEVELS > 0:
        return "none"
    extra = _EXTRA_LEVELS.get(cfg.MODEL.META_ARCHITECTURE, "maxpool")
    # their own levels go beyond the maps that they read
    return "conv_p5" if extra == "conv_c5" and first in OWN_LEVELS else extra


def is_names(value: object) -> bool:
    """Whether a value is a list of texts."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    return all(isinstance(name, str) for name in value)
