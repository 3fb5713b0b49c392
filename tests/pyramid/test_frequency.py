"""The fusion `freq` against its equations written with unfolded maps, and held values; reassembly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import CHANNELS, randomize, small_maps, small_pyramid
from torch import Tensor, nn

from fpn_plugin.pyramid import reassemble as reassembly
from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.graph import Edge, Graph, node, op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.reassemble import reassemble
from fpn_plugin.pyramid.resample import UPSAMPLE
from fpn_plugin.pyramid.resolve import Defaults

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# of two of the 2-D Hamming windows, scaled to the sum 1
WINDOW_3 = [0.00475624, 0.0594530, 0.743163]  # corner, edge, centre
WINDOW_5 = [0.00127551, 0.0159439, 0.0581154, 0.107621, 0.199298]


def freq(channels: int = 8, **arguments: object) -> nn.Module:
    return FUSIONS.get("freq")(channels, 2, compressed_channels=8, **arguments)


def random_maps(height: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = [(height, width), (-(-height // 2), -(-width // 2))]
    return [torch.randn(2, 8, *size, dtype=dtype, requires_grad=True) for size in sizes]


def unfolded(x: Tensor, kernels: Tensor, side: int, factor: int, border: str) -> Tensor:
    """The sum over a map that is unfolded, then repeated."""
    n, c, h, w = x.shape
    mode = {"zero": "constant", "reflect": "reflect"}[border]
    patches = F.unfold(F.pad(x, [side // 2] * 4, mode=mode), side).reshape(n, -1, h, w)
    patches = F.interpolate(patches, scale_factor=float(factor))
    patches = patches.reshape(n, c, side * side, h * factor, w * factor)
    return (patches * kernels.unsqueeze(1)).sum(2)


def normed(logits: Tensor, side: int) -> Tensor:
    window = torch.hamming_window(side, periodic=False, dtype=logits.dtype)
    weights = logits.softmax(1) * torch.outer(window, window).reshape(1, -1, 1, 1)
    return weights / weights.sum(1, keepdim=True)


def conv(module: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, module.weight, module.bias, padding=module.weight.shape[2] // 2)


def published(module: nn.Module, fine: Tensor, coarse: Tensor, border: str) -> Tensor:
    """The paper's fusion, step by step, of maps of even size."""
    f, r = conv(module.compress_fine, fine), conv(module.compress_coarse, coarse)
    high = conv(module.high, f)
    f = 2 * f - unfolded(f, normed(high, 3), 3, 1, border)
    low = conv(module.low, f)
    low = low + unfolded(conv(module.low, r), normed(low, 5), 5, 2, border)
    kernels = normed(low, 5)
    high = high + unfolded(conv(module.high, r), kernels, 5, 2, border)
    up = unfolded(coarse, kernels, 5, 2, border)
    sharp = 2 * fine - unfolded(fine, normed(high, 3), 3, 1, border)
    return sharp + (up if module.sampler is None else sampled(module.sampler, up, f, r))


def sampled(module: nn.Module, up: Tensor, f: Tensor, r: Tensor) -> Tensor:
    seen = []
    for x, norm in ((f, module.norm_fine), (r, module.norm_coarse)):
        x = F.group_norm(x, x.shape[1] // 8, norm.weight, norm.bias)
        n, c, h, w = x.shape
        patches = F.unfold(x, 3, padding=2, dilation=2).reshape(n, c, 9, h, w)
        similar = F.cosine_similarity(x.unsqueeze(2), patches, dim=1)
        seen.append(torch.cat([x, similar[:, [0, 1, 2, 3, 5, 6, 7, 8]]], 1))
    f, r = seen
    offset = conv(module.offset_coarse, r) + F.pixel_unshuffle(conv(module.offset_fine, f), 2)
    scope = conv(module.scope_coarse, r) + F.pixel_unshuffle(conv(module.scope_fine, f), 2)
    moved = F.pixel_shuffle(offset * scope.sigmoid(), 2)
    n, c, height, width = up.shape
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    results = []
    for group, part in enumerate(up.chunk(module.groups, dim=1)):
        # an offset is in pixels of the coarse map, which are two of this one's
        x = xs + 0.5 + 2 * moved[:, group]
        y = ys + 0.5 + 2 * moved[:, module.groups + group]
        grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1)
        results.append(F.grid_sample(part, grid, padding_mode="border", align_corners=False))
    return torch.cat(results, 1)


