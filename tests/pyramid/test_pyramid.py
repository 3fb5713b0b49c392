"""The executor, over every topology: shapes, gradients, odd sizes, memory, and every way to compile it."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from helpers import CHANNELS, LEVELS, assert_same, randomize, rounding_of, small_maps, small_pyramid
from torch import Tensor, nn

from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.graph import Edge, Graph, node, op, parse_graph
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resample import DOWNSAMPLE, UPSAMPLE
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.topologies import INNER_LEVELS, TOPOLOGIES

GOLDEN = json.loads(Path(__file__).with_name("golden_keys.json").read_text())
STACKS = ["fpn+bfp", "fpn+asff", "fpn+pafpn+bfp"]
EXTRA = {"none": [], "maxpool": ["p6"], "conv_c5": ["p6", "p7"], "conv_p5": ["p6", "p7"]}

# Shapes that later topologies need, as inline graphs: EfficientDet's cell with inputs that are projected twice, Feature
# Pyramid Grids' convolutions on edges, and ASFF's all-to-all.
PRE = {"order": "act-conv-norm", "activation": "silu"}
INLINE = {
    "bifpn": [
        {
            "name": "in6",
            "level": 6,
            "inputs": [{"source": "res5", "project": {"name": "conv1x1", "activation": ""}}],
        },
        {
            "name": "td5",
            "level": 5,
            "inputs": ["res5", "in6"],
            "block": {"name": "separable", **PRE},
        },
        {
            "name": "td4",
            "level": 4,
            "inputs": ["res4", "td5"],
            "block": {"name": "separable", **PRE},
        },
        {"name": "out4", "level": 4, "inputs": ["res4", "td4"], "output": True},
        {"name": "out5", "level": 5, "inputs": ["res5", "td5", "out4"], "output": True},
        {"name": "out6", "level": 6, "inputs": ["in6", "out5"], "output": True},
    ],
    "fpg": [
        {"name": "l4", "level": 4, "inputs": ["res4"], "block": "conv1x1"},
        {
            "name": "a5",
            "level": 5,
            "inputs": ["res5", {"source": "l4", "resample": {"name": "conv", **PRE}}],
        },
        {
            "name": "b4",
            "level": 4,
            "inputs": [
                {"source": "l4", "block": {"name": "conv1x1", **PRE}},
                {"source": "a5", "block": {"name": "conv3x3", **PRE}},
            ],
            "output": True,
        },
        {"name": "b5", "level": 5, "inputs": ["a5"], "output": True, "block": "conv3x3"},
    ],
    "asff": [
        {"name": f"out{level}", "level": level, "inputs": ["res4", "res5"], "block": "conv3x3"}
        for level in (4, 5)
    ],
}


def inline_pyramid(name: str, **defaults: object) -> Pyramid:
    graph = parse_graph({"res4": 4, "res5": 5}, INLINE[name])
    return randomize(Pyramid(graph, CHANNELS, Defaults(32, **defaults)))  # type: ignore[arg-type]


def every_pyramid() -> list:
    """Each topology and some stacks, each kind of extra level, repeats, and the inline graphs."""
    every = [*TOPOLOGIES.names(), *STACKS]
    cases = [pytest.param(lambda n=n: small_pyramid(n), id=n) for n in every]
    cases += [
        pytest.param(lambda e=e: small_pyramid("fpn", e), id=f"fpn-{e}")
        for e in EXTRA
        if e != "none"
    ]
    cases += [
        pytest.param(lambda n=n: small_pyramid(n, repeats=2), id=f"{n}x2")
        for n in ("fpn", "bifpn", "nas_fpn")
    ]
    fuse = op("fast_normalized")
    cases += [
        pytest.param(lambda n=n: inline_pyramid(n, norm="GN", fuse=fuse), id=f"inline-{n}")
        for n in INLINE
    ]
    return cases


@pytest.mark.parametrize("topology", [*TOPOLOGIES.names(), *STACKS])
@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("size", [(64, 96), (97, 131), (33, 40)])
def test_shapes_order_and_values(topology: str, extra: str, size: tuple[int, int]) -> None:
    own = ["p6"] if topology in INNER_LEVELS else []
    if extra == "conv_c5" and own:
        with pytest.raises(ValueError, match="extra_levels: 'conv_c5' reads 'res5'"):
            small_pyramid(topology, extra)
        return
    added = [f"p{int(name[1:]) + len(own)}" for name in EXTRA[extra]]
    if extra == "conv_c5" and topology == "simple":
        with pytest.raises(ValueError, match="extra_levels: 'conv_c5' reads 'res4'"):
            small_pyramid(topology, extra)
        return
    outputs = small_pyramid(topology, extra)(small_maps(*size, batch=2))
    assert list(outputs) == ["p2", "p3", "p4", "p5", *own, *added]
    for name, x in outputs.items():
        # from one map of stride 16, the finer sizes are its multiples
        side = 16 if topology == "simple" and int(name[1:]) < 4 else 2 ** int(name[1:])
        scale = side // 2 ** int(name[1:])
        assert tuple(x.shape[:2]) == (2, 32)
        assert tuple(x.shape[2:]) == tuple(-(-length // side) * scale for length in size)
        assert x.isfinite().all()


@pytest.mark.parametrize("build", every_pyramid())
def test_every_parameter_gets_a_gradient(build) -> None:
    pyramid = build()
    outputs = pyramid(small_maps(batch=2))
    sum((x * torch.randn_like(x)).sum() for x in outputs.values()).backward()
    without = [n for n, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("build", every_pyramid())
def test_inputs_are_left_alone(build) -> None:
    maps = small_maps()
    before = {name: x.clone() for name, x in maps.items()}
    build()(maps)
    assert_same(maps, before)


@pytest.mark.parametrize("fuse", FUSIONS.names())
@pytest.mark.parametrize("norm", ["", "BN", "GN"])
def test_every_fusion_and_norm_in_a_topology(fuse: str, norm: str) -> None:
    pyramid = small_pyramid("fpn", fuse=op(fuse), norm=norm)
    assert all(x.isfinite().all() for x in pyramid(small_maps(batch=2)).values())
    assert any(".norm." in key for key in pyramid.state_dict()) is bool(norm)


@pytest.mark.parametrize("fuse", FUSIONS.names())
@pytest.mark.parametrize("topology", ["fpn", "pafpn", "bifpn", "nas_fpn"])
def test_every_fusion_in_any_topology(fuse: str, topology: str) -> None:
    pairs_only = getattr(FUSIONS.get(fuse), "arity", 0) == 2
    if pairs_only and topology == "bifpn":  # it has nodes with three inputs
        with pytest.raises(
            ValueError, match=f"node .*, fuse: {fuse} fuses 2 maps, but .* 3 inputs"
        ):
            small_pyramid(topology, fuse=op(fuse))
        return
    outputs = small_pyramid(topology, fuse=op(fuse))(small_maps(97, 131, batch=2))
    assert all(x.isfinite().all() for x in outputs.values())


@pytest.mark.parametrize("up", UPSAMPLE.names())
@pytest.mark.parametrize("down", DOWNSAMPLE.names())
def test_every_resampler_in_a_graph(up: str, down: str) -> None:
    pyramid = inline_pyramid("asff", upsample=op(up), downsample=op(down))
    outputs = pyramid(small_maps(97, 131))
    assert {name: tuple(x.shape[2:]) for name, x in outputs.items()} == {"p4": (7, 9), "p5": (4, 5)}


@pytest.mark.parametrize("build", every_pyramid())
def test_script(build) -> None:
    pyramid = build().eval()
    scripted = torch.jit.script(pyramid)
    for size in [(64, 96), (97, 131), (160, 64)]:
        maps = small_maps(*size)
        outputs = pyramid(maps)
        assert_same(scripted(maps), outputs, rounding_of(pyramid, outputs))


@pytest.mark.parametrize("build", every_pyramid())
@torch.no_grad()
def test_trace(build) -> None:
    pyramid = build().eval()
    traced = torch.jit.trace(pyramid, (small_maps(),), strict=False)
    for size in [(64, 96), (97, 131), (160, 64)]:
        maps = small_maps(*size)
        outputs = pyramid(maps)
        assert_same(traced(maps), outputs, rounding_of(pyramid, outputs))


@pytest.mark.parametrize("build", every_pyramid())
def test_compile_without_a_graph_break(build) -> None:
    """The whole forward is one graph; running it as it is keeps the test fast."""
    pyramid = build().eval()
    torch._dynamo.reset()
    compiled = torch.compile(pyramid, fullgraph=True, backend="eager", dynamic=True)
    for size in [(64, 96), (97, 131)]:
        maps = small_maps(*size)
        assert_same(compiled(maps), pyramid(maps), 1e-5)


@pytest.mark.parametrize("topology", ["fpn", "bifpn"])
def test_inductor_gives_the_eager_numbers(topology: str) -> None:
    pyramid = small_pyramid(topology).eval()
    torch._dynamo.reset()
    maps = small_maps()
    assert_same(torch.compile(pyramid, fullgraph=True)(maps), pyramid(maps), 1e-4)


class FromImage(nn.Module):
    """Gives a pyramid its maps from one image, so that their sizes stay tied to each other in an export."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid
        convs = {}
        channels = 3
        for name, level in LEVELS.items():
            stride = 4 if level == 2 else 2
            convs[name] = nn.Conv2d(channels, CHANNELS[name], 3, stride=stride, padding=1)
            channels = CHANNELS[name]
        self.convs = nn.ModuleDict(convs)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name, conv in self.convs.items():
            x = conv(x)
            maps[name] = x
        return self.pyramid(maps)


