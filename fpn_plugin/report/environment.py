"""The machine, the versions and the commit that a report was made with.

Detectron2's and torch's `collect_env` print tables for bug reports: install paths and compilers,
but neither the CPU's flags, cores, threads and load nor the commit, which are what a time on a CPU
depends on.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Mapping

import torch

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_tile")
_PACKAGES = ("torch", "torchvision", "detectron2", "timm", "fvcore", "numpy", "effdet")
_BUSY = 0.5  # load per core above which times are doubtful


def collect_environment(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers, ready for JSON.

    Args:
        device: "cpu" or "cuda".
    """
    environment = {
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
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        environment["gpu"] = torch.cuda.get_device_name()
        environment["cuda"] = torch.version.cuda
        environment["tf32"] = torch.backends.cuda.matmul.allow_tf32
        environment["tf32_convolutions"] = torch.backends.cudnn.allow_tf32
    return environment


def environment_warnings(environment: Mapping[str, Any]) -> list[str]:
    """Reasons not to trust times or the commit."""
    warnings = []
    load, cores = environment["load_average"], environment["cores"]
    if load is not None and load > _BUSY * cores:
        warnings.append(
            f"the machine is busy (load average {load} on {cores} cores): times may be too high"
        )
    if str(environment["commit"]).endswith("+dirty"):
        warnings.append("the working tree has uncommitted changes: the commit does not say it all")
    return warnings


def _commit() -> str:
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
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
