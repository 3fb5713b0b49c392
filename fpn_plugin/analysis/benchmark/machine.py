"""The machine, the versions and the commit of a report, and how fast the machine is at best."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Sequence

import torch

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_tile")
_PACKAGES = ("torch", "torchvision", "detectron2", "timm", "fvcore", "numpy", "effdet")
_BUSY = 0.5  # load per core, beside this process, above which times are doubtful


def facts(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers, ready for JSON."""
    known = {
        "cpu": _cpu_info("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in _FLAGS if flag in _cpu_info("flags").split()],
        "cores": (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        known["gpu"] = torch.cuda.get_device_name()
        known["cuda"] = torch.version.cuda
        known["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return known


def warnings(known: dict[str, Any]) -> list[str]:
    """What in the facts speaks against trusting times."""
    found = []
    load, cores = known["load_average"], known["cores"]
    if load is not None and load > _BUSY * cores:
        found.append(
            f"the machine is busy (load average {load} on {cores} cores): times may be too high"
        )
    if str(known["commit"]).endswith("+dirty"):
        found.append("the working tree has uncommitted changes: the commit does not say it all")
    return found


def ceilings(
    device: str, sizes: Sequence[int] = (1024, 2048), megabytes: int = 256
) -> dict[str, float]:
    """The rates that no program on this machine exceeds by much: the best of a few tries each.

    Args:
        sizes: of the square matrices; the fastest counts.
        megabytes: of the block that is copied; more than the caches hold.

    Returns:
        "float32_gflops" and "bfloat16_gflops", counting a multiplication and its addition as one
        operation as fvcore does, and "copy_gbytes": gigabytes read and written each second.
    """
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"{str(dtype).removeprefix('torch.')}_gflops"
        rates[name] = max(_product_rate(size, dtype, device) for size in sizes) / 1e9
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), device)
    rates["copy_gbytes"] = 2 * source.numel() * 4 / seconds / 1e9
    return rates


def _product_rate(size: int, dtype: torch.dtype, device: str) -> float:
    one = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(one)
    return size**3 / _best(lambda: torch.mm(one, one, out=out), device)


def _best(work: Callable[[], Any], device: str, tries: int = 20) -> float:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for _ in range(tries):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def commit() -> str:
    """The commit of this checkout, with "+dirty" if files differ from it; "" outside git."""
    folder = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        return f"{head}+dirty" if head and git("status", "--porcelain") else head
    except OSError:
        return ""


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
