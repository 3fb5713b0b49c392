"""Resamplers against values worked out by hand, by plain torch calls, or by loops over the paper's formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import CHANNELS, randomize
from torch import Tensor, nn

from fpn_plugin.pyramid.graph import Edge, Graph, Node, Operator, node, op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resample import DOWNSAMPLE, UPSAMPLE
from fpn_plugin.pyramid.resolve import Defaults, resolve

WIDTH = 16  # what the groups of dysample and fam divide
GUIDED = [name for name in UPSAMPLE.names() if getattr(UPSAMPLE.get(name), "guided", False)]
BOTH = [("up", name) for name in UPSAMPLE.names()] + [("down", name) for name in DOWNSAMPLE.names()]
X = torch.randn(2, WIDTH, 6, 10, generator=torch.Generator().manual_seed(1))


def call(module: nn.Module, x: Tensor, size: list[int] | None, scale: float = 1.0) -> Tensor:
    """Run a resampler, one that is guided with a guide of the target's size."""
    if not getattr(module, "guided", False):
        return module(x, size)
    height, width = size or [int(side * scale) for side in x.shape[2:]]
    guide = torch.randn(x.shape[0], x.shape[1], height, width, generator=torch.manual_seed(2))
    return module(x, size, guide.to(x.dtype))


def build(kind: str, name: str, steps: int = 1) -> nn.Module:
    registry = UPSAMPLE if kind == "up" else DOWNSAMPLE
    return randomize(registry.get(name)(WIDTH, steps))


@pytest.mark.parametrize("name", UPSAMPLE.names())
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("size", [None, "exact", "odd", "larger"])
def test_every_upsampler_meets_the_size(name: str, steps: int, size: str | None) -> None:
    scale = 2**steps
    change = {None: 0, "exact": 0, "odd": -1, "larger": 1}[size]
    wanted = [6 * scale + change, 10 * scale + change]
    result = call(build("up", name, steps), X, None if size is None else wanted, scale)
    assert list(result.shape) == [2, WIDTH, *wanted]
    assert result.isfinite().all()


@pytest.mark.parametrize(
    "name", [n for n in UPSAMPLE.names() if n not in ("nearest", "bilinear", "fam")]
)
def test_an_odd_target_is_a_crop(name: str) -> None:
    module = build("up", name, 2)
    assert torch.equal(module(X, [23, 37]), module(X, None)[:, :, :23, :37])


