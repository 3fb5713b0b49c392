"""The Triton kernels against the plain operations: in Triton's interpreter, on a GPU where there is one,
and compiled for GPUs without one."""

from __future__ import annotations

import copy
import importlib
import itertools
import os
import sys
from types import ModuleType
from typing import Any, Iterator

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone
from helpers import small_maps, small_pyramid, zoo_config
from torch import Tensor, nn

from fpn_plugin.pyramid import fused, one_pass
from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.fusion_base import repeat_coarse, weigh_maps
from fpn_plugin.pyramid.graph import op

NAME = "fpn_plugin.pyramid.triton_fuse"
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COARSE = [
    [False, True],
    [True, False],
    [True, True],
    [False, True, False],
    [True, False, True],
    [False, False, True],
]
# height and width of the result, and of each map to be repeated
SIZES = [((12, 20), (6, 10)), ((13, 21), (7, 11)), ((11, 9), (4, 9)), ((5, 130), (5, 1))]
ONE_TILE_AND_MORE = [(1, 1), (2, 3), (1, 33), (1, 130)]  # images and channels

# The same cases run on the CPU as well, in Triton's interpreter; these are for machines with a GPU.
cuda = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    ],
)


def import_anew() -> ModuleType:
    """The module as Triton's environment variable has it now: Triton asks when it decorates."""
    sys.modules.pop(NAME, None)
    return importlib.import_module(NAME)


@pytest.fixture(scope="module", params=["cpu", cuda])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "cpu": Triton's interpreter, for these tests alone."""
    pytest.importorskip("triton", reason="Triton is not installed")
    before = os.environ.get("TRITON_INTERPRET")
    if request.param == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    kernel = import_anew()
    with pytest.MonkeyPatch.context() as patch:
        # the interpreter adds up by numpy if it knows the function, and else number by number
        patch.setattr("triton.language.standard._sum_combine", kernel.plus)
        yield request.param
    os.environ.pop("TRITON_INTERPRET", None)
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before
    sys.modules.pop(NAME, None)


@pytest.fixture()
def kernel(device: str) -> ModuleType:
    return importlib.import_module(NAME)


def maps_for(
    coarse: list[bool],
    device: str,
    layout: str = "nchw",
    dtype: str = "float32",
    sizes: tuple[tuple[int, int], tuple[int, int]] = SIZES[1],
    batch: tuple[int, int] = (2, 8),
) -> list[Tensor]:
    shapes = [(*batch, *sizes[small]) for small in coarse]
    return [
        torch.randn(shape, device=device)
        .to(DTYPES[dtype])
        .contiguous(memory_format=LAYOUTS[layout])
        .requires_grad_()
        for shape in shapes
    ]


def plain(maps: list[Tensor], coarse: list[bool], size: Any, weights: Tensor | None) -> Tensor:
    repeated = repeat_coarse(maps, coarse, list(size))
    if weights is not None:
        return weigh_maps(repeated, list(weights.unbind(0)))
    total = repeated[0]
    for x in repeated[1:]:
        total = total + x
    return total


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]


