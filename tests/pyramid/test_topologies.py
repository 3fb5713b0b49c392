"""Every topology against its paper's equations, written out in the test with torch's functions alone.

No engine code computes a reference: the pyramid under test gives its weights by name, and each test
must have used all of them.
"""

from __future__ import annotations

from typing import Any, Mapping

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize
from torch import Tensor, nn

from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.graph import op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.topologies import TOPOLOGIES, Style

R50 = {2: 256, 3: 512, 4: 1024, 5: 2048}
SMALL = {2: 8, 3: 16, 4: 24, 5: 32}
WIDTH = 32
Maps = dict[int, Tensor]


def pyramid(
    topology: str,
    channels: Mapping[int, int],
    width: int = WIDTH,
    style: Style = Style(),
    repeats: int = 1,
    extra: str = "none",
    inner: int = -1,
    **defaults: Any,
) -> Pyramid:
    """A catalogue pyramid whose inputs have these channels by level."""
    inputs = {f"res{level}": level for level in channels}
    graph = build_graph(topology, inputs, style, repeats, extra, inner)
    widths = {f"res{level}": count for level, count in channels.items()}
    return Pyramid(graph, widths, Defaults(width, **defaults))


def small(topology: str, levels: tuple[int, ...] = (2, 3, 4, 5), **options: Any) -> Pyramid:
    """A narrow pyramid in eval mode with random weights and random statistics of its norms.

    Convolutions keep the size of what passes them, so that values stay near 1, where float32 has
    seven digits.
    """
    module = randomize(pyramid(topology, {level: SMALL[level] for level in levels}, **options))
    for x in module.parameters():
        if x.dim() == 4:
            nn.init.normal_(x, std=x[0].numel() ** -0.5)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.5)
            layer.running_var.uniform_(0.5, 2)
    return module.eval()


def maps_of(channels: Mapping[int, int], height: int = 128, width: int = 256) -> Maps:
    return {
        level: torch.randn(2, count, height >> level, width >> level)
        for level, count in channels.items()
    }