@pytest.mark.parametrize("name", DOWNSAMPLE.names())
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("shape", [(6, 10), (7, 9), (1, 1)])
def test_every_downsampler_rounds_up(name: str, steps: int, shape: tuple[int, int]) -> None:
    x = torch.randn(2, 4, *shape)
    wanted = [-(-side // 2**steps) for side in shape]
    module = DOWNSAMPLE.get(name)(4, steps)
    assert list(module(x, None).shape) == [2, 4, *wanted]
    assert module(x, None).isfinite().all()
    larger = [side + 1 for side in wanted]
    assert list(module(x, larger).shape) == [2, 4, *larger]


@pytest.mark.parametrize("kind, name", BOTH)
def test_gradients_and_inputs(kind: str, name: str) -> None:
    module = build(kind, name, 2)
    x = X.clone().requires_grad_()
    result = call(module, x, None, 4)
    (result * torch.randn_like(result)).sum().backward()
    assert torch.equal(x.detach(), X)
    assert x.grad is not None and x.grad.any()
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("kind, name", BOTH)
def test_half_precision(kind: str, name: str) -> None:
    # fresh weights: large random offsets would differ by more than the rounding of what they move
    torch.manual_seed(0)
    module = (UPSAMPLE if kind == "up" else DOWNSAMPLE).get(name)(WIDTH, 1)
    exact = call(module, X, None, 2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = call(module, X, None, 2)
        assert call(module, X.bfloat16(), None, 2).dtype == torch.bfloat16
    assert torch.allclose(mixed.float(), exact, atol=0.1)
    assert call(module.bfloat16(), X.bfloat16(), None, 2).dtype == torch.bfloat16


def test_upsamplers_by_hand() -> None:
    x = torch.tensor([[[[0.0, 4.0]]]])
    nearest, bilinear = UPSAMPLE.get("nearest")(1, 1), UPSAMPLE.get("bilinear")(1, 1)
    assert nearest(x, [2, 4]).tolist() == [[[[0, 0, 4, 4], [0, 0, 4, 4]]]]
    assert bilinear(x, [1, 4]).tolist() == [[[[0, 1, 3, 4]]]]
    assert torch.equal(nearest(X, None), F.interpolate(X, scale_factor=2.0, mode="nearest"))


def test_deconv_by_hand() -> None:
    module = UPSAMPLE.get("deconv")(1, 1)
    module.layers[0].weight.data = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    module.layers[0].bias.data = torch.tensor([0.5])
    x = torch.tensor([[[[1.0, 10.0]]]])
    assert module(x, None).tolist() == [[[[1.5, 2.5, 10.5, 20.5], [3.5, 4.5, 30.5, 40.5]]]]


def test_deconv_halves_the_channels_with_norm_and_activation_between() -> None:
    module = randomize(UPSAMPLE.get("deconv")(WIDTH, 2, norm="LN", activation="gelu", shrink=True))
    first, norm, _, last = module.layers
    x = F.conv_transpose2d(X, first.weight, first.bias, stride=2)
    x = F.layer_norm(x.permute(0, 2, 3, 1), [WIDTH // 2], norm.weight, norm.bias, 1e-6)
    x = F.conv_transpose2d(F.gelu(x.permute(0, 3, 1, 2)), last.weight, last.bias, stride=2)
    assert x.shape == (2, WIDTH // 4, 24, 40)
    assert torch.allclose(module(X, None), x, atol=1e-5)
    assert len(UPSAMPLE.get("deconv")(WIDTH, 1, norm="LN", activation="gelu").layers) == 1
    with pytest.raises(ValueError, match="shrink: 6 channels cannot be halved 2 times"):
        UPSAMPLE.get("deconv")(6, 2, shrink=True)


def test_pixel_shuffle_by_hand() -> None:
    module = UPSAMPLE.get("pixel_shuffle")(1, 1)
    conv = module.layers[0]
    conv.weight.data, conv.bias.data = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(
        4, 1, 1, 1
    ), torch.zeros(4)
    x = torch.tensor([[[[1.0, 10.0]]]])
    assert module(x, None).tolist() == [[[[1, 2, 10, 20], [3, 4, 30, 40]]]]


def carafe_kernels(module: nn.Module, x: Tensor) -> Tensor:
    """The reassembly kernels `(N, 25, 2H, 2W)` as the paper writes them: shuffled, then softmax."""
    step = module.layers[0]
    kernels = step.encode(F.conv2d(x, step.compress.weight, step.compress.bias))
    return F.softmax(F.pixel_shuffle(kernels, 2), dim=1)


def test_carafe_is_the_papers_sum() -> None:
    """Equation 4: every pixel l' sums kernel[n, m] * x[l + (n, m)] for n, m from -2 to 2, with l = l' // 2."""
    module = build("up", "carafe")
    x = X[:1, :, :4, :3].contiguous()
    module = UPSAMPLE.get("carafe")(WIDTH, 1)
    randomize(module)
    kernels = carafe_kernels(module, x)
    expected = torch.zeros(1, WIDTH, 8, 6)
    for row in range(8):
        for column in range(6):
            for n in range(-2, 3):
                for m in range(-2, 3):
                    i, j = row // 2 + n, column // 2 + m
                    if 0 <= i < 4 and 0 <= j < 3:
                        weight = kernels[0, (n + 2) * 5 + m + 2, row, column]
                        expected[0, :, row, column] += weight * x[0, :, i, j]
    assert torch.allclose(module(x, None), expected, atol=1e-5)


def test_carafe_with_uniform_kernels_averages_the_neighbourhood() -> None:
    module = build("up", "carafe")
    module.layers[0].encode.weight.data.zero_()
    module.layers[0].encode.bias.data.fill_(0.3)
    average = F.avg_pool2d(X, 5, stride=1, padding=2, count_include_pad=True)
    expected = F.interpolate(average, scale_factor=2.0, mode="nearest")
    assert torch.allclose(module(X, None), expected, atol=1e-5)


def bilinear_at(x: Tensor, row: float, column: float) -> Tensor:
    """A map `(C, H, W)` at a position in pixels, whose centres are at whole numbers; border repeated."""
    height, width = x.shape[1:]
    row, column = min(max(row, 0.0), height - 1.0), min(max(column, 0.0), width - 1.0)
    top, left = int(row), int(column)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = row - top, column - left
    upper = (1 - u) * x[:, top, left] + u * x[:, top, right]
    return (1 - v) * upper + v * ((1 - u) * x[:, bottom, left] + u * x[:, bottom, right])


@pytest.mark.parametrize("dynamic", [False, True])
def test_dysample_is_the_papers_sampling(dynamic: bool) -> None:
    """S = G + O with O = 0.25 linear(X), pixel-shuffled: channels are (x or y, group, place in the 2×2).

    With a dynamic scope O = 0.5 σ(linear₁(X)) linear₂(X).
    """
    module = randomize(UPSAMPLE.get("dysample")(WIDTH, 1, dynamic_scope=dynamic))
    x = X[:1, :, :4, :3].contiguous()
    layer = module.layers[0]
    scope = 0.5 * F.conv2d(x, layer.scope.weight).sigmoid() if dynamic else 0.25
    offset = F.conv2d(x, layer.offset.weight, layer.offset.bias)
    offset = (scope * offset)[0].view(2, 4, 2, 2, 4, 3)
    expected = torch.zeros(1, WIDTH, 8, 6)
    for group in range(4):
        part = x[0, group * 4 : group * 4 + 4]
        for row in range(8):
            for column in range(6):
                i, j, a, b = row // 2, column // 2, row % 2, column % 2
                u, v = offset[:, group, a, b, i, j].tolist()  # in pixels of the source
                # where bilinear interpolation looks: a quarter of a pixel off the centre of (i, j)
                at = bilinear_at(part, i + (-0.25, 0.25)[a] + v, j + (-0.25, 0.25)[b] + u)
                expected[0, group * 4 : group * 4 + 4, row, column] = at
    assert torch.allclose(module(x, None), expected, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2])
def test_dysample_without_offsets_is_bilinear_up_to_the_border(steps: int) -> None:
    module = build("up", "dysample", steps)
    expected = X
    for layer in module.layers:
        nn.init.zeros_(layer.offset.weight)
        nn.init.zeros_(layer.offset.bias)
        expected = F.interpolate(expected, scale_factor=2.0, mode="bilinear", align_corners=False)
    assert torch.allclose(module(X, None), expected, atol=1e-5)


def test_dysample_starts_near_bilinear() -> None:
    module = UPSAMPLE.get("dysample")(64, 1)
    conv = module.layers[0].offset
    assert conv.weight.shape == (32, 64, 1, 1) and not conv.bias.any()
    assert 0.0008 < conv.weight.std() < 0.0012


def test_a_dynamic_scope_starts_as_the_static_one() -> None:
    static, dynamic = (UPSAMPLE.get("dysample")(WIDTH, 1, dynamic_scope=on) for on in (False, True))
    assert dynamic.load_state_dict(static.state_dict(), strict=False).missing_keys == [
        "layers.0.scope.weight"
    ]
    dynamic.layers[0].offset.weight.data *= 100  # or its own start would be near bilinear anyway
    static.load_state_dict(dynamic.state_dict(), strict=False)
    assert torch.equal(dynamic(X, None), static(X, None))
    assert sum(x.numel() for x in UPSAMPLE.get("dysample")(256, 1).parameters()) == 8224
    scope = UPSAMPLE.get("dysample")(256, 1, dynamic_scope=True).layers[0].scope
    assert sum(x.numel() for x in scope.parameters()) == 8192


def test_fam_without_offsets_is_half_a_convolution() -> None:
    """Its offset convolution starts at zero: no tap moves and every mask is 1/2."""
    module = UPSAMPLE.get("fam")(WIDTH, 1)
    guide = torch.randn(2, WIDTH, 11, 20)
    up = F.interpolate(X, size=[11, 20], mode="bilinear", align_corners=False)
    expected = F.relu(0.5 * F.conv2d(up, module.align.weight, padding=1))
    assert torch.allclose(module(X, None, guide), expected, atol=1e-5)
    nn.init.dirac_(module.align.weight)
    module.align.weight.data.mul_(2.0)
    assert torch.allclose(module(X, None, guide), F.relu(up), atol=1e-5)


def test_fam_moves_by_what_the_lateral_and_the_map_say() -> None:
    """With one constant offset per group the result is the shifted map, whatever the kernel's other taps are."""
    module = UPSAMPLE.get("fam")(WIDTH, 1, groups=8)
    nn.init.dirac_(module.align.weight)
    taps = module.align.offset.bias.data[:144].view(8, 9, 2)
    taps[:4, :, 0] = 1.0  # the first half of the channels looks one row further down
    taps[4:, :, 1] = -2.0  # the second half looks two columns to the left
    module.align.offset.bias.data[144:] = 100.0  # masks of 1
    up = F.interpolate(X, size=[12, 20], mode="bilinear", align_corners=False)
    result = module(X, None, torch.randn(2, WIDTH, 12, 20))
    assert torch.allclose(result[:, :8, :-1], F.relu(up[:, :8, 1:]), atol=1e-5)
    assert torch.allclose(result[:, 8:, :, 2:], F.relu(up[:, 8:, :, :-2]), atol=1e-5)
    # and the offsets come from 1×1(concat(lateral, 2·up))
    guide, seen = torch.randn(2, WIDTH, 12, 20), []
    module.align.offset.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(X, None, guide)
    expected = F.conv2d(torch.cat([guide, 2 * up], 1), module.difference.weight)
    assert torch.allclose(seen[0], expected, atol=1e-5)


@pytest.mark.parametrize("name, groups", [("dysample", 4), ("fam", 8)])
def test_groups_must_divide_the_channels(name: str, groups: int) -> None:
    with pytest.raises(ValueError, match=f"groups: {groups} groups do not divide 6 channels"):
        UPSAMPLE.get(name)(6, 1)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="dynamic_scope 'no' is not True or False"):
        UPSAMPLE.get("dysample")(8, 1, dynamic_scope="no")
    with pytest.raises(ValueError, match="compressed_channels 0 is not a positive whole number"):
        DOWNSAMPLE.get("carafe_down")(8, 1, compressed_channels=0)


def test_downsamplers_by_hand() -> None:
    x = torch.tensor([[[[1.0, 5.0, 2.0, 0.0, 9.0], [3.0, 4.0, 8.0, 7.0, 6.0]]]])
    assert DOWNSAMPLE.get("maxpool")(1, 1)(x, None).tolist() == [[[[5, 8, 9]]]]
    assert DOWNSAMPLE.get("maxpool_stride")(1, 1)(x, None).tolist() == [[[[5, 8, 9]]]]
    assert DOWNSAMPLE.get("maxpool_stride")(1, 2)(x, None).tolist() == [[[[8, 9]]]]
    assert DOWNSAMPLE.get("subsample")(1, 1)(x, None).tolist() == [[[[1, 2, 9]]]]
    assert DOWNSAMPLE.get("subsample")(1, 2)(x, None).tolist() == [[[[1, 9]]]]
    assert DOWNSAMPLE.get("avgpool")(1, 1)(x, None).tolist() == [[[[3.25, 4.25, 7.5]]]]
    assert DOWNSAMPLE.get("avgpool")(1, 2)(x, None).tolist() == [[[[3.75, 7.5]]]]


@pytest.mark.parametrize("sides", [(1, 2), (3, 4), (5, 8), (6, 7), (11, 1)])
@pytest.mark.parametrize("steps", [1, 2])
def test_maxpool_same_is_tensorflows_padding(sides: tuple[int, int], steps: int) -> None:
    x = torch.randn(1, 3, *sides) - 5  # below zero: padding with zeros would show
    expected = x
    for _ in range(steps):
        pads = []
        for side in reversed(expected.shape[2:]):
            total = max((-(-side // 2) - 1) * 2 + 3 - side, 0)
            pads += [total // 2, total - total // 2]
        expected = F.max_pool2d(F.pad(expected, pads, value=-1e9), 3, stride=2)
    assert torch.equal(DOWNSAMPLE.get("maxpool_same")(3, steps)(x, None), expected)


def test_conv_down_is_one_strided_convolution_per_level() -> None:
    module = DOWNSAMPLE.get("conv")(WIDTH, 2, activation="relu")
    expected = X
    for conv in module.convs:
        expected = F.relu(F.conv2d(expected, conv.weight, conv.bias, stride=2, padding=1))
    assert torch.equal(module(X, None), expected)


def test_adown_pools_both_halves() -> None:
    module = randomize(DOWNSAMPLE.get("adown")(WIDTH, 1))
    layer, half = module.layers[0], WIDTH // 2
    for x in (X, X[:, :, :5, :7]):
        pooled = F.avg_pool2d(x, 2, stride=1)
        one = F.conv2d(pooled[:, :half], layer.conv.weight, layer.conv.bias, stride=2, padding=1)
        other = F.max_pool2d(pooled[:, half:], 3, 2, padding=1)
        other = F.conv2d(other, layer.pooled.weight, layer.pooled.bias)
        expected = F.silu(torch.cat([one, other], 1))  # upstream: odd sides are rounded down
        result = module(x, None)[:, :, : x.shape[2] // 2, : x.shape[3] // 2]
        assert torch.allclose(result, expected, atol=1e-6)
    repeated = torch.cat([X[:, :, :5], X[:, :, 4:5]], 2)
    assert torch.equal(module(X[:, :, :5], None), module(repeated, None))
    with pytest.raises(ValueError, match="adown halves its channels: 7 is odd"):
        DOWNSAMPLE.get("adown")(7, 1)


@pytest.mark.parametrize("name", ["spd", "haar"])
def test_two_by_two_pixels_become_channels(name: str) -> None:
    """Held: SPD-Conv's order of places, and Haar's bands as pytorch-wavelets gives them."""
    module = DOWNSAMPLE.get(name)(2, 1)
    seen: list[Tensor] = []
    module.layers[0].conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    module(torch.stack([x, 10 * x])[None], None)
    one = [1.0, 3.0, 2.0, 5.0] if name == "spd" else [5.5, -2.5, -1.5, 0.5]
    assert seen[0].flatten().tolist() == [value for each in one for value in (each, 10 * each)]
    odd = torch.randn(1, 2, 5, 1)
    assert torch.equal(module(odd, None), module(F.pad(odd, [0, 1, 0, 1]), None))


def test_carafe_down_is_the_papers_sum() -> None:
    """Every pixel l' sums kernel[n, m] * x[2 l' + (n, m)] for n, m from -2 to 2."""
    module = randomize(DOWNSAMPLE.get("carafe_down")(WIDTH, 1))
    x, layer = X[:1, :, :5, :4].contiguous(), module.layers[0]
    compressed = F.conv2d(x, layer.compress.weight, layer.compress.bias)
    kernels = F.conv2d(compressed, layer.encode.weight, layer.encode.bias, stride=2, padding=1)
    kernels = kernels.softmax(1).reshape(1, 1, 25, 6)
    patches = F.unfold(x, 5, padding=2, stride=2).reshape(1, WIDTH, 25, 6)
    expected = (patches * kernels).sum(2).reshape(1, WIDTH, 3, 2)
    assert torch.allclose(module(x, None), expected, atol=1e-6)


@pytest.mark.parametrize(
    "name, norm, count",
    [("adown", "BN", 164352), ("spd", "BN", 2359808), ("haar", "BN", 262912)]
    + [("carafe_down", "", 30873)],
)
def test_parameters_of_a_downsampler(name: str, norm: str, count: int) -> None:
    module = DOWNSAMPLE.get(name)(256, 1, **({"norm": norm} if norm else {}))
    assert sum(x.numel() for x in module.parameters()) == count


# In a graph


def two_levels(up: str = "nearest", down: str = "maxpool") -> Pyramid:
    """Level 4 and level 5 each take both maps."""
    nodes = tuple(node(f"out{level}", level, ["res5", "res4"], block="conv3x3") for level in (4, 5))
    graph = Graph({"res4": 4, "res5": 5}, nodes, ("out4", "out5"))
    defaults = Defaults(WIDTH, upsample=Operator(up), downsample=Operator(down))
    return randomize(Pyramid(graph, CHANNELS, defaults)).eval()


def graph_maps(height: int, width: int) -> dict[str, Tensor]:
    coarse = (-(-height // 2), -(-width // 2))
    return {"res4": torch.randn(1, 24, height, width), "res5": torch.randn(1, 32, *coarse)}


def test_fam_is_shown_the_lateral_after_its_projection() -> None:
    pyramid = two_levels("fam")
    maps = graph_maps(7, 12)
    part = {
        name: pyramid.get_submodule(f"out4_{name}") for name in ("edge0.project", "edge1.project")
    }
    lateral = part["edge1.project"](maps["res4"])
    up = pyramid.get_submodule("out4_edge0.resample")(
        part["edge0.project"](maps["res5"]), None, lateral
    )
    assert torch.allclose(
        pyramid(maps)["p4"], pyramid.get_submodule("out4")(up + lateral), atol=1e-5
    )


@pytest.mark.parametrize(
    "inputs, message",
    [
        (
            ["res5"],
            "node 'a', input 'res5', resample: fam is guided .* level, 4, but the node has none",
        ),
        (
            [Edge("res5", block=op("conv1x1")), "res4"],
            "node 'a', input 'res5', resample: fam .* 'res4' has 16 channels and the resampled map 32",
        ),
    ],
)
def test_fam_needs_a_guide(inputs: list, message: str) -> None:
    sources = {"res5": 5} if inputs == ["res5"] else {"res4": 4, "res5": 5}
    graph = Graph(sources, (node("a", 4, inputs, block="conv3x3"),), ("a",))
    with pytest.raises(ValueError, match=message):
        Pyramid(graph, CHANNELS, Defaults(WIDTH, upsample=op("fam")))


@pytest.mark.parametrize(
    "edge, block, expected",
    [
        # a block after it changes the channels that are left; one input with a block needs nothing
        (Edge("res5"), "conv3x3", {"a_edge0.resample": (32, 8), "a": (8, 16)}),
        (Edge("res5"), "identity", {"a_edge0.resample": (32, 8), "a_edge0.block": (8, 16)}),
        (
            Edge("res5", block=op("conv3x3")),
            "identity",
            {"a_edge0.resample": (32, 8), "a_edge0.block": (8, 16)},
        ),
        (
            Edge("res5", project=op("conv1x1")),
            "conv3x3",
            {"a_edge0.project": (32, 16), "a_edge0.resample": (16, 4), "a": (4, 16)},
        ),
    ],
)
def test_a_shrinking_upsampler_is_counted(edge: Edge, block: str, expected: dict) -> None:
    graph = Graph({"res5": 5}, (node("a", 3, [edge], block=block),), ("a",))
    defaults = Defaults(16, upsample=op("deconv", shrink=True))
    (step,) = resolve(graph, CHANNELS, defaults)
    assert {p.path: (p.in_channels, p.out_channels) for p in step.parts()} == expected
    pyramid = Pyramid(graph, CHANNELS, defaults)
    assert pyramid({"res5": torch.randn(1, 32, 3, 5)})["p3"].shape == (1, 16, 12, 20)


def test_a_shrinking_upsampler_before_a_fusion() -> None:
    fused: Node = node("a", 4, ["res4", "res5"])
    graph = Graph({"res4": 4, "res5": 5}, (fused,), ("a",))
    pyramid = Pyramid(graph, CHANNELS, Defaults(WIDTH, upsample=op("deconv", shrink=True)))
    assert pyramid(graph_maps(7, 12))["p4"].shape == (1, WIDTH, 7, 12)
    # where what is left is the pyramid's width already, nothing follows
    pyramid = Pyramid(
        graph, {"res4": 24, "res5": 2 * WIDTH}, Defaults(WIDTH, upsample=op("deconv", shrink=True))
    )
    assert "a_edge1.block" not in dict(pyramid.named_modules())
