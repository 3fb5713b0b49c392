"""Every name on a CUDA device that need not exist: a part that makes a tensor on another device, or
of another type than autocast's, is refused by torch here as it would be there.

`FakeTensorMode` has tensors without numbers, on any device. Autograd's backward pass needs the
device's driver, so it runs on `meta`.
"""

from __future__ import annotations

import contextlib
from typing import Iterable, Iterator

import pytest
import torch
from helpers import CASES, OPERATORS, pyramid_of, small_maps
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fpn_plugin.pyramid.blocks import BLOCKS


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """CUDA's autocast, which `torch.autocast` refuses to turn on where there is no GPU."""
    if dtype is None:
        yield
        return
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def run(
    case: tuple[str, str], device: str, dtypes: Iterable[torch.dtype | None] = (None,)
) -> Iterator[dict[str, Tensor]]:
    """The outputs of a pyramid that is built on a device, for an odd size, with each of autocast's
    types."""
    with torch.device(device):
        pyramid = pyramid_of(*case)
        maps = {name: x.requires_grad_() for name, x in small_maps(65, 97).items()}
    for dtype in dtypes:
        with autocast(dtype):
            yield pyramid({name: maps[name] for name in pyramid.graph.inputs})


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_on_one_device(case: tuple[str, str]) -> None:
    with FakeTensorMode():
        for outputs in run(case, "cuda", (None, torch.float16)):
            assert {x.device.type for x in outputs.values()} == {"cuda"}
            assert all(x.is_floating_point() for x in outputs.values())


@pytest.mark.parametrize("case", OPERATORS, ids=" ".join)
def test_backward(case: tuple[str, str]) -> None:
    with FakeTensorMode():
        outputs = list(next(run(case, "meta")).values())
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def test_autocast_is_on() -> None:
    with FakeTensorMode():
        types = (None, torch.float16, torch.bfloat16)
        for dtype, outputs in zip(types, run(("topology", "fpn"), "cuda", types)):
            assert {x.dtype for x in outputs.values()} == {dtype or torch.float32}


FAULTS = {
    "device": lambda y: y + torch.ones(y.shape[-2:]),
    "dtype": lambda y: torch.lerp(y, torch.zeros_like(y, dtype=torch.float32), 0.5),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bad(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return FAULTS[fault](super().forward(x))

    monkeypatch.setitem(BLOCKS._objects, "bad", lambda one, two: Bad(one, two, 3, padding=1))
    with FakeTensorMode(), pytest.raises(RuntimeError, match=fault):
        next(run(("block", "bad"), "cuda", [torch.float16]))
