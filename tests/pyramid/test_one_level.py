"""Pyramids from several maps of one level: levels, odd sizes, exports, errors. Their values:
tests/parity."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same
from torch import Tensor

from fpn_plugin.compat import EXPORT, require_torch
from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.graph import op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resample import UPSAMPLE
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.topologies import Style

NAMES = ["res4_1", "res4_2", "res4_5", "res4"]
PROJECTOR: dict[str, Any] = {
    "upsample": op("deconv", shrink=True, reduce_above=512),
    "downsample": op("conv", activation="relu"),
    "activation": "silu",
    "norm": "LN",
}
C2F = op("c2f", depth=3, shortcut=False)


def pyramid(
    topology: str, embed: int = 8, count: int = 4, block: Any = op("conv3x3"), **defaults: Any
) -> Pyramid:
    inputs = dict.fromkeys(NAMES[4 - count :], 4)
    graph = build_graph(topology, inputs, Style(block=block))
    return Pyramid(graph, dict.fromkeys(inputs, embed), Defaults(16, **defaults))


def vit_maps(height: int, width: int, embed: int = 8, batch: int = 1) -> dict[str, Tensor]:
    return {name: torch.randn(batch, embed, height, width) for name in NAMES}


CASES = {
    "projector": {"topology": "projector", "block": C2F, **PROJECTOR},
    "resamplers": {"topology": "projector", "upsample": op("carafe"), "downsample": op("avgpool")},
    "feature2pyramid": {"topology": "feature2pyramid", "norm": "LN"},
    "stack": {"topology": "feature2pyramid+fpn"},
}


@pytest.mark.parametrize("case", ["projector", "stack"])
@torch.no_grad()
def test_sizes_and_exports(case: str) -> None:
    module = pyramid(**CASES[case]).eval()
    scripted = torch.jit.script(module)
    traced = torch.jit.trace(module, (vit_maps(6, 8),), strict=False)
    for h, w in ((6, 8), (4, 10), (5, 3)):
        maps = vit_maps(h, w)
        expected = module(maps)
        sizes = {"p2": (4 * h, 4 * w), "p3": (2 * h, 2 * w), "p4": (h, w)}
        sizes["p5"] = (-(-h // 2), -(-w // 2))
        assert list(expected) == list(sizes)[case == "projector" :]
        for name, x in expected.items():
            assert x.shape[2:] == sizes[name]
        for other in (scripted, traced):
            assert_same(other(maps), expected, 1e-4)
    require_torch(EXPORT, "torch.export", "")
    # it takes a side of one, of the coarsest map, for a constant
    sides = {dim: 2 * torch.export.Dim(f"d{dim}", min=2, max=32) for dim in (2, 3)}
    shapes = {"features": dict.fromkeys(NAMES, sides)}
    exported = torch.export.export(module, (vit_maps(6, 8),), dynamic_shapes=shapes).module()
    wide = vit_maps(4, 10)
    assert_same(exported(wide), module(wide), 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_one_pixel_half_precision_and_gradients(case: str) -> None:
    module = pyramid(**CASES[case])
    maps = vit_maps(1, 1)
    assert all(x.isfinite().all() for x in module(maps).values())
    with torch.autocast("cpu", torch.bfloat16):
        half = module(vit_maps(5, 4))
    assert all(x.isfinite().all() for x in half.values())
    sum((x.float() * torch.randn_like(x)).sum() for x in half.values()).backward()  # type: ignore
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
    assert module.bfloat16()({n: x.bfloat16() for n, x in maps.items()})["p4"].dtype == (
        torch.bfloat16
    )


@torch.no_grad()
def test_a_map_of_each_level_from_one_map() -> None:
    """Then all four levels are made from it."""
    module = pyramid("feature2pyramid", count=1, norm="LN")
    assert {node.inputs[0].source for node in module.graph.nodes} == {"res4"}
    assert list(module(vit_maps(3, 4))) == ["p2", "p3", "p4", "p5"]
    four = pyramid("feature2pyramid", norm="LN")
    assert [node.inputs[0].source for node in four.graph.nodes] == NAMES


def test_wide_maps_are_reduced_first() -> None:
    """LW-DETR's rule; the parameters are those of transformers' class, and of RF-DETR's."""

    def parameters(embed: int, **upsample: Any) -> dict[int, int]:
        graph = build_graph("projector", dict.fromkeys(NAMES, 4), Style(block=C2F))
        defaults = {**PROJECTOR, "norm": "BN", "upsample": op("deconv", shrink=True, **upsample)}
        with torch.device("meta"):
            module = Pyramid(graph, dict.fromkeys(NAMES, embed), Defaults(256, **defaults))
        counts = dict.fromkeys((3, 4, 5), 0)
        for name, parameter in module.named_parameters():
            counts[int(name.removeprefix("projector_").lstrip("mixoutpu")[0])] += parameter.numel()
        return counts

    narrow = {3: 2_428_672, 4: 1_444_864, 5: 6_756_352}
    assert parameters(384) == parameters(384, reduce_above=512) == narrow
    assert parameters(768) == {3: 6_164_992, 4: 1_838_080, 5: 23_077_888}
    assert parameters(768, reduce_above=512) == {3: 3_611_392, 4: 1_838_080, 5: 23_077_888}


