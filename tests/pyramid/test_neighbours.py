"""DyHead and SEPC by what their papers say; tests/parity holds DyHead against other packages."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import CHANNELS, randomize
from torch import Tensor, nn

from fpn_plugin.pyramid import Pyramid, Step, op
from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.steps.neighbours import SEPC, DyHead

LEVELS = (3, 4, 5)


def some_maps(*sizes: tuple[int, int], channels: int = 16) -> list[Tensor]:
    return [torch.randn(2, channels, *size) for size in sizes]


@pytest.mark.parametrize("published_order", [False, True])
def test_without_weights_dyhead_gives_half_of_its_norms_biases(published_order: bool) -> None:
    step = DyHead(16, LEVELS, depth=1, bias=True, published_order=published_order)
    beta = torch.arange(-8, 8) / 8
    for name, parameter in step.named_parameters():
        nn.init.constant_(parameter, float(name.endswith("norm.weight")))
        if name.endswith("norm.bias"):
            parameter.data.copy_(beta)
    for y in step(some_maps((11, 18), (6, 9), (3, 5))):
        assert torch.equal(y, (beta / 2).clamp(min=0).view(-1, 1, 1).expand_as(y))


def test_dyhead_starts_without_offsets_and_learns_them() -> None:
    step = DyHead(16, LEVELS, depth=1)
    offset = step.blocks[0].offset
    assert not offset.weight.any() and not offset.bias.any()
    sum(y.square().sum() for y in step(some_maps((8, 8), (4, 4), (2, 2)))).backward()
    assert offset.weight.grad.any()


@pytest.mark.parametrize("kind", [DyHead, SEPC])
def test_a_backbone_may_round_its_sizes_down(kind: type[nn.Module]) -> None:
    step = randomize(kind(16, LEVELS, depth=2))
    fine, middle, coarse = some_maps((7, 15), (3, 7), (1, 3))
    outputs = step([fine, middle, coarse])
    assert [y.shape for y in outputs] == [x.shape for x in (fine, middle, coarse)]
    step = randomize(kind(16, LEVELS[1:], depth=1))
    inner = step([fine, middle])[1]  # a map with the row and column that no tap starts from
    assert torch.allclose(step([fine[:, :, :6, :14], middle])[1], inner)


def test_sepc_sums_three_convolutions_and_normalizes_all_levels_together() -> None:
    step = randomize(SEPC(16, LEVELS, norm="BN", depth=1))
    conv = step.convs[0]
    maps = some_maps((11, 18), (6, 9), (3, 5))

    def convolved(name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = getattr(conv, name)
        return F.conv2d(x, kernel.weight, kernel.bias, stride, padding=1)

    sums = [convolved("same", x) for x in maps]
    for i, (finer, coarser) in enumerate(pairwise(maps)):
        sums[i + 1] = sums[i + 1] + convolved("finer", finer, 2)
        up = nn.UpsamplingBilinear2d(finer.shape[2:])  # from corner to corner
        sums[i] = sums[i] + up(convolved("coarser", coarser))
    pixels = torch.cat([x.permute(1, 0, 2, 3).flatten(1) for x in sums], dim=1)  # (C, all pixels)
    mean, variance = pixels.mean(1), pixels.var(1, unbiased=False)
    for x, y in zip(sums, step(maps)):
        expected = F.batch_norm(
            x, mean.detach(), variance.detach(), conv.norm.weight, conv.norm.bias
        ).relu()
        assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(conv.norm.running_mean, mean / 10, atol=1e-6)


def test_a_deformable_sepc_starts_as_the_plain_one_and_moves_no_tap_of_the_finest_map() -> None:
    plain, deformable = SEPC(16, LEVELS, depth=1), SEPC(16, LEVELS, depth=1, deformable=True)
    deformable.load_state_dict(plain.state_dict(), strict=False)
    maps = some_maps((11, 18), (6, 9), (3, 5))
    expected = plain(maps)
    for x, y in zip(deformable(maps), expected):
        assert torch.allclose(x, y, atol=1e-6)
    for kernel in (deformable.convs[0].finer, deformable.convs[0].coarser):
        nn.init.constant_(kernel.offset.bias, 0.5)
    same = [torch.allclose(x, y, atol=1e-6) for x, y in zip(deformable(maps), expected)]
    assert same == [True, False, False]


def test_arguments_stand_in_the_topology() -> None:
    graph = build_graph("fpn+dyhead(depth=2, groups=8)", {"res4": 4, "res5": 5}, inner_levels=2)
    assert list(graph.output_names()) == ["p4", "p5", "p6", "p7"]
    last = graph.nodes[-1]
    assert isinstance(last, Step) and last.operator == op("dyhead", depth=2, groups=8)
    pyramid = Pyramid(graph, CHANNELS, Defaults(24))
    assert len(pyramid.get_submodule("s2_dyhead.blocks")) == 2


@pytest.mark.parametrize(
    "topology, message",
    [
        ("fpn(depth=2)+dyhead", r"topology 'fpn.*: fpn\(depth=2\), but fpn takes no arguments"),
        ("fpn+dyhead(depth)", r"topology 'fpn.*'dyhead\(depth\)' is not an operator"),
        ("fpn+dyhaed(depth=2)", "topology 'fpn.*unknown name 'dyhaed'.*did you mean 'dyhead'"),
        ("fpn+dyhead(dept=2)", "step 's2_dyhead', arguments of dyhead: unknown name 'dept'"),
        ("fpn+dyhead(depth=0)", "step 's2_dyhead': depth: 0 is not a whole number"),
        ("fpn+sepc(depth=-1)", "step 's2_sepc': depth: -1 is not a whole number"),
    ],
)
def test_bad_arguments_in_the_topology(topology: str, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        Pyramid(build_graph(topology, {"res4": 4, "res5": 5}), CHANNELS, Defaults(32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [DyHead, SEPC])
def test_half_precision(kind: type[nn.Module], dtype: torch.dtype) -> None:
    step = randomize(kind(16, LEVELS, depth=1))
    maps = some_maps((11, 18), (6, 9), (3, 5))
    expected = step(maps)
    with torch.autocast("cpu", dtype):
        found = step(maps)
    cast = step.to(dtype)([x.to(dtype) for x in maps])
    for x, y, z in zip(expected, found, cast):
        assert z.dtype == dtype
        assert torch.allclose(y.float(), x, atol=0.05) and torch.allclose(z.float(), x, atol=0.05)


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        (DyHead, {"levels": (2, 3, 5)}, "levels: dyhead joins .* 5 follows 3"),
        (SEPC, {"levels": (3, 5)}, "levels: sepc joins .* 5 follows 3"),
        (DyHead, {"depth": 0}, "depth: 0 is not a whole number from 1 on"),
        (SEPC, {"depth": 1.5}, "depth: 1.5 is not"),
        (DyHead, {"channels": 24}, "groups: 16 groups do not divide 24 channels"),
        (DyHead, {"channels": 2, "groups": 2}, "quarter"),
    ],
)
def test_errors_name_the_argument(
    kind: type[nn.Module], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{"channels": 16, "levels": LEVELS, **arguments})