class Layers:
    """A pyramid's weights, applied by torch's functions and ticked off as they are used."""

    def __init__(self, module: nn.Module) -> None:
        self.state = {
            name: x for name, x in module.state_dict().items() if "num_batches" not in name
        }
        self.used: set[str] = set()

    def get(self, name: str) -> Tensor | None:
        self.used.add(name)
        return self.state.get(name)

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """Convolution, and batch norm if there is one."""
        weight = self.state[f"{name}.weight"]
        self.used.add(f"{name}.weight")
        x = F.conv2d(x, weight, self.get(f"{name}.bias"), stride, weight.shape[-1] // 2)
        parts = [
            self.get(f"{name}.norm.{part}")
            for part in ("running_mean", "running_var", "weight", "bias")
        ]
        return x if parts[0] is None else F.batch_norm(x, *parts)

    def unused(self) -> set[str]:
        return set(self.state) - self.used


def nearest(x: Tensor, steps: int = 1) -> Tensor:
    """Each value repeated."""
    return x.repeat_interleave(2**steps, 2).repeat_interleave(2**steps, 3)


def bilinear(x: Tensor, steps: int = 1) -> Tensor:
    return F.interpolate(x, scale_factor=2.0**steps, mode="bilinear", align_corners=False)


def check(module: Pyramid, inputs: Maps, expected: Maps, layers: Layers) -> None:
    assert layers.unused() == set()
    outputs = module({f"res{level}": x for level, x in inputs.items()})
    assert list(outputs) == [f"p{level}" for level in sorted(expected)]
    worst = 0.0
    for level, x in expected.items():
        assert outputs[f"p{level}"].shape == x.shape
        worst = max(worst, (outputs[f"p{level}"] - x).abs().max().item())
        assert torch.allclose(outputs[f"p{level}"], x, rtol=1e-5, atol=1e-5), (level, worst)
        assert x.std() > 0.01  # not a comparison of zeros
    print(f"largest absolute difference {worst:.2e}")


def plain_fpn(layers: Layers, inputs: Maps, prefix: str = "fpn") -> Maps:
    """`M_l = lateral_l + up(M_{l+1})`, `P_l = 3x3(M_l)` (arXiv:1612.03144)."""
    outputs: Maps = {}
    merged: Tensor | None = None
    for level in sorted(inputs, reverse=True):
        lateral = layers.conv(f"{prefix}_lateral{level}", inputs[level])
        merged = lateral if merged is None else lateral + nearest(merged)
        outputs[level] = layers.conv(f"{prefix}_output{level}", merged)
    return outputs


@torch.no_grad()
def test_pafpn() -> None:
    """`N_min = P_min`, `N_{l+1} = ReLU(3x3(P_{l+1} + ReLU(3x3 s2(N_l))))`."""
    module, inputs = small("pafpn"), maps_of(SMALL)
    layers = Layers(module)
    maps = plain_fpn(layers, inputs)
    for level in (3, 4, 5):
        down = layers.conv(f"pafpn_output{level}_edge1.resample.convs.0", maps[level - 1], 2)
        maps[level] = layers.conv(f"pafpn_output{level}", maps[level] + down.relu()).relu()
    check(module, inputs, maps, layers)


@torch.no_grad()
def test_pafpn_mmdet() -> None:
    """`I_min = P_min`, `I_{l+1} = P_{l+1} + 3x3 s2(I_l)`; `N_min = I_min`, `N_l = 3x3(I_l)`."""
    module, inputs = small("pafpn_mmdet"), maps_of(SMALL)
    layers = Layers(module)
    inner = plain_fpn(layers, inputs)
    outputs = {2: inner[2]}
    for level in (3, 4, 5):
        down = layers.conv(f"pafpn_merge{level}_edge1.resample.convs.0", inner[level - 1], 2)
        inner[level] = inner[level] + down
        outputs[level] = layers.conv(f"pafpn_output{level}", inner[level])
    check(module, inputs, outputs, layers)


def attend(coarse: Tensor, fine: Tensor) -> Tensor:
    """NAS-FPN's global attention."""
    return coarse + fine * F.adaptive_max_pool2d(coarse, 1).sigmoid()


@torch.no_grad()
@pytest.mark.parametrize("norm", ["", "BN"])
def test_nas_fpn(norm: str) -> None:
    """The seven merging cells of the paper's figure, on levels 3 to 7."""
    module, inputs = small("nas_fpn", (3, 4, 5), norm=norm), maps_of({3: 16, 4: 24, 5: 32})
    layers = Layers(module)

    def cell(index: int, x: Tensor) -> Tensor:
        return layers.conv(f"nas_fpn_cell{index}", x.relu())

    p3, p4, p5 = (layers.conv(f"nas_fpn_lateral{level}", inputs[level]) for level in (3, 4, 5))
    p6 = F.max_pool2d(p5, 2)
    p7 = F.max_pool2d(p6, 2)
    middle = cell(0, attend(coarse=nearest(p6, 2), fine=p4))
    middle = cell(1, p4 + middle)
    out3 = cell(2, p3 + nearest(middle))
    out4 = cell(3, middle + F.max_pool2d(out3, 2))
    # nothing has read the maps p5 and p7 themselves, so they join the outputs of their levels
    out5 = cell(4, attend(coarse=F.max_pool2d(out4, 2), fine=F.max_pool2d(out3, 4)) + p5)
    out7 = cell(5, attend(coarse=F.max_pool2d(out5, 4), fine=F.max_pool2d(middle, 8)) + p7)
    out6 = cell(6, attend(coarse=nearest(out7), fine=F.max_pool2d(out5, 2)))
    check(module, inputs, {3: out3, 4: out4, 5: out5, 6: out6, 7: out7}, layers)


@torch.no_grad()
def test_fpg() -> None:
    """Nine pathways of at most five nodes (pathway p, level l), the early fine ones left out."""
    module = small("fpg", (3, 4, 5), norm="BN", downsample=op("subsample"))
    inputs = maps_of({3: 16, 4: 24, 5: 32})
    layers = Layers(module)
    first = {level: layers.conv(f"fpg_lateral{level}", inputs[level]) for level in (3, 4, 5)}
    for level in (6, 7):
        first[level] = first[level - 1][:, :, ::2, ::2]
    before, count = first, 0
    for pathway in range(9):
        now: Maps = {}
        for index, level in enumerate((3, 4, 5, 6, 7)):
            if pathway < 4 - index:
                now[level] = before[level]
                continue
            name = f"fpg_p{pathway}_{level}_edge"
            terms = [layers.conv(f"{name}0.block", before[level].relu())]
            if level > 3:
                finer = now[level - 1].relu()
                terms.append(layers.conv(f"{name}{len(terms)}.resample.convs.0", finer, 2))
            if level < 7:
                coarser = nearest(before[level + 1]).relu()
                terms.append(layers.conv(f"{name}{len(terms)}.block", coarser))
            terms.append(layers.conv(f"{name}{len(terms)}.block", first[level].relu()))
            now[level] = torch.stack(terms).sum(0)
            count += 1
        before = now
    assert count == 35
    outputs = {level: layers.conv(f"fpg_output{level}", x.relu()) for level, x in before.items()}
    check(module, inputs, outputs, layers)


def test_fpg_node_count() -> None:
    graph = build_graph("fpg", {"res3": 3, "res4": 4, "res5": 5})
    kinds = [item.name.split("_")[1].rstrip("0123456789") for item in graph.nodes]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "lateral": 3, "in": 2, "p": 35, "output": 5
    }  # fmt: skip


