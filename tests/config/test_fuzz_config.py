"""Any value of any key: the pyramid is built and runs, or an error of ours names the key."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone
from fuzzing import NUMBERS, SCALARS, VALUES, WORDS, answer, fuzz_settings, mutated
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fpn_plugin import add_fpn_config, resolve_config
from fpn_plugin.config import load_config, validate_config
from fpn_plugin.config.files import leaves, merge_overrides
from fpn_plugin.engine.data import loader_options
from fpn_plugin.engine.step import build_optimizer
from fpn_plugin.modeling.precision import choose_dtype
from fpn_plugin.pyramid.blocks import ACTIVATIONS
from fpn_plugin.pyramid.compose import EXTRA_LEVELS
from fpn_plugin.pyramid.pyramid import REGISTRIES
from fpn_plugin.pyramid.topologies import TOPOLOGIES

NAME = "fuzz_bottom_up"
ROOT = Path(__file__).resolve().parents[2]


class Tiny(Backbone):
    """One convolution for each map: a network that is built in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleDict(
            {f"res{level}": nn.Conv2d(3, 4 * level, 1, 2**level) for level in range(2, 6)}
        )
        self._out_features = list(self.maps)
        self._out_feature_strides = {f"res{level}": 2**level for level in range(2, 6)}
        self._out_feature_channels = {f"res{level}": 4 * level for level in range(2, 6)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: module(x) for name, module in self.maps.items()}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """Other tests go through all names of the registry."""
    BACKBONE_REGISTRY._do_register(NAME, lambda cfg, input_shape: Tiny())
    yield
    del BACKBONE_REGISTRY._obj_map[NAME]


@functools.lru_cache(maxsize=1)
def _plain() -> CfgNode:
    return get_cfg()