def assert_near(one: Tensor, two: Tensor, tolerance: float) -> None:
    """In units of the largest value."""
    assert one.shape == two.shape and one.dtype == two.dtype
    scale = max(two.float().abs().max().item(), 1e-3)
    assert (one.float() - two.float()).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize("coarse", COARSE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_plain_operations(
    kernel: ModuleType, device: str, weighted: bool, coarse: list[bool], layout: str, sizes: Any
) -> None:
    """A sum bit for bit; a weighted sum, where a GPU may round once, to 1e-6; gradients to 1e-5."""
    maps = maps_for(coarse, device, layout, sizes=sizes)
    weights = torch.rand(len(coarse), device=device).requires_grad_() if weighted else None
    other = copies([*maps, *([] if weights is None else [weights])])
    assert kernel.usable(maps, coarse, sizes[0])
    result = kernel.weighted_sum(maps, coarse, list(sizes[0]), weights)
    expected = plain(other[: len(maps)], coarse, sizes[0], other[-1] if weighted else None)
    assert result.is_contiguous(memory_format=LAYOUTS[layout])
    assert_near(result, expected, 1e-6 if weighted else 0.0)
    grad = torch.randn_like(result)
    result.backward(grad)
    expected.backward(grad)
    for one, two in zip([*maps, *([] if weights is None else [weights])], other):
        assert one.grad is not None and two.grad is not None
        assert_near(one.grad, two.grad, 1e-5)


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize("coarse", COARSE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(
    kernel: ModuleType, device: str, weighted: bool, coarse: list[bool], layout: str, dtype: str
) -> None:
    """As near to the exact result as the type allows; weights and their gradients in float32.

    The interpreter cuts bfloat16 off, instead of rounding it, hence two units for each addition.
    """
    maps = maps_for(coarse, device, layout, dtype)
    weights = torch.rand(len(coarse), device=device).requires_grad_() if weighted else None
    unit = torch.finfo(DTYPES[dtype]).eps
    exact = [x.detach().float().requires_grad_() for x in maps]
    exact_weights = None if weights is None else copies([weights])[0]
    size = SIZES[1][0]
    result = kernel.weighted_sum(maps, coarse, list(size), weights)
    expected = plain(exact, coarse, size, exact_weights)
    assert result.dtype == DTYPES[dtype]
    assert_near(result.float(), expected, 2 * (len(maps) - 1) * unit)
    result.float().square().sum().backward()
    expected.square().sum().backward()
    for one, two in zip(maps, exact):
        assert one.grad is not None and two.grad is not None
        assert one.grad.dtype == DTYPES[dtype]
        assert_near(one.grad.float(), two.grad, 8 * unit)
    if weights is not None and exact_weights is not None:
        assert weights.grad is not None and exact_weights.grad is not None
        assert weights.grad.dtype == torch.float32
        assert_near(weights.grad, exact_weights.grad, 4 * unit)
    if not weighted and (dtype == "float16" or device == "cuda"):  # rounded as often
        assert torch.equal(result, plain([x.detach() for x in maps], coarse, size, None))


@pytest.mark.parametrize("batch", ONE_TILE_AND_MORE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_size_to_any_size(
    kernel: ModuleType, device: str, batch: tuple[int, int], layout: str
) -> None:
    """Torch's own rule for what is nearest, upwards and downwards: sizes drawn at random."""
    sides = torch.randint(1, 40, (8, 4)).tolist()
    for height, width, h, w in sides:
        maps = maps_for([False, True], device, layout, sizes=((height, width), (h, w)), batch=batch)
        result = kernel.weighted_sum(maps, [False, True], [height, width])
        assert torch.equal(result, plain(maps, [False, True], (height, width), None))


def test_maps_with_gaps_and_tiles_that_end_within(kernel: ModuleType, device: str) -> None:
    """Slices, transposed and expanded maps, and a gradient that is expanded, as that of a sum."""
    fine = torch.randn(2, 24, 33, 70, device=device)[:, ::3, :, 1::2].requires_grad_()
    coarse = torch.randn(2, 40, 11, 8, device=device).transpose(1, 3).requires_grad_()
    wide = torch.randn(1, 8, 1, 1, device=device).expand(2, 8, 33, 35).requires_grad_()
    maps, flags = [fine, coarse, wide], [False, True, False]
    weights = torch.rand(3, device=device).requires_grad_()
    results = []
    for total in (
        kernel.weighted_sum(maps, flags, [33, 35], weights),
        plain(maps, flags, (33, 35), weights),
    ):
        found = torch.autograd.grad(total.sum(), [*maps, weights])
        results.append([total, *found])
    for one, two in zip(*results):
        assert_near(one, two, 1e-5)


@pytest.mark.parametrize("coarse", COARSE, ids=str)
def test_gradients_are_those_of_finite_differences(
    kernel: ModuleType, device: str, coarse: list[bool]
) -> None:
    """The sum is linear in each argument, so even large steps give its derivative."""
    inputs = [*maps_for(coarse, device), torch.rand(len(coarse), device=device).requires_grad_()]
    grad = torch.randn(2, 8, *SIZES[1][0], device=device)

    def value(tensors: list[Tensor]) -> Tensor:
        total = kernel.weighted_sum(tensors[:-1], coarse, list(SIZES[1][0]), tensors[-1])
        return (total * grad).sum()

    found = torch.autograd.grad(value(inputs), inputs)
    for i, (x, gradient) in enumerate(zip(inputs, found)):
        direction = torch.randn_like(x)
        with torch.no_grad():
            ends = [
                value([*inputs[:i], x + sign * direction, *inputs[i + 1 :]]) for sign in (1, -1)
            ]
        slope = (ends[0] - ends[1]) / 2
        assert slope.item() == pytest.approx(
            (gradient * direction).sum().item(), rel=1e-3, abs=0.02
        )


def test_only_wanted_gradients_are_made(kernel: ModuleType, device: str) -> None:
    maps = maps_for([False, True], device)
    maps[0].requires_grad_(False)
    kernel.weighted_sum(maps, [False, True], list(SIZES[1][0])).sum().backward()
    assert maps[0].grad is None and maps[1].grad is not None
    with torch.no_grad():
        assert not kernel.weighted_sum(maps, [False, True], list(SIZES[1][0])).requires_grad


def test_what_is_left_to_the_plain_operations(kernel: ModuleType, device: str) -> None:
    fine, coarse = (x.detach() for x in maps_for([False, True], device))
    size = list(SIZES[1][0])
    assert kernel.usable([fine, coarse], [False, True], size)
    for maps in (
        [fine.double(), coarse.double()],
        [fine, coarse.half()],
        [fine, coarse[:, :4]],
        [fine, coarse[:, :, :0]],
        [fine[0], coarse[0]],
        [fine[:, :, 1:], coarse],
        [fine] * 4,
    ):
        assert not kernel.usable(maps, [False, True, False, False][: len(maps)], size)
    assert not kernel.usable([fine.to("meta"), coarse.to("meta")], [False, True], size)
    far = torch.empty(1, device="meta").expand(2, 8, 2**14, 2**14)  # 2^32 elements
    assert not kernel._fits(far, far.shape[2:]) and kernel._fits(fine, size)


@pytest.mark.parametrize("fuse", ["avg", "fast_normalized"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(64, 64), (37, 51)])
def test_in_a_pyramid(
    kernel: ModuleType, device: str, fuse: str, layout: str, size: tuple[int, int], monkeypatch: Any
) -> None:
    """Every node that repeats a map runs the kernel, in training too; the rest stays as it was."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(3)
    other = small_pyramid("bifpn", fuse=op(fuse), norm="GN").to(device)
    pyramid = copy.deepcopy(other)
    one_pass.use_triton(pyramid, True)
    calls: list[int] = []
    launch = kernel._forward
    monkeypatch.setattr(kernel, "_forward", lambda *a: calls.append(len(a[0])) or launch(*a))
    maps = {
        name: x.to(device).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        for name, x in small_maps(*size, batch=2).items()
    }
    results = []
    for one in (pyramid, other):
        outputs = one(maps)
        sum(x.square().mean() for x in outputs.values()).backward()
        gradients = [p.grad for p in one.parameters()] + [x.grad for x in maps.values()]
        results.append([*(x.detach() for x in outputs.values()), *gradients])
        for x in maps.values():
            x.grad = None
    assert calls.count(2) + calls.count(3) == len(calls) >= 4
    for found, expected in zip(*results):
        assert_near(found, expected, 1e-4)


def test_under_autocast(kernel: ModuleType, device: str) -> None:
    module = FUSIONS.get("fast_normalized")(8, 2).to(device)
    module.coarse = [False, True]
    maps = [x.detach() for x in maps_for([False, True], device, dtype="bfloat16")]
    with torch.autocast(device, torch.bfloat16):
        expected = module(maps, list(SIZES[1][0]))
        one_pass.use_triton(module, True)
        found = module(maps, list(SIZES[1][0]))
    assert found.dtype == torch.bfloat16
    assert_near(found.float(), expected.float(), 2**-6)


def test_compilers_see_the_plain_operations(kernel: ModuleType, device: str) -> None:
    pyramid = small_pyramid("bifpn", fuse=op("softmax")).to(device).eval()
    maps = {name: x.to(device) for name, x in small_maps().items()}
    expected = pyramid(maps)
    one_pass.use_triton(pyramid, True)
    torch._dynamo.reset()
    compiled = torch.compile(pyramid, fullgraph=True, backend="eager", dynamic=True)
    for made in (
        compiled,
        torch.jit.script(pyramid),
        torch.jit.trace(pyramid, (maps,), strict=False),
    ):
        for name, x in made(maps).items():
            assert_near(x, expected[name], 1e-5)


def test_on_the_cpu_the_key_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(one_pass, "_import_kernel", lambda: pytest.fail("Triton was wanted"))
    other = small_pyramid("bifpn", fuse=op("softmax"))
    pyramid = copy.deepcopy(other)
    one_pass.use_triton(pyramid, True)
    maps = small_maps()
    for one, two in zip(pyramid(maps).values(), other(maps).values()):
        assert torch.equal(one, two)


def test_without_triton_the_error_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # stands for maps on CUDA
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.delattr("fpn_plugin.pyramid.triton_fuse", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    module = FUSIONS.get("sum")(8, 2)
    module.coarse = [False, True]
    one_pass.use_triton(module, True)
    maps = [torch.randn(1, 8, 4, 4), torch.randn(1, 8, 2, 2)]
    with pytest.raises(ImportError, match="MODEL.FPN.TRITON.*pip install triton"):
        module(maps, [4, 4])


@pytest.mark.parametrize("wanted", [False, True])
def test_the_key(wanted: bool) -> None:
    cfg = zoo_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "MODEL.RESNETS.DEPTH", 18)
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.BACKBONE.NAME = "build_pyramid_backbone"
    assert not cfg.MODEL.FPN.TRITON
    cfg.MODEL.FPN.TRITON = wanted
    pyramid: nn.Module = build_backbone(cfg)
    assert [m.triton for m in pyramid.modules() if hasattr(m, "takes_coarse")] == [wanted] * 2


@pytest.mark.parametrize("dtype, pointer", [("fp32", "f32"), ("fp16", "f16"), ("bf16", "bf16")])
def test_the_kernels_compile_for_gpus(
    dtype: str, pointer: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code for an A100 and an H100, without one; Triton makes constants of ones."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = import_anew()
    cases = itertools.product(
        (module.sum_kernel, module.dot_kernel), (80, 90), (False, True), (False, True)
    )
    for kernel, capability, channels_last, ones in cases:
        signature, constants = {}, {}
        for name in kernel.arg_names:
            if name in ("out", "grad", "x0", "x1", "x2"):
                signature[name] = f"*{dtype}"
            elif name in ("weights", "partial"):
                signature[name] = "*fp32"
            elif name.startswith(("rs", "cs")):
                signature[name] = "fp32"
            else:
                constant = name.isupper() or ones
                signature[name] = "constexpr" if constant else "i32"
                if constant:
                    constants[name] = {"ROWS": 16, "COLUMNS": 64}.get(name, 1)
        constants["CHANNELS_LAST"] = int(channels_last)
        made = triton.compile(
            ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32)
        )
        assert made.asm["cubin"]
        if dtype != "fp32" and kernel is module.sum_kernel:  # to the nearest
            assert f"cvt.rn.{pointer}" in made.asm["ptx"]
    sys.modules.pop(NAME, None)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_cpu_sums_and_the_kernel_agree(kernel: ModuleType, device: str) -> None:
    """On what both take, they have the same bits; fused.py is for the CPU."""
    for layout, coarse in itertools.product(LAYOUTS, COARSE):
        maps = [x.detach() for x in maps_for(coarse, device, layout, sizes=SIZES[0])]
        weights = torch.rand(len(coarse))
        if fused.usable(maps, coarse, SIZES[0][0]):
            one = fused.weighted_sum(maps, coarse, list(SIZES[0][0]), weights)
            two = kernel.weighted_sum(maps, coarse, list(SIZES[0][0]), weights)
            assert_near(one, two, 1e-6)
            assert torch.equal(
                F.interpolate(maps[coarse.index(True)], size=SIZES[0][0]),
                repeat_coarse(maps, coarse, list(SIZES[0][0]))[coarse.index(True)],
            )
