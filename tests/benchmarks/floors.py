"""The floors under a pyramid's time: its convolutions alone, and its operations at the rate that the
machine reaches in a large matrix product."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
from peers import without_levers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer

from fpn_plugin.benchmark.inputs import Inputs
from fpn_plugin.benchmark.measure import Pair, Section
from fpn_plugin.benchmark.models import BenchmarkModel, prepare
from fpn_plugin.benchmark.tables import milliseconds
from fpn_plugin.benchmark.timing import FirstCall, Lap
from fpn_plugin.benchmark.workloads import Workload, neck_inputs
from fpn_plugin.report.tables import Table

_CONVOLUTIONS = (torch.conv2d, torch.conv_transpose2d)


class Recorder(TorchFunctionMode):
    """Notes every convolution that is called while it is active, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = []
        self.bytes = 0  # of what they read and write, each once

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CONVOLUTIONS:
            self.calls.append((func, args, kwargs or {}))
            # autocast makes the weights and the map of the result's type
            values = sum(x.numel() for x in (*args, result) if isinstance(x, Tensor))
            self.bytes += values * result.element_size()
        return result


def convolutions_workload(model: BenchmarkModel, inputs: Inputs) -> Workload:
    """Every convolution of the pyramid's forward on the map that it had, one after another.

    What a config compiles is recorded uncompiled. Deformable convolutions are not among them.
    """
    cfg = without_levers(model.config.cfg, keep_types=True)
    ready = prepare(model.model, cfg, training=False)
    maps = neck_inputs(ready, inputs)
    with Recorder() as recorder, ready.autocast(), torch.no_grad():
        ready.neck()(maps)

    @FirstCall
    @torch.no_grad()
    def work(lap: Lap) -> Any:
        with ready.autocast():
            for call, args, keywords in recorder.calls:
                call(*args, **keywords)

    facts = {"convolutions": len(recorder.calls), "gigabytes": recorder.bytes / 1e9}
    return Workload(work, dict, ready.precision(), "neck", images=inputs.batch, facts=facts)


def alone_name(model: str) -> str:
    """What the convolutions of a model's pyramid are called in a report."""
    return f"convolutions of {model} alone"


def add_convolutions(
    section: Section, models: Mapping[str, BenchmarkModel], inputs: Inputs
) -> None:
    """Let each pyramid's convolutions alone run beside it, in the section of necks."""
    if section.name != "neck":
        return
    for name, model in models.items():
        alone = alone_name(name)
        section.workloads[alone] = convolutions_workload(model, inputs)
        section.pairs.append(Pair(name, alone, compared=False))


# of the square matrices, and megabytes of the block that is copied
_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}
_MEGABYTES = {"cpu": 256, "cuda": 4096}


def ceilings(device: str, sizes: Sequence[int] = (), megabytes: int = 0) -> dict[str, float]:
    """The rates that no program on this machine exceeds by much: the best sample of each.

    The numbers are random: of equal ones a GPU draws less power, and so computes faster. In float32
    a GPU computes products as its convolutions do, in TF32 where torch lets them.

    Args:
        sizes: of the square matrices; the fastest counts.
        megabytes: of the block that is copied; more than the caches hold.

    Returns:
        "float32_gflops", "bfloat16_gflops" and on a GPU "float16_gflops", counting a multiplication
        and its addition as one operation as fvcore does, and "copy_gbytes": gigabytes read and
        written each second.
    """
    rates = {}
    for dtype in (torch.float32, torch.bfloat16, *([torch.float16] * (device == "cuda"))):
        products = []
        for size in sizes or _SIZES[device]:
            a = torch.randn(size, size, device=device).to(dtype)
            with _matrices_as_convolutions():
                seconds = _best("torch.mm(a, a, out=b)", a=a, b=torch.empty_like(a))
            products.append(size**3 / seconds / 1e9)
        rates[f"{str(dtype).removeprefix('torch.')}_gflops"] = max(products)
    a = torch.randn((megabytes or _MEGABYTES[device]) * 2**20 // 4, device=device)
    seconds = _best("b.copy_(a)", a=a, b=torch.empty_like(a))
    rates["copy_gbytes"] = 2 * a.numel() * 4 / seconds / 1e9
    return rates


@contextlib.contextmanager
def _matrices_as_convolutions() -> Iterator[None]:
    matrices = torch.backends.cuda.matmul
    before, matrices.allow_tf32 = matrices.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        matrices.allow_tf32 = before


def _best(statement: str, **tensors: Tensor) -> float:
    names = {"torch": torch, **tensors}
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.5).times)


def add_floors(report: dict[str, Any], rates: Mapping[str, float]) -> None:
    """Add the machine's rates to a report, and to the times of necks and backbones what they are to
    be judged by.

    "floor_seconds" is the least that the counted operations can take; "gflops" are those of each
    second. "gbytes" are what a pyramid's convolutions read and write, by its own seconds.
    """
    report["machine"].update(rates)
    batch = report["settings"]["batch"]
    for section in ("neck", "backbone"):
        times = report["timings"].get(section, {}).get("times", {})
        for name, row in times.items():
            rate = rates.get(f"{row['precision']}_gflops")
            if rate and name in report["counts"]:
                gflops = report["counts"][name][f"{section}_gflops"] * batch
                row.update(
                    floor_seconds=gflops / rate, gflops=gflops / row["seconds"], ceiling=rate
                )
                if alone := times.get(alone_name(name)):
                    row["gbytes"] = alone["gigabytes"] / row["seconds"]


def floors_table(report: Mapping[str, Any]) -> Table:
    """Times beside their floors."""
    copy = report["machine"].get("copy_gbytes")
    rows = [
        [
            name,
            section,
            row["precision"],
            milliseconds(row["seconds"]),
            milliseconds(row["floor_seconds"]),
            f"{row['seconds'] / row['floor_seconds']:.2f}",
            f"{2 * row['gflops'] / 1000:.3g} of {2 * row['ceiling'] / 1000:.3g}",
            f"{row['gbytes']:.3g} of {copy:.3g}" if "gbytes" in row else "",
        ]
        for section, data in report["timings"].items()
        for name, row in data["times"].items()
        if "floor_seconds" in row
    ]
    header = ["", "of", "type", "ms", "floor, ms", "times the floor", "TFLOP/s", "GB/s"]
    note = (
        "The floor: its operations at the rate of a large matrix product of that type, which"
        " follows `of`. GB/s: what its convolutions alone read and write, each once; a copy's rate"
        " follows."
    )
    return Table("Floors", header, rows, note)
