"""Measurements without a clock: parameters, operations, activations, peak memory."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Callable

import torch
from torch.profiler import ProfilerActivity, profile

from fpn_plugin.benchmark.inputs import Inputs
from fpn_plugin.benchmark.models import BenchmarkModel, below_name
from fpn_plugin.benchmark.timing import no_lap
from fpn_plugin.benchmark.workloads import neck_workload
from fpn_plugin.visualize.complexity import count_parameters, totals

COUNTS = (
    "model_parameters",
    "backbone_parameters",
    "neck_parameters",
    "backbone_gflops",
    "neck_gflops",
    "backbone_activations",
    "neck_activations",
    "neck_peak_bytes",
)
"""What :func:`count` gives; less is better. GFLOPs are fvcore's: 10^9 multiply-accumulates."""


def count(model: BenchmarkModel, inputs: Inputs) -> dict[str, float]:
    """The figures of COUNTS: operations and activations for one image, bytes for a batch."""
    detector = model.model
    costs = totals(detector.backbone, below_name(detector.backbone), inputs.size)
    backbone, neck = costs["backbone"], costs["neck"]
    work = neck_workload(model, inputs).work
    work(no_lap)  # so that what is made once is not counted
    return {
        "model_parameters": count_parameters(detector),
        "backbone_parameters": backbone.parameters,
        "neck_parameters": neck.parameters,
        "backbone_gflops": backbone.flops / 1e9,
        "neck_gflops": neck.flops / 1e9,
        "backbone_activations": backbone.activations,
        "neck_activations": neck.activations,
        "neck_peak_bytes": peak_bytes(lambda: work(no_lap), inputs.device),
    }


def peak_bytes(work: Callable[[], Any], device: str = "cpu") -> int:
    """Measure how far memory rises above where it stood while `work` runs.

    On CUDA torch's allocator counts it. On the CPU it is the highest sum of the allocations and
    frees that torch's profiler saw, temporary ones inside operators included: not the resident
    size, which depends on what the allocator keeps. What a library takes past torch's allocator
    (such as oneDNN's scratch space) is not seen.

    Args:
        work: run once; what it returns is dropped after the peak was taken.
        device: "cuda" or "cpu".
    """
    return _peak_cuda(work) if device == "cuda" else _peak_cpu(work)


def _peak_cuda(work: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = work()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def _peak_cpu(work: Callable[[], Any]) -> int:
    # the profiler's C++ part otherwise writes a greeting to stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = work()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        # the one public place with every allocation: prof.events() adds up those inside an operator
        trace = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return peak_of(events)


def peak_of(events: list[dict[str, Any]]) -> int:
    """The highest sum of the CPU's `[memory]` events of a trace, in the order of time."""
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    ]
    live = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        live += size
        peak = max(peak, live)
    return peak