@torch.no_grad()
def test_wide_maps_equal_lw_detrs() -> None:
    from transformers.models.lw_detr.modeling_lw_detr import LwDetrSamplingLayer

    theirs = LwDetrSamplingLayer(SimpleNamespace(batch_norm_eps=1e-5), 516, 2.0)
    ours = UPSAMPLE.get("deconv")(516, 1, norm="BN", shrink=True, reduce_above=512)
    reduce, deconv = theirs.layers
    ours.layers[0].load_state_dict(
        {
            "weight": reduce.conv.weight,
            **{f"norm.{k}": x for k, x in reduce.norm.state_dict().items()},
        }
    )
    ours.layers[1].load_state_dict(deconv.state_dict())
    x = torch.randn(2, 516, 3, 5)
    for training in (False, True):
        found, expected = ours.train(training)(x, None), theirs.train(training)(x)
        assert found.shape == (2, 129, 6, 10)
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "topology, levels, message",
    [
        ("fpn", (4, 4), "in_features: 'a' and 'b' are both of level 4, and `topology` reads one"),
        ("bifpn", (3, 4, 4), "in_features: 'b' and 'c' are both.*feature2pyramid, projector"),
        ("projector", (3, 4), "topology: 'projector' reads maps of one level.*levels .3, 4"),
        ("projector", (0,), "topology: 'projector' makes a map 2 times finer than 'a'"),
        ("feature2pyramid", (1,), "'feature2pyramid' makes a map 4 times finer than 'a'.*of 2 "),
        ("feature2pyramid", (4, 4, 4), "four levels from four maps, or from one.* names 3"),
        ("simple", (4, 4), "'simple' reads one map"),
        ("fpn+projector", (3, 4), "'projector' reads maps of one level"),
    ],
)
def test_levels_that_do_not_fit(topology: str, levels: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_graph(topology, dict(zip("abc", levels)), Style())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block": op("identity")}, "node 'projector_mix3', block: identity, but stack gives 32"),
        ({"upsample": op("fam")}, "node 'projector_mix3', input 'res4_1', resample: fam is guided"),
        (
            {"upsample": op("deconv", shrink=True), "embed": 5},
            "5 channels cannot be halved 1 times",
        ),
        (
            {"upsample": op("deconv", shrink=True, reduce_above=4), "embed": 6},
            "6 channels cannot be halved 2 times",
        ),
        ({"upsample": op("deconv", reduce_above=4)}, "reduce_above: 4; give a number of channels"),
        (
            {"upsample": op("deconv", shrink=True, reduce_above="x")},
            "reduce_above: 'x'; give a number of channels, with shrink=True, or 0",
        ),
    ],
)
def test_operators_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pyramid("projector", **changes)