@pytest.mark.parametrize("border", ["zero", "reflect"])
@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_papers_equations(
    border: str, resample: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    module = randomize(freq(border=border, resample=resample)).to(dtype)
    for size in ((8, 14), (6, 6)):
        maps = random_maps(*size, dtype)
        results = []
        for run in (lambda: module(maps), lambda: published(module, *maps, border)):
            result = run()
            result.mul(
                torch.linspace(-1, 1, result.numel()).to(dtype).view_as(result)
            ).sum().backward()
            leaves = [*maps, *module.parameters()]
            results.append([result.detach(), *(leaf.grad.clone() for leaf in leaves)])
            for leaf in leaves:
                leaf.grad = None
        for one, two in zip(*results):
            assert (one - two).abs().max() <= tolerance * max(1, two.abs().max())


def test_kernels_begin_as_hamming_windows() -> None:
    """Held: what a single 1 becomes where all convolutions are zero."""
    module = freq(resample=False)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    one = torch.zeros(1, 8, 6, 6)
    one[:, :, 1, 1] = 1
    result = module([torch.zeros(1, 8, 12, 12), one])[0, 0]
    corner, edge, diagonal, beside, centre = WINDOW_5
    expected = [[centre, beside, edge], [beside, diagonal, 0], [edge, 0, corner]]
    for row in range(3):
        for column in range(3):
            if expected[row][column]:
                pixels = result[2 + 2 * row : 4 + 2 * row, 2 + 2 * column : 4 + 2 * column]
                assert torch.allclose(pixels, torch.tensor(expected[row][column]), rtol=1e-5)
    sharp = module([one, torch.zeros(1, 8, 3, 3)])[0, 0]
    corner, edge, centre = WINDOW_3
    assert torch.allclose(sharp[1, :3], torch.tensor([-edge, 2 - centre, -edge]), rtol=1e-5)
    assert torch.allclose(sharp[0, :3], torch.tensor([-corner, -edge, -corner]), rtol=1e-5)


def test_without_offsets_the_map_is_sampled_at_its_own_pixels() -> None:
    module, plain = freq(), freq(resample=False)
    for name in ("offset_fine", "offset_coarse"):
        nn.init.zeros_(module.sampler.get_submodule(name).weight)
    plain.load_state_dict(module.state_dict(), strict=False)
    maps = random_maps(6, 10, torch.float32)
    assert torch.allclose(module(maps), plain(maps), atol=1e-5)
    assert not module.sampler.scope_fine.weight.any()
    assert 0.0008 < freq().low.weight.std() < 0.0012


def test_parameters() -> None:
    counts = [
        sum(x.numel() for x in FUSIONS.get("freq")(256, 2, resample=resample).parameters())
        for resample in (False, True)
    ]
    assert counts == [52514, 104690]


@pytest.mark.parametrize("border", ["zero", "reflect"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (9, 5)])
def test_odd_sides_are_completed(border: str, size: tuple[int, int]) -> None:
    module = randomize(freq(border=border)).double()
    fine, coarse = random_maps(*size)
    even = F.pad(fine, [0, size[1] % 2, 0, size[0] % 2], mode="replicate")
    result = module([fine, coarse])
    assert torch.equal(result, module([even, coarse])[:, :, : size[0], : size[1]])
    if min(size) > 1:  # as of a network that rounds down: the last row and column are there once
        less = coarse[:, :, : size[0] // 2, : size[1] // 2]
        known = module([fine, less])
        assert known.shape == fine.shape and known.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "side, factor, block", [(5, 2, 1), (5, 2, 2**19), (3, 1, 50), (5, 1, 2**19)]
)
def test_reassembly_equals_the_plain_operations(
    side: int, factor: int, block: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever rows are taken at a time; and its gradient is that of the function."""
    monkeypatch.setattr(reassembly, "_BLOCK", block)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout])
    kernels = torch.randn(2, side * side, 4 * factor, 5 * factor, dtype=torch.float64)
    x, kernels = x.requires_grad_(), kernels.requires_grad_()
    expected = unfolded(x, kernels, side, factor, "zero")
    result = reassemble(x, kernels, side, factor)
    assert torch.allclose(result, expected, atol=1e-12)
    assert result.is_contiguous(memory_format=LAYOUTS[layout])
    plain = reassembly._reassemble(F.pad(x, [side // 2] * 4), kernels, side, factor)
    assert torch.allclose(plain, expected, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x, k: reassemble(x, k, side, factor), (x, kernels), fast_mode=True
    )
    half = reassemble(x.bfloat16(), kernels.float(), side, factor)
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 2**-7 * expected.abs().max()


@pytest.mark.parametrize("operator", ["freq", "carafe"])
def test_nothing_is_unfolded(operator: str) -> None:
    """What autograd keeps is a few times the map, not 25 times."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    fine = torch.randn(1, 256, 24, 24, requires_grad=True)
    coarse = torch.randn(1, 256, 12, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        if operator == "freq":
            FUSIONS.get("freq")(256, 2)([fine, coarse])
        else:
            UPSAMPLE.get("carafe")(256, 1)(coarse, None)
    assert sum(kept.values()) < {"freq": 8, "carafe": 1.5}[operator] * fine.nbytes


def test_half_precision_and_gradients_in_a_pyramid() -> None:
    pyramid = small_pyramid("fpn", fuse=op("freq"), norm="GN")
    maps = {name: x.requires_grad_() for name, x in small_maps(97, 131).items()}
    exact = pyramid(maps)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = pyramid(maps)
    for name, x in outputs.items():
        assert (x - exact[name]).abs().max() < 0.1 * exact[name].abs().max()
    sum(x.float().square().mean() for x in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pyramid.parameters())


def test_the_order_of_the_inputs_does_not_matter() -> None:
    results = []
    maps = {name: x for name, x in small_maps().items() if name in ("res4", "res5")}
    for order in (["res4", "res5"], ["res5", "res4"]):
        torch.manual_seed(0)
        graph = Graph({"res4": 4, "res5": 5}, (node("x", 4, order, "freq"),), ("x",))
        pyramid = Pyramid(graph, CHANNELS, Defaults(16))
        for i, name in enumerate(order):
            project = pyramid.get_submodule(f"x_edge{i}.project")
            nn.init.constant_(project.weight, 0.01 * int(name[-1]))
        results.append(pyramid)
    results[1].get_submodule("x_fuse").load_state_dict(
        results[0].get_submodule("x_fuse").state_dict()
    )
    assert torch.equal(*(pyramid(maps)["p4"] for pyramid in results))


@pytest.mark.parametrize(
    "level, inputs, fuse, message",
    [
        (
            3,
            ["res3", "res5"],
            "freq",
            "two neighbouring levels, but its inputs are of levels 3 and 5",
        ),
        (
            3,
            ["res3", "res3"],
            "freq",
            "two neighbouring levels, but its inputs are of levels 3 and 3",
        ),
        (4, ["res3", "res4"], "freq", "upsamples a map to level 4 .*'res3' comes by maxpool and"),
        (3, ["res4", "res5"], "freq", "'res4' comes by nearest and 'res5' comes by nearest"),
        (3, ["res3", Edge("res4", resample=op("carafe"))], "freq", "'res4' comes by carafe"),
        (3, ["res3", Edge("res4", block=op("conv3x3"))], "freq", "by nearest and conv3x3"),
        (3, ["res3", "res4", "res5"], "freq", "freq fuses 2 maps, but the node has 3 inputs"),
        (
            3,
            ["res3", "res4"],
            op("freq", border="wrap"),
            "border 'wrap' .*; choose from zero, reflect",
        ),
        (3, ["res3", "res4"], op("freq", resample=1), "resample 1 is neither True nor False"),
        (3, ["res3", "res4"], op("freq", groups=3), "groups: 3 groups do not divide 16 channels"),
        (3, ["res3", "res4"], op("freq", groups=0), "groups 0 is not a positive whole number"),
        (3, ["res3", "res4"], op("freq", compressed_channels=0), "compressed_channels 0 is not a"),
    ],
)
def test_mistakes(level: int, inputs: list, fuse: object, message: str) -> None:
    used = {edge if isinstance(edge, str) else edge.source for edge in inputs}
    levels = {name: int(name[-1]) for name in ("res3", "res4", "res5") if name in used}
    graph = Graph(levels, (node("x", level, inputs, fuse=fuse),), ("x",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"node 'x', fuse: .*{message}"):
        Pyramid(graph, CHANNELS, Defaults(16))