@pytest.mark.parametrize("build", every_pyramid())
def test_export_with_dynamic_height_and_width(build) -> None:
    model = FromImage(build()).eval()
    # any size above the coarsest stride, 128 pixels here; torch.export takes a side of one for a constant
    sides = {dim: torch.export.Dim(name, min=130, max=2048) for dim, name in ((2, "h"), (3, "w"))}
    program = torch.export.export(model, (torch.randn(1, 3, 389, 517),), dynamic_shapes=(sides,))
    for size in [(256, 320), (301, 135), (517, 258)]:
        x = torch.randn(1, 3, *size)
        assert_same(program.module()(x), model(x), 1e-5)


@torch.no_grad()
def test_a_map_is_freed_after_its_last_reader() -> None:
    pyramid = small_pyramid("fpn")
    alive: dict[str, weakref.ref] = {}
    at_the_end: list[str] = []

    def record(name: str):
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            alive[name] = weakref.ref(output)
            if name == "fpn_output2":
                gc.collect()
                at_the_end.extend(other for other, ref in alive.items() if ref() is not None)

        return hook

    for name, module in pyramid.named_children():
        module.register_forward_hook(record(name))
    pyramid(small_maps())
    # at the last node, only the outputs and what that node reads are left
    assert sorted(set(at_the_end) - {"fpn_merge2_fuse"}) == [
        f"fpn_output{level}" for level in (2, 3, 4, 5)
    ]