@torch.no_grad()
def test_hrfpn() -> None:
    """Bilinear to the finest, concat, 1x1, average pooling by 2^i, 3x3 each."""
    module, inputs = small("hrfpn"), maps_of(SMALL)
    layers = Layers(module)
    finest = [x if level == 2 else bilinear(x, level - 2) for level, x in inputs.items()]
    reduced = layers.conv("hrfpn_reduce_fuse.conv", torch.cat(finest, 1))
    outputs = {
        level: layers.conv(f"hrfpn_output{level}", F.avg_pool2d(reduced, 2 ** (level - 2)))
        for level in range(2, 7)
    }
    check(module, inputs, outputs, layers)


def balanced(layers: Layers, maps: Maps, prefix: str, identity: bool = False) -> Maps:
    """Gather at P4, average, refine, scatter, add (arXiv:1904.02701)."""
    size = list(maps[4].shape[2:])
    gathered = [
        F.adaptive_max_pool2d(x, size) if level < 4 else F.interpolate(x, size=size)
        for level, x in maps.items()
    ]
    middle = torch.stack(gathered).mean(0)
    if not identity:
        name = f"{prefix}_refine"
        theta, phi, g = (
            layers.conv(f"{name}.{part}", middle).flatten(2) for part in ("theta", "phi", "g")
        )
        affinity = torch.einsum("nci,ncj->nij", theta, phi).softmax(-1)
        seen = torch.einsum("nij,ncj->nci", affinity, g).reshape(middle.shape)
        middle = middle + layers.conv(f"{name}.out", seen)
    return {
        level: x
        + (
            F.interpolate(middle, size=list(x.shape[2:]))
            if level < 4
            else F.adaptive_max_pool2d(middle, list(x.shape[2:]))
        )
        for level, x in maps.items()
    }


@torch.no_grad()
@pytest.mark.parametrize("identity", [True, False])
def test_bfp(identity: bool) -> None:
    """On an FPN, and with the refining block as the identity: its last convolution zero."""
    module, inputs = small("fpn+bfp"), maps_of(SMALL)
    layers = Layers(module)
    if identity:
        for name, x in layers.state.items():
            if name.startswith("s2_bfp_refine"):
                layers.used.add(name)
            if name.startswith("s2_bfp_refine.out"):
                x.zero_()
    maps = balanced(layers, plain_fpn(layers, inputs), "s2_bfp", identity)
    check(module, inputs, maps, layers)


