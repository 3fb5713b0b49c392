"""The peak of live memory while something runs, in bytes, the same every time."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any], device: str = "cpu") -> int:
    """How far memory rises above where it stood, while `work` runs.

    On CUDA torch's allocator tells. On the CPU it is the highest sum of the allocations and frees
    that torch's profiler saw, temporary ones inside operators included: not the resident size,
    which depends on what the allocator keeps. What a library takes past torch's allocator
    (oneDNN's scratch space, for one) is not seen.

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
    # the profiler's C++ part greets on stderr otherwise
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
    for _, change in sorted(changes, key=lambda item: item[0]):
        live += change
        peak = max(peak, live)
    return peak
