"""Scripted, traced, compiled and exported pyramids: every operator in a small graph, every topology."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    OPERATORS,
    FromImage,
    assert_same,
    operator_pyramid,
    pyramid_of,
    rounding_of,
    small_maps,
    small_pyramid,
)
from inline_graphs import INLINE, inline_pyramid

from fpn_plugin.compat import COMPILE, EXPORT, TORCH, require_torch
from fpn_plugin.pyramid.graph import op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.topologies import TOPOLOGIES

# above the coarsest stride, 128 pixels; torch.export takes a side of one for a constant
SMALLEST, EXAMPLE, SIZE = 130, (150, 261), (192, 135)


@torch.no_grad()
def assert_compiles(pyramid: Pyramid) -> None:
    """Script and trace to the eager numbers up to one rounding; compile without a graph break and
    export with dynamic height and width to 1e-5."""
    model = FromImage(pyramid).eval()
    example = torch.randn(1, 3, *EXAMPLE)
    exact = [torch.jit.script(model), torch.jit.trace(model, (example,), strict=False)]
    close = []
    if TORCH >= EXPORT:
        torch._dynamo.reset()
        sides = {dim: torch.export.Dim(f"d{dim}", min=SMALLEST, max=2048) for dim in (2, 3)}
        close = [
            torch.compile(model, fullgraph=True, backend="eager", dynamic=True),
            torch.export.export(model, (example,), dynamic_shapes=(sides,)).module(),
        ]
    for x in (example, torch.randn(1, 3, *SIZE)):
        expected = model(x)
        if "res5" in pyramid.graph.inputs:  # else finer maps are multiples of the one input's
            for name, y in expected.items():
                assert list(y.shape[2:]) == [-(-side // 2 ** int(name[1:])) for side in x.shape[2:]]
        for run in exact:
            assert_same(run(x), expected, rounding_of(pyramid, expected))
        for run in close:
            assert_same(run(x), expected, 1e-5)


@pytest.mark.parametrize("kind, name", OPERATORS)
def test_every_operator(kind: str, name: str) -> None:
    assert_compiles(operator_pyramid(kind, name))


@pytest.mark.parametrize("topology", [*TOPOLOGIES.names(), "fpn+pafpn+bfp"])
def test_every_topology(topology: str) -> None:
    assert_compiles(small_pyramid(topology))


@pytest.mark.parametrize("extra", ["maxpool", "conv_c5", "conv_p5"])
def test_extra_levels_and_repeats(extra: str) -> None:
    assert_compiles(small_pyramid("fpn", extra, repeats=2))


@pytest.mark.parametrize("name", INLINE)
def test_inline_graphs(name: str) -> None:
    assert_compiles(inline_pyramid(name, norm="GN", fuse=op("fast_normalized")))


def test_inductor_gives_the_eager_numbers() -> None:
    require_torch(COMPILE, "torch.compile", "")
    model = FromImage(inline_pyramid("bifpn", fuse=op("fast_normalized"))).eval()
    torch._dynamo.reset()
    x = torch.randn(1, 3, 64, 96)
    assert_same(torch.compile(model, fullgraph=True)(x), model(x), 1e-4)


@pytest.mark.parametrize("case", [("topology", "bifpn"), ("block", "csp")])
def test_training_compiles(case: tuple[str, str]) -> None:
    """In one piece and for any size, with norms that learn; so do their statistics."""
    require_torch(COMPILE, "torch.compile", "")
    pyramid = small_pyramid(case[1], norm="BN") if case[0] == "topology" else pyramid_of(*case)
    compiled = copy.deepcopy(pyramid)
    torch._dynamo.reset()
    compiled.compile_graph(backend="eager", fullgraph=True, dynamic=True)
    for size in ((64, 96), (65, 97)):
        maps = {name: small_maps(*size, batch=2)[name] for name in pyramid.graph.inputs}
        assert_same(compiled(maps), pyramid(maps), 1e-5)
    assert_same(compiled.state_dict(), pyramid.state_dict(), 1e-6)