@torch.no_grad()
def test_bfp_with_p6_as_its_authors_have_it() -> None:
    module, inputs = small("fpn+bfp", inner=1, downsample=op("subsample")), maps_of(SMALL)
    layers = Layers(module)
    maps = plain_fpn(layers, inputs)
    maps[6] = maps[5][:, :, ::2, ::2]
    check(module, inputs, balanced(layers, maps, "s2_bfp"), layers)


@torch.no_grad()
def test_asff() -> None:
    """Per place, `sum alpha_i x_i`, alpha a softmax of 1x1(concat(1x1 -> 16 of each)); then 3x3."""
    module, inputs = small("fpn+asff"), maps_of(SMALL)
    layers = Layers(module)
    maps = plain_fpn(layers, inputs)
    outputs: Maps = {}
    for level in maps:
        name = f"s2_asff_output{level}"
        resampled = [maps[level]]
        for other in (2, 3, 4, 5):
            x = maps[other]
            if other == level:
                continue
            if other > level:
                x = nearest(x, other - level)
            for _ in range(other, level):
                x = F.max_pool2d(x, 3, 2, 1)
            resampled.append(x)
        squeezed = [layers.conv(f"{name}_fuse.compress.{i}", x) for i, x in enumerate(resampled)]
        assert squeezed[0].shape[1] == 16
        alpha = layers.conv(f"{name}_fuse.logits", torch.cat(squeezed, 1)).softmax(1)
        fused = sum(alpha[:, i : i + 1] * x for i, x in enumerate(resampled))
        outputs[level] = layers.conv(name, fused)
    check(module, inputs, outputs, layers)