def test_the_edge_order_of_a_node_is_kept() -> None:
    pyramid = small_pyramid("fpn", fuse=op("fast_normalized"))
    pyramid.get_submodule("fpn_merge2_fuse").weights.data = torch.tensor([1.0, 0.0])
    maps = small_maps()
    expected = pyramid.get_submodule("fpn_output2")(
        pyramid.get_submodule("fpn_lateral2")(maps["res2"]) / 1.0001
    )
    assert torch.allclose(pyramid(maps)["p2"], expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_checkpoint_keys_are_the_golden_ones(name: str) -> None:
    topology, extra, fuse = name.split()
    assert list(small_pyramid(topology, extra, fuse=op(fuse)).state_dict()) == GOLDEN[name]


def test_every_topology_has_golden_keys() -> None:
    assert {name.split()[0] for name in GOLDEN} >= set(TOPOLOGIES.names())


@pytest.mark.parametrize(
    "nodes, message",
    [
        (
            [node("a", 4, ["res4", "res5"], fuse=op("sum", eps=1))],
            "node 'a', fuse, arguments of sum.*'eps'",
        ),
        ([node("a", 4, ["res4", "res5"], block=op("conv3x3", act="relu"))], "'act'.*activation"),
        (
            [node("a", 4, ["res4", "res5"], block=op("conv3x3", activation="x"))],
            "node 'a', block: .*'x'",
        ),
        (
            [node("a", 4, ["res4", "res5"], block=op("conv3x3", norm="XN"))],
            "node 'a', block: .*'XN'",
        ),
        (
            [node("a", 4, ["res4", Edge("res5", project=op("identity"))])],
            "node 'a', fuse: sum fuses maps of one width, but its inputs have 64 and 32 channels",
        ),
        (
            [node("training", 4, ["res4", "res5"], block=op("conv3x3"))],
            "'training': the name is taken",
        ),
    ],
)
def test_bad_arguments_name_the_node(nodes: list, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        Pyramid(
            Graph({"res4": 4, "res5": 5}, tuple(nodes), (nodes[0].name,)), CHANNELS, Defaults(64)
        )
