"""The floors under a pyramid's time: its convolutions alone, and its operations at the rate that the
machine reaches in a large matrix product."""

from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence

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

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _CONVOLUTIONS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


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

    facts = {"convolutions": len(recorder.calls)}
    return Workload(work, dict, ready.precision(), "neck", images=inputs.batch, facts=facts)


def add_convolutions(
    section: Section, models: Mapping[str, BenchmarkModel], inputs: Inputs
) -> None:
    """Let each pyramid's convolutions alone run beside it, in the section of necks."""
    if section.name != "neck":
        return
    for name, model in models.items():
        alone = f"convolutions of {name} alone"
        section.workloads[alone] = convolutions_workload(model, inputs)
        section.pairs.append(Pair(name, alone, compared=False))


def ceilings(
    device: str, sizes: Sequence[int] = (1024, 2048), megabytes: int = 256
) -> dict[str, float]:
    """The rates that no program on this machine exceeds by much: the best sample of each.

    Args:
        sizes: of the square matrices; the fastest counts.
        megabytes: of the block that is copied; more than the caches hold.

    Returns:
        "float32_gflops" and "bfloat16_gflops", counting a multiplication and its addition as one
        operation as fvcore does, and "copy_gbytes": gigabytes read and written each second.
    """
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        products = []
        for size in sizes:
            a = torch.ones(size, size, dtype=dtype, device=device)
            seconds = _best("torch.mm(a, a, out=b)", a=a, b=torch.empty_like(a))
            products.append(size**3 / seconds / 1e9)
        rates[f"{str(dtype).removeprefix('torch.')}_gflops"] = max(products)
    a = torch.ones(megabytes * 2**20 // 4, device=device)
    seconds = _best("b.copy_(a)", a=a, b=torch.empty_like(a))
    rates["copy_gbytes"] = 2 * a.numel() * 4 / seconds / 1e9
    return rates


def _best(statement: str, **tensors: Tensor) -> float:
    names = {"torch": torch, **tensors}
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.5).times)


def add_floors(report: dict[str, Any], rates: Mapping[str, float]) -> None:
    """Add the machine's rates to a report, and "floor_seconds" to the times of necks and backbones:
    the least that their counted operations can take."""
    report["machine"].update(rates)
    batch = report["settings"]["batch"]
    for section in ("neck", "backbone"):
        for name, row in report["timings"].get(section, {}).get("times", {}).items():
            rate = rates.get(f"{row['precision']}_gflops")
            if rate and name in report["counts"]:
                gflops = report["counts"][name][f"{section}_gflops"]
                row["floor_seconds"] = gflops * batch / rate


def floors_table(report: Mapping[str, Any]) -> Table:
    """Times beside their floors."""
    rows = [
        [
            name,
            section,
            row["precision"],
            milliseconds(row["seconds"]),
            milliseconds(row["floor_seconds"]),
            f"{row['seconds'] / row['floor_seconds']:.2f}",
        ]
        for section, data in report["timings"].items()
        for name, row in data["times"].items()
        if "floor_seconds" in row
    ]
    note = "The floor: its operations at the rate of a large matrix product of that type."
    return Table("Floors", ["", "of", "type", "ms", "floor, ms", "times the floor"], rows, note)