def deform(x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """A modulated deformable 3x3 convolution: bilinear samples at the moved taps, zero outside.

    Args:
        offset: `(N, groups, 9, 2, H, W)`, (y, x) in pixels.
        mask: `(N, groups, 9, H, W)`.
    """
    n, c, h, w = x.shape
    groups = offset.shape[1]
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    parts = x.reshape(n * groups, c // groups, h, w)
    total = bias[None, :, None, None].expand(n, -1, h, w)
    for tap in range(9):
        y = offset[:, :, tap, 0] + rows + tap // 3 - 1  # (N, groups, H, W)
        z = offset[:, :, tap, 1] + columns + tap % 3 - 1
        grid = torch.stack([(2 * z + 1) / w - 1, (2 * y + 1) / h - 1], -1).flatten(0, 1)
        sampled = F.grid_sample(parts, grid, align_corners=False)
        sampled = sampled.reshape(n, groups, -1, h, w) * mask[:, :, tap, None]
        kernel = weight[:, :, tap // 3, tap % 3, None, None]
        total = total + F.conv2d(sampled.reshape(n, c, h, w), kernel)
    return total


@torch.no_grad()
def test_fapn() -> None:
    """FPN with `1x1(x + x sigma(1x1(GAP(x))))` and `ReLU(DCN(up, 1x1(concat(lateral, 2 up))))`."""
    module, inputs = small("fapn"), maps_of(SMALL)
    layers = Layers(module)
    outputs: Maps = {}
    merged: Tensor | None = None
    for level in (5, 4, 3, 2):
        x, name = inputs[level], f"fapn_lateral{level}"
        gate = layers.conv(f"{name}.attention", F.adaptive_avg_pool2d(x, 1)).sigmoid()
        lateral = layers.conv(f"{name}.conv", x + x * gate)
        if merged is None:
            merged = lateral
        else:
            name = f"fapn_merge{level}_edge1.resample"
            up = bilinear(merged)
            guide = layers.conv(f"{name}.difference", torch.cat([lateral, 2 * up], 1))
            moved = layers.conv(f"{name}.align.offset", guide)
            n, _, h, w = moved.shape
            weight, bias = layers.get(f"{name}.align.weight"), layers.get(f"{name}.align.bias")
            assert weight is not None and bias is not None
            offset = moved[:, :144].reshape(n, 8, 9, 2, h, w)
            mask = moved[:, 144:].reshape(n, 8, 9, h, w).sigmoid()
            merged = lateral + deform(up, weight, bias, offset, mask).relu()
        outputs[level] = layers.conv(f"fapn_output{level}", merged)
    check(module, inputs, outputs, layers)


@torch.no_grad()
def test_fapn_equals_fpn_where_nothing_moves() -> None:
    """What makes the two blocks plain, and FaPN the FPN with bilinear upsampling:

    - the selection's inner convolution is zero, so it weighs every channel by 1 + sigma(0) = 1.5,
      and its outer one is FPN's lateral over 1.5;
    - the alignment's offsets and mask logits are zero, so every tap counts sigma(0) = 0.5 in place,
      and its kernel is twice the identity, without bias;
    - the maps are not negative, so its ReLU changes nothing.
    """
    plain, aligned = small("fpn", upsample=op("bilinear")), small("fapn")
    state = aligned.state_dict()
    for name, x in plain.state_dict().items():
        if "lateral" in name:
            x.abs_()
            node, kind = name.split(".")
            scale = 1.5 if kind == "weight" else 1.0
            state[f"{node.replace('fpn', 'fapn')}.conv.{kind}"].copy_(x / scale)
        else:
            state[name.replace("fpn", "fapn")].copy_(x)
    for name, x in state.items():
        if ".attention." in name or ".align." in name:
            x.zero_()
        if name.endswith(".align.weight"):
            x[:, :, 1, 1] = 2 * torch.eye(WIDTH)
    inputs = {f"res{level}": x.abs() for level, x in maps_of(SMALL).items()}
    one, two = plain(inputs), aligned(inputs)
    assert list(one) == list(two)
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-5), name


def parameters(module: nn.Module, part: str = "") -> int:
    return sum(x.numel() for name, x in module.named_parameters() if part in name)


FIVE = {level: 256 for level in range(3, 8)}
COUNTS = {
    "fpn": (R50, {}, 3_344_384),
    "fpn-retinanet": ({3: 512, 4: 1024, 5: 2048}, {"extra": "conv_c5"}, 7_997_440),
    "pafpn": (R50, {}, 6_884_864),
    "pafpn_mmdet": (R50, {}, 6_884_864),
    "hrfpn": (R50, {}, 3_933_696),
    "bifpn": (
        FIVE,
        {"style": Style(block=op("separable")), "fuse": op("fast_normalized"), "norm": "BN"},
        546_816 + 19,
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name: str) -> None:
    channels, options, count = COUNTS[name]
    assert parameters(pyramid(name.split("-")[0], channels, 256, **options)) == count


def test_parameters_of_the_cells() -> None:
    module = pyramid("nas_fpn", {3: 512, 4: 1024, 5: 2048}, 256, norm="BN")
    assert parameters(module, "nas_fpn_cell") == 4_134_144
    cell = pyramid("bifpn", COUNTS["bifpn"][0], 256, **COUNTS["bifpn"][1])
    assert parameters(cell, "_fuse.weights") == 19


@torch.no_grad()
def test_bifpn_on_any_levels() -> None:
    """On 2 to 6, four times: the catalogue's graphs have no fixed levels."""
    style = Style(block=op("separable"))
    module = small("bifpn", style=style, repeats=4, fuse=op("fast_normalized"), norm="BN")
    inputs = {f"res{level}": x for level, x in maps_of(SMALL).items()}
    outputs = module(inputs)
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {
        f"p{level}": (2, WIDTH, 128 >> level, 256 >> level) for level in range(2, 7)
    }
    assert len(module.graph.nodes) == 1 + 4 * 8
    assert all(x.isfinite().all() and x.std() > 0.01 for x in outputs.values())


@torch.no_grad()
def test_a_stack_is_one_after_another() -> None:
    stack = small("fpn+pafpn+bfp")
    state, used = stack.state_dict(), set()
    maps = inputs = {f"res{level}": x for level, x in maps_of(SMALL).items()}
    levels, widths = {f"res{level}": level for level in SMALL}, {
        f"res{level}": count for level, count in SMALL.items()
    }
    for stage, name in enumerate(("fpn", "pafpn", "bfp"), 1):
        prefix = "" if stage == 1 else f"s{stage}_"
        graph = TOPOLOGIES.get(name)(levels, Style(first=stage == 1))
        alone = Pyramid(graph, widths, Defaults(WIDTH)).eval()
        alone.load_state_dict({key: state[prefix + key] for key in alone.state_dict()})
        used |= {prefix + key for key in alone.state_dict()}
        maps = alone(maps)
        levels, widths = {f"p{level}": level for level in SMALL}, dict.fromkeys(maps, WIDTH)
    assert used == set(state)
    outputs = stack(inputs)
    assert list(outputs) == list(maps)
    for name, x in outputs.items():
        assert torch.equal(x, maps[name]), name


ERRORS = {
    "five levels": (("nas_fpn", (3, 4, 5), 0), r"topology: 'nas_fpn'.*five.*3 from"),
    "and how many of its own": (("nas_fpn", (3, 4, 5), 0), r"inner_levels"),
    "one map": (("simple", (4, 5), -1), r"topology: 'simple'.*in_features"),
    "unknown": (("fpn+nope", (3, 4, 5), -1), r"topology 'fpn\+nope'.*'nope'.*bifpn"),
    "none of its own": (("fpn", (3, 4, 5), 2), r"inner_levels: 2.*'fpn'.*bifpn"),
    "none in the stack": (("fpn+asff", (3, 4, 5), 2), r"inner_levels: 2.*'fpn\+asff'.*bifpn"),
    "not a number": (("bifpn", (3, 4, 5), -2), r"inner_levels: -2"),
    "one level": (("bifpn", (5,), 0), r"topology: 'bifpn' needs at least 2 levels"),
    "one level of RT-DETR's": (("hybrid", (5,), -1), r"topology: 'hybrid' needs at least 2 levels"),
    "two levels": (("qufpn", (4, 5), 0), r"topology: 'qufpn' needs at least 3 levels"),
    "nothing to balance": (("bfp", (5,), -1), r"topology: 'bfp' needs at least 2"),
    "nothing to concatenate": (("csp_pan", (5,), -1), r"topology: 'csp_pan' needs at least 2"),
    "nothing to skip": (("repgfpn", (5,), -1), r"topology: 'repgfpn' needs at least 2"),
    "nothing finer": (("bifusion", (4, 5), -1), r"'bifusion' needs at least 3.*finest.*'res4'"),
    "no level left": (("fpn+bifusion", (4, 5), -1), r"'bifusion' needs at least 3.*'p4', 'p5'"),
    "simple in a stack": (("fpn+simple", (3, 4, 5), -1), r"topology: 'simple'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case: str) -> None:
    (topology, levels, inner), message = ERRORS[case]
    with pytest.raises((ValueError, KeyError), match=message):
        build_graph(topology, {f"res{level}": level for level in levels}, inner_levels=inner)


def test_the_first_stage_that_can_makes_inner_levels() -> None:
    levels = {"res3": 3, "res4": 4, "res5": 5}
    for topology, name in {
        "bifpn+bfp": "bifpn_in6",
        "fpn+bifpn+bfp": "s2_bifpn_in6",
        "fpn+bfp": "s2_bfp_in6",
    }.items():
        graph = build_graph(topology, levels, repeats=2, inner_levels=1)
        assert [each.name for each in graph.nodes if "_in6" in each.name] == [name]
        assert list(graph.output_names()) == ["p3", "p4", "p5", "p6"]
    assert list(build_graph("fpn+bifpn", levels).output_names()) == ["p3", "p4", "p5"]


@pytest.mark.parametrize("repeats", [0, -1, True, 1.5])
def test_repeats_must_count(repeats: Any) -> None:
    with pytest.raises(ValueError, match=r"repeats: "):
        build_graph("fpn", {"res4": 4, "res5": 5}, repeats=repeats)
