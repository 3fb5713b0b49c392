"""Counts and peaks against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fpn_plugin.benchmark.counts import COUNTS, count, peak_bytes, peak_of
from fpn_plugin.benchmark.inputs import Inputs
from fpn_plugin.benchmark.models import BenchmarkModel
from fpn_plugin.visualize.complexity import measure

MB = 1_000_000


def test_counts(models: dict[str, BenchmarkModel], inputs: Inputs, report: dict[str, Any]) -> None:
    counts = report["counts"]
    assert set(counts) == set(models)
    assert all(tuple(row) == COUNTS for row in counts.values())
    base, fpn = counts["baseline base"], counts["fpn"]
    assert {key: base[key] for key in COUNTS[:-1]} == {key: fpn[key] for key in COUNTS[:-1]}
    assert count(models["fpn"], inputs) == fpn
    by_node = measure(models["fpn"].model.backbone, inputs.size)
    assert fpn["neck_parameters"] == by_node.pyramid.parameters
    assert fpn["neck_gflops"] == pytest.approx(by_node.pyramid.flops / 1e9)
    # four laterals and four outputs of 16 channels, by hand
    height, width = inputs.size
    pixels = sum(height * width // 4**level for level in (2, 3, 4, 5))
    assert fpn["neck_activations"] == 2 * 16 * pixels


def test_peak_by_hand() -> None:
    """The sort's own values and indices are alive at once, and arange's indices before it."""

    def work() -> None:
        a = torch.empty(1000, 1000)
        b = a + 1.0
        del a
        c = torch.cat([b, b])
        c.sort()

    least = 4 * MB + 8 * MB + 8 * MB + 16 * MB
    assert least <= peak_bytes(work) <= least + 0.1 * MB
    # what is returned counts too
    assert peak_bytes(lambda: [torch.empty(MB, dtype=torch.uint8) for _ in range(3)]) == 3 * MB


def test_maps_of_a_forward_and_of_a_backward() -> None:
    """Two maps are alive at once without a graph; with it all three, and two gradients."""
    size = 128 * 128 * 8 * 4
    net = nn.Sequential(nn.ReLU(), nn.Sigmoid(), nn.Tanh())
    x = torch.randn(1, 8, 128, 128)
    with torch.no_grad():
        assert peak_bytes(lambda: net(x)) == 2 * size
    leaf = x.clone().requires_grad_()
    gradient = torch.ones_like(x)

    def step() -> None:
        leaf.grad = None
        net(leaf).backward(gradient)

    assert 4 * size <= peak_bytes(step) <= 6 * size


def test_the_same_every_time() -> None:
    net = nn.Conv2d(8, 16, 3)
    x = torch.randn(2, 8, 64, 64)
    net(x)
    assert len({peak_bytes(lambda: net(x)) for _ in range(3)}) == 1


def test_order_of_events_is_that_of_time() -> None:
    def event(at: float, change: int, kind: int = 0) -> dict:
        return {"name": "[memory]", "ts": at, "args": {"Bytes": change, "Device Type": kind}}

    events = [event(3, -5), event(1, 5), event(4, 7), event(2, 4), event(2, 99, kind=1)]
    assert peak_of([{"name": "aten::add"}, *events]) == 11


def test_cuda_asks_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"now": 100, "most": 0}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(most=0))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["most"])
    assert peak_bytes(lambda: held.update(most=350), "cuda") == 250
