"""The executor over every topology: shapes, gradients, odd sizes, memory, checkpoint keys."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from helpers import CHANNELS, assert_same, finest_of, small_maps, small_pyramid
from inline_graphs import INLINE, inline_pyramid
from torch import Tensor, nn

from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.graph import Edge, Graph, node, op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import WIDENING, Defaults
from fpn_plugin.pyramid.topologies import INNER_LEVELS, OWN_LEVELS, TOPOLOGIES

GOLDEN = json.loads(Path(__file__).with_name("golden_keys.json").read_text())
STACKS = ["fpn+bfp", "fpn+asff", "fpn+pafpn+bfp"]
EXTRA = {"none": [], "maxpool": ["p6"], "conv_c5": ["p6", "p7"], "conv_p5": ["p6", "p7"]}


@pytest.mark.parametrize("topology", [*TOPOLOGIES.names(), *STACKS])
@pytest.mark.parametrize("extra", EXTRA)
def test_shapes_order_and_values(topology: str, extra: str) -> None:
    own = ["p6"] if INNER_LEVELS.get(topology) else []
    if extra == "conv_c5" and (own or topology in OWN_LEVELS):
        with pytest.raises(ValueError, match="extra_levels: 'conv_c5' reads 'res"):
            small_pyramid(topology, extra)
        return
    added = [f"p{int(name[1:]) + len(own)}" for name in EXTRA[extra]]
    pyramid = small_pyramid(topology, extra)
    for size in [(64, 96), (97, 131), (33, 40)]:
        outputs = pyramid(small_maps(*size, batch=2))
        levels = [f"p{level}" for level in range(finest_of(topology), 6)]
        assert list(outputs) == [*levels, *own, *added]
        for name, x in outputs.items():
            # from one map of stride 16, the finer sizes are its multiples
            side = 16 if topology in OWN_LEVELS and int(name[1:]) < 4 else 2 ** int(name[1:])
            scale = side // 2 ** int(name[1:])
            assert tuple(x.shape[:2]) == (2, 32)
            assert tuple(x.shape[2:]) == tuple(-(-length // side) * scale for length in size)
            assert x.isfinite().all()


def every_pyramid() -> list:
    """Each topology and some stacks, each kind of extra level, repeats, and the inline graphs."""
    every = [(name, "none", 1) for name in [*TOPOLOGIES.names(), *STACKS]]
    every += [("fpn", extra, 1) for extra in EXTRA if extra != "none"]
    every += [(name, "none", 2) for name in ("fpn", "bifpn", "nas_fpn")]
    cases = [pytest.param(lambda case=case: small_pyramid(*case), id=str(case)) for case in every]
    fuse = op("fast_normalized")
    cases += [
        pytest.param(lambda n=n: inline_pyramid(n, norm="GN", fuse=fuse), id=n) for n in INLINE
    ]
    return cases


@pytest.mark.parametrize("build", every_pyramid())
def test_every_parameter_gets_a_gradient_and_inputs_are_left_alone(build) -> None:
    pyramid, maps = build(), small_maps(batch=2)
    before = {name: x.clone() for name, x in maps.items()}
    outputs = pyramid(maps)
    assert_same(maps, before)
    sum((x * torch.randn_like(x)).sum() for x in outputs.values()).backward()
    without = [n for n, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("fuse", FUSIONS.names())
@pytest.mark.parametrize("topology, norm", [("fpn", ""), ("pafpn", "BN"), ("bifpn", "GN")])
def test_every_fusion_in_a_topology(fuse: str, topology: str, norm: str) -> None:
    if FUSIONS.get(fuse).arity == 2 and topology == "bifpn":  # it has nodes with three inputs
        with pytest.raises(
            ValueError, match=f"node .*, fuse: {fuse} fuses 2 maps, but .* 3 inputs"
        ):
            small_pyramid(topology, fuse=op(fuse))
        return
    if fuse == WIDENING and topology != "bifpn":  # it has nodes without a block
        with pytest.raises(ValueError, match="node 'fpn_merge4', block: identity, but stack gives"):
            small_pyramid(topology, fuse=op(fuse))
        return
    if fuse == "freq" and topology == "pafpn":  # it has nodes that are downsampled to
        with pytest.raises(
            ValueError, match="node 'pafpn_output3', fuse: freq upsamples a map to level"
        ):
            small_pyramid(topology, fuse=op(fuse))
        return
    pyramid = small_pyramid(topology, fuse=op(fuse), norm=norm)
    assert all(x.isfinite().all() for x in pyramid(small_maps(97, 131, batch=2)).values())
    assert any(".norm." in key for key in pyramid.state_dict()) is bool(norm)


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
