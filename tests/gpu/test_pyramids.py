"""Every name on the device: forward and backward as on the CPU, half precision, compiled, exported."""

from __future__ import annotations

import copy
import functools
import zlib
from pathlib import Path

import pytest
import torch
from helpers import CASES, FromImage, pyramid_of, small_maps
from torch import Tensor, nn

from fpn_plugin.benchmark.equality import DIFFERS, FLOAT32, GRADIENT, compare_outputs

IDS = [" ".join(case) for case in CASES]
EVEN, ODD = (64, 96), (65, 97)
Maps = dict[str, Tensor]

DEPTH = 4.0
"""Pyramids that rounding adds up through, as `compare_outputs` counts: these have the random weights
of tests, which amplify it more than initial ones do."""
DYHEAD = 2.0
"""In half precision `dyhead` is that many times as deep: its offsets round too, and move what it
samples."""
GRADIENTS = 2e-3
"""The root mean square that gradients in float32 may be off by, relative to their own. Rounding is
1e-6; but where the two largest values of a max pool, or zero and a value before a ReLU, differ by
rounding alone, a whole gradient goes to another place."""


def on_device(case: tuple[str, str], device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return pyramid_of(*case).to(device, dtype)


def inputs_of(pyramid: nn.Module, size: tuple[int, int]) -> Maps:
    """Always the same maps of a size, on the CPU."""
    torch.manual_seed(1)
    maps = small_maps(*size, batch=2)
    return {name: maps[name] for name in pyramid.graph.inputs}


def run(pyramid: nn.Module, maps: Maps) -> Maps:
    """Outputs, and the gradients of inputs and weights for a random gradient of the outputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in maps.items()}
    outputs = pyramid(dict(leaves))
    leaves.update(pyramid.named_parameters())
    torch.autograd.backward(list(outputs.values()), [noise(*pair) for pair in outputs.items()])
    grads = {GRADIENT + name: x.grad for name, x in leaves.items() if x.grad is not None}
    pyramid.zero_grad()
    return {name: x.detach().cpu() for name, x in {**outputs, **grads}.items()}


def noise(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator).to(like)


@functools.lru_cache(maxsize=None)
def reference(case: tuple[str, str], size: tuple[int, int]) -> Maps:
    """The results of the CPU in float64."""
    pyramid = on_device(case, "cpu", torch.float64)
    return run(pyramid, {name: x.double() for name, x in inputs_of(pyramid, size).items()})


def assert_equal(expected: Maps, results: Maps, where: str) -> None:
    assert list(results) == list(expected), where
    maps, grads = (
        [
            {k: x for k, x in each.items() if k.startswith(GRADIENT) == is_grad}
            for each in (expected, results)
        ]
        for is_grad in (False, True)
    )
    equality = compare_outputs(*maps, depth=DEPTH)
    assert equality.verdict == FLOAT32, (where, equality)
    scale = max(x.square().mean().sqrt() for x in grads[0].values())
    for name, grad in grads[0].items():
        # a weight's own gradient may vanish, as that of a bias before a batch norm does
        size = max(grad.square().mean().sqrt(), 1e-3 * scale)
        off = float((grads[1][name].double() - grad).square().mean().sqrt() / size)
        assert off <= GRADIENTS, f"{where}: {name} is off by {off:.1e}"


def strided(x: Tensor) -> Tensor:
    """The same values in every second column of a wider map."""
    return x.repeat_interleave(2, dim=3)[..., ::2]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equal_to_the_cpu(case: tuple[str, str], device: str) -> None:
    """Forward and backward, for maps of even and odd sizes, in channels-last memory and with gaps."""
    pyramid = on_device(case, device)
    maps = {size: inputs_of(pyramid, size) for size in (EVEN, ODD)}
    maps = {size: {k: x.to(device) for k, x in of.items()} for size, of in maps.items()}
    for size in (EVEN, ODD):
        assert_equal(reference(case, size), run(pyramid, maps[size]), f"{size}")
    gaps = {name: strided(x) for name, x in maps[EVEN].items()}
    assert not any(x.is_contiguous() for x in gaps.values())
    assert_equal(reference(case, EVEN), run(pyramid, gaps), "not contiguous")
    pyramid.to(memory_format=torch.channels_last)
    last = {k: x.contiguous(memory_format=torch.channels_last) for k, x in maps[ODD].items()}
    assert_equal(reference(case, ODD), run(pyramid, last), "channels-last")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_half_precision(case: tuple[str, str], dtype: torch.dtype, device: str) -> None:
    """Outputs and gradients are finite, and outputs close: up to what the type rounds."""
    pyramid = on_device(case, device)
    maps = {name: x.to(device) for name, x in inputs_of(pyramid, ODD).items()}
    with torch.autocast(device, dtype):
        results = run(pyramid, maps)
    assert [name for name, x in results.items() if not x.isfinite().all()] == []
    expected = {k: x for k, x in reference(case, ODD).items() if not k.startswith(GRADIENT)}
    outputs = {name: results[name] for name in expected}
    precision = str(dtype).removeprefix("torch.")
    depth = DEPTH * (DYHEAD if "dyhead" in case else 1)
    equality = compare_outputs(expected, outputs, precision, depth=depth)
    assert equality.verdict not in (DIFFERS, FLOAT32), equality


# what a compiler meets: a plain graph, learned weights, a fusion of windows, grid_sample, deformable
# convolutions and attention
COMPILED = [
    ("topology", "fpn"),
    ("fuse", "fast_normalized"),
    ("fuse", "freq"),
    ("step", "msdeform"),
    ("step", "dyhead"),
    ("block", "aifi"),
]


@pytest.mark.parametrize("case", COMPILED, ids=" ".join)
def test_compiled(case: tuple[str, str], device: str) -> None:
    pyramid = on_device(case, device)
    # inductor on the CPU is tests/pyramid/test_compilation.py's
    backend = "inductor" if device == "cuda" else "aot_eager"
    torch._dynamo.reset()
    pyramid.compile_graph(backend=backend, fullgraph=True, dynamic=True)
    for size in (EVEN, ODD):
        maps = {name: x.to(device) for name, x in inputs_of(pyramid, size).items()}
        assert_equal(reference(case, size), run(pyramid, maps), f"{size}")


@pytest.mark.parametrize("case", COMPILED, ids=" ".join)
@torch.no_grad()
def test_to_onnx(case: tuple[str, str], device: str, tmp_path: Path) -> None:
    """A model on the device, exported with sizes that vary, gives its numbers in onnxruntime."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    model = FromImage(on_device(case, device)).to(device).eval()
    sides = {axis: torch.export.Dim(f"side{axis}", min=130, max=2048) for axis in (2, 3)}
    example, path = torch.randn(1, 3, 150, 261), tmp_path / "model.onnx"
    torch.onnx.export(
        *(model, (example.to(device),), path),
        dynamo=True,
        dynamic_shapes=(sides,),
        opset_version=20,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    image = torch.randn(1, 3, 192, 135)
    results = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    expected = {name: x.cpu() for name, x in model(image.to(device)).items()}
    results = dict(zip(expected, map(torch.from_numpy, results), strict=True))
    assert compare_outputs(expected, results, depth=DEPTH).verdict != DIFFERS


def test_a_copy_on_the_device_leaves_the_first(device: str) -> None:
    """Nothing of a pyramid is left behind, or shared, when it is moved."""
    first = on_device(("topology", "bifpn"), "cpu")
    second = copy.deepcopy(first).to(device)
    assert {x.device.type for x in second.state_dict().values()} == {device}
    assert {x.device.type for x in first.state_dict().values()} == {"cpu"}