@functools.lru_cache(maxsize=1)
def _base() -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_pyramid_backbone"
    cfg.MODEL.BOTTOM_UP.NAME = NAME
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
    for key in ("RPN", "ROI_HEADS", "RETINANET", "FCOS", "SEM_SEG_HEAD"):
        cfg.MODEL[key].IN_FEATURES = ["auto"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = ["auto"]
    return cfg


OWN = sorted(
    set(leaves(_base())) - set(leaves(_plain()))
    | {"MODEL.BOTTOM_UP.ARGS", "MODEL.BOTTOM_UP.ARGS.x"}
)
READ = [
    *(f"MODEL.FPN.{key}" for key in ("IN_FEATURES", "OUT_CHANNELS", "NORM", "FUSE_TYPE")),
    *(f"MODEL.{key}.IN_FEATURES" for key in ("RPN", "ROI_HEADS", "RETINANET", "SEM_SEG_HEAD")),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"),
    *("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "MODEL.BACKBONE.FREEZE_AT"),
    *("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT", "MODEL.WEIGHTS", "MODEL.DEVICE"),
]
KEYS = [*OWN, *READ]
OPERATORS = [name for registry in REGISTRIES.values() for name in registry.names()]
NAMES = st.one_of(
    st.sampled_from([*TOPOLOGIES.names(), *OPERATORS, *ACTIVATIONS.names(), *EXTRA_LEVELS]),
    st.sampled_from(
        ["GN", "BN", "LN", "SyncBN", "FrozenBN", "fpn+bfp", "fpn+", "+", "fpn+fpn+fpn"]
    ),
    st.sampled_from([NAME, "timm/x", "torchvision/x", "timm/", "/x", "RetinaNet", "FCOS"]),
    st.sampled_from(
        ["PanopticFPN", "ProposalNetwork", "build_bottom_up_backbone", "bf16", "AdamW"]
    ),
)
FEATURES = st.lists(
    st.sampled_from(["res2", "res3", "res4", "res5", "p2", "p3", "p6", "auto"]), max_size=5
)
OPERATOR = st.one_of(
    NAMES,
    st.fixed_dictionaries(
        {"name": NAMES},
        optional={
            key: SCALARS
            for key in ("activation", "norm", "eps", "stride", "dilation", "groups", "x")
        },
    ),
)
ANY = st.one_of(
    VALUES, NAMES, FEATURES, OPERATOR, st.lists(st.lists(NUMBERS, max_size=3), max_size=5)
)


def run(cfg: CfgNode) -> None:
    """What a run's start does with a config, without data."""
    resolve_config(cfg)
    if cfg.MODEL.BACKBONE.NAME == "build_pyramid_backbone":
        validate_config(cfg)
    backbone = build_backbone(cfg).eval()
    if backbone.size_divisibility <= 64:
        with torch.no_grad():
            maps = backbone(torch.zeros(1, 3, 64, 64))
        assert list(maps) == list(backbone.output_shape())
    choose_dtype(cfg.SOLVER.AMP.PRECISION, "cpu", "SOLVER.AMP.PRECISION")
    loader_options(cfg)
    build_optimizer(cfg, backbone)


def from_overrides(pairs: dict[str, Any]) -> None:
    cfg = _base().clone()
    merge_overrides(cfg, [str(part) for pair in pairs.items() for part in pair])
    run(cfg)


def last_parts(keys: Any) -> list[str]:
    """What a message has to have: a key is named by its last part at least."""
    return [key.rpartition(".")[2] for key in keys]


# Values of a key's own type: others end early
BY_TYPE: dict[type, st.SearchStrategy] = {
    bool: st.booleans(),
    int: st.one_of(st.integers(-2, 6), st.sampled_from([8, 24, 32, 64, 10**9, -(10**20)])),
    float: NUMBERS.filter(lambda value: type(value) is float),
    str: st.one_of(NAMES, WORDS),
    list: st.one_of(
        FEATURES,
        st.lists(NUMBERS, max_size=4),
        st.lists(st.lists(NUMBERS, max_size=3), max_size=5),
        st.lists(VALUES, max_size=3),
    ),
}
STACKS = st.lists(st.sampled_from([*TOPOLOGIES.names(), ""]), min_size=1, max_size=3).map("+".join)
BY_KEY: dict[str, st.SearchStrategy] = {
    "MODEL.FPN.TOPOLOGY": STACKS,
    "MODEL.FPN.EXTRA_LEVELS": st.sampled_from(EXTRA_LEVELS),
    "MODEL.FPN.FUSE_TYPE": st.sampled_from(REGISTRIES["fuse"].names()),
    "MODEL.FPN.UPSAMPLE": st.sampled_from(REGISTRIES["up"].names()),
    "MODEL.FPN.DOWNSAMPLE": st.sampled_from(REGISTRIES["down"].names()),
    "MODEL.FPN.LATERAL": st.sampled_from(REGISTRIES["block"].names()),
    "MODEL.FPN.BLOCK": st.sampled_from(REGISTRIES["block"].names()),
    "MODEL.FPN.ACTIVATION": st.sampled_from(ACTIVATIONS.names()),
    "MODEL.FPN.NORM": st.sampled_from(["", "GN", "BN", "LN", "SyncBN", "FrozenBN", "naiveSyncBN"]),
    "MODEL.FPN.OUT_CHANNELS": st.integers(1, 64),
}


@st.composite
def settings_of_keys(draw: st.DrawFn) -> dict[str, Any]:
    """One to four keys, mostly with values that may fit."""
    often = st.sampled_from([key for key in KEYS if key.startswith("MODEL.FPN.")])
    keys = st.lists(st.one_of(often, st.sampled_from(KEYS)), min_size=1, max_size=4, unique=True)
    pairs = {}
    for key in draw(keys):
        typed = BY_TYPE.get(type(leaves(_base()).get(key)), ANY)
        chosen = draw(st.sampled_from(["key", "key", "key", "type", "type", "any"]))
        known = BY_KEY.get(key, typed)
        pairs[key] = draw({"key": known, "type": typed, "any": ANY}[chosen])
    return pairs


@fuzz_settings(300)
@given(settings_of_keys())
def test_any_value_of_any_key(pairs: dict[str, Any]) -> None:
    answer(lambda: from_overrides(pairs), *last_parts(pairs), "MODEL.", "node")


@fuzz_settings(100)
@given(WORDS, st.one_of(WORDS, VALUES.map(str)), st.sampled_from(["", "MODEL.", "MODEL.FPN."]))
def test_any_key(word: str, value: str, section: str) -> None:
    answer(lambda: from_overrides({section + word: value}))


GRAPH: list[dict[str, Any]] = [
    {"name": "top", "level": 5, "inputs": ["res5"], "block": "conv1x1"},
    {
        "name": "side",
        "level": 4,
        "inputs": [{"source": "res4", "project": "identity"}],
        "block": {"name": "conv1x1", "norm": "BN"},
    },
    {
        "name": "join",
        "level": 4,
        "inputs": ["side", {"source": "top", "resample": "bilinear", "block": "conv1x1"}],
        "fuse": {"name": "fast_normalized", "eps": 0.001},
        "block": "separable",
        "output": True,
    },
    {"name": "down", "level": 6, "inputs": ["top"], "block": "identity", "output": True},
]


def named(*kinds: str) -> st.SearchStrategy:
    """Operators of these kinds, by name or with an argument."""
    names = st.sampled_from([name for kind in kinds for name in REGISTRIES[kind].names()])
    words = st.sampled_from(["activation", "norm", "eps", "stride", "groups", "dilation", "shrink"])
    values = st.one_of(SCALARS, st.sampled_from(["relu", "GN", "BN", 2, 4, True]))
    with_one = st.tuples(names, words, values).map(lambda t: {"name": t[0], t[1]: t[2]})
    return st.one_of(names, with_one)


SOURCES = st.sampled_from(["top", "side", "join", "down", "res4", "res5"])
BY_FIELD: dict[Any, st.SearchStrategy] = {
    "level": st.integers(1, 13),
    "source": SOURCES,
    "name": st.sampled_from(["top", "b.c", "conv1x1", "softmax", "x_fuse", "bottom_up", "1", ""]),
    "block": named("block"),
    "project": named("block"),
    "fuse": named("fuse"),
    "resample": named("up", "down"),
    "inputs": st.lists(SOURCES, max_size=4),
    "output": st.booleans(),
    "eps": NUMBERS,
    "norm": st.sampled_from(["GN", "BN", "LN", "x", "", 3]),
    0: SOURCES,
    1: SOURCES,
}
ANYTHING = st.one_of(VALUES, OPERATOR, SOURCES)


ACTIONS = st.sampled_from([*["replace"] * 6, "add", "add", "drop", "double"])
ADDED = st.sampled_from(["output", "fuse", "block", "project", "resample", "eps"])


@st.composite
def graphs(draw: st.DrawFn) -> Any:
    """The graph, changed in one to three places, mostly to what may stand there."""

    def value(path: tuple) -> Any:
        likely = BY_FIELD.get(path[-1], ANYTHING) if len(path) > 1 else ANYTHING
        return draw(ANYTHING if draw(st.integers(0, 5)) == 0 else likely)

    return mutated(draw, GRAPH, ACTIONS, ADDED, value)


@fuzz_settings(200)
@given(graphs())
def test_any_graph(graph: Any) -> None:
    pairs = {"MODEL.FPN.IN_FEATURES": ["res4", "res5"], "MODEL.FPN.GRAPH": graph}
    answer(lambda: from_overrides(pairs), "GRAPH", "node", "input", "outputs", "MODEL.")


QUICKSTART = ROOT / "configs" / "quickstart"
TEXT = (QUICKSTART / "faster_rcnn_trees_FPN.yaml").read_text()
TEXT = TEXT.replace("_BASE_: ", f"_BASE_: {QUICKSTART}/")
PIECES = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["[", "]", "{", "}", ":", "- ", "\n", "\t", "!!", "&a ", "*a", "#", "'", '"', "|", ">"]
    ),
    st.sampled_from(
        ["!!python/object/apply:os.getcwd []", "!!python/tuple ", "!!set ", "!!binary ", "!x "]
    ),
    st.sampled_from(
        ["_BASE_: ", "? ", "<<: ", "%YAML 9", "---\n", "...\n", "2001-01-01", "0x", "1_0", ".nan"]
    ),
    VALUES.map(str),
)


@fuzz_settings(150)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30), PIECES), min_size=1, max_size=4))
def test_any_yaml(changes: list[tuple[float, int, str]]) -> None:
    text = TEXT
    for share, drop, piece in changes:
        start = int(share * len(text))
        text = text[:start] + piece + text[start + drop :]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "fuzz.yaml")
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        args: Any = SimpleNamespace(config_file=str(file), opts=[])
        answer(lambda: load_config(args), "fuzz.yaml", "MODEL", "INPUT")
