"""What the processes of a run tell each other before it starts, and how they must agree: hosts that
differ would train something that is neither's, or wait for each other for ever."""

from __future__ import annotations

import dataclasses
import json
import time
import zlib
from typing import Any, Callable, Mapping, Sequence

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from omegaconf import DictConfig

from fpn_plugin.checkpoint.record import plain_config
from fpn_plugin.checkpoint.run_folder import OUTER_KEYS, flatten
from fpn_plugin.engine.place import DETECTRON2, SRUN, TORCHRUN, Place, host_name
from fpn_plugin.version import __version__

# seconds by which clocks may differ: far more than NTP leaves
CLOCK_TOLERANCE = 60.0
_SHOWN = 3  # keys in a message
# where a host may differ, or takes what rank 0 has
_FREE = (
    *OUTER_KEYS,
    *("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT"),
    *("train.output_dir", "train.device", "train.imports"),
)
# flags that say how many processes a host runs, by launcher
_COUNTS = {TORCHRUN: "--nproc-per-node", SRUN: "--ntasks-per-node", DETECTRON2: "--num-gpus"}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a process says of itself.

    Attributes:
        host: its name.
        place: its place, as a tuple.
        versions: of what computes, by name.
        device: the type of the model's: "cuda" or "cpu".
        gpus: how many it sees.
        gpu: an identifier of its own; "" for none.
        settings: the values of its config by their full keys.
        ahead: seconds by which its clock is ahead of rank 0's.
    """

    host: str
    place: Place
    versions: Mapping[str, str]
    device: str
    gpus: int
    gpu: str
    settings: Mapping[str, Any]
    ahead: float = 0.0

    @classmethod
    def of_this_process(cls, place: Place, device: str, settings: Mapping[str, Any]) -> Report:
        """The report of this process."""
        index = gpu_index(place)
        gpu = "" if index is None else str(_identifier(index))
        gpus, kind = torch.cuda.device_count(), torch.device(device).type
        return cls(host_name(), place, _versions(), kind, gpus, gpu, settings)

    def with_clock(self, clock: float, before: float, after: float) -> Report:
        """The report with what its process's clock was.

        Args:
            clock: in seconds since 1970.
            before: the clock of rank 0 when it asked.
            after: and when it had the answer.
        """
        return dataclasses.replace(self, ahead=clock - min(max(clock, before), after))

    def dump(self) -> bytes:
        """The report as bytes."""
        return zlib.compress(json.dumps(dataclasses.asdict(self)).encode())

    @classmethod
    def load(cls, content: bytes) -> Report:
        """The report that was dumped."""
        values = json.loads(zlib.decompress(content))
        return cls(**{**values, "place": Place(*values["place"])})

    def __str__(self) -> str:
        return f"host {self.host} (rank {self.place.rank})"


def gpu_index(place: Place) -> int | None:
    """The number of a process's own GPU; None if it sees none. A launcher may let each process see
    its own alone."""
    gpus = torch.cuda.device_count()
    if gpus == 1:
        return 0
    return place.local_rank if place.local_rank < gpus else None


def settings_of(cfg: CfgNode | DictConfig) -> dict[str, Any]:
    """What of a config all hosts must have alike, by full keys."""
    values = flatten(plain_config(cfg))
    return {key: value for key, value in values.items() if key not in _FREE}


def compare_machines(args: Any, cfg: CfgNode | DictConfig, device: str) -> None:
    """Compare what the processes of several `--num-machines` are about to do, once they have formed
    Detectron2's groups; those that another launcher has started have done so before.

    Args:
        args: of `fpn_plugin.engine.setup.argument_parser`.
        device: of the model.

    Raises:
        ValueError: in all processes, naming the first host that differs.
    """
    if getattr(args, "num_machines", 1) < 2:
        return
    ranks = comm.get_rank(), comm.get_world_size(), comm.get_local_rank(), comm.get_local_size()
    report = Report.of_this_process(Place(*ranks, DETECTRON2, "", 0), device, settings_of(cfg))
    comm.synchronize()
    told = comm.all_gather((report, time.time()))
    reports = [report.with_clock(clock, told[0][1], told[0][1]) for report, clock in told]
    if difference := find_difference(reports):
        raise ValueError(difference)


def find_difference(reports: Sequence[Report]) -> str:
    """The first thing in which processes differ that must not, as a message; "" if there is none.

    Args:
        reports: of all processes in the order of their ranks.
    """
    checks = (_versions_differ, _configs_differ, _places_differ, _gpus_differ, _clocks_differ)
    return next((message for check in checks if (message := check(reports))), "")


def _versions() -> dict[str, str]:
    return {
        "fpn_plugin": __version__,
        "torch": torch.__version__,
        "detectron2": str(detectron2.__version__),
    }


def _identifier(index: int) -> Any:
    """What tells a GPU from all others of its host."""
    properties = torch.cuda.get_device_properties(index)
    return getattr(properties, "uuid", index)  # older versions of torch have none


def _first_other(
    reports: Sequence[Report], differs: Callable[[Report], bool]
) -> tuple[Report, Report] | None:
    """The first process, and the first one that differs."""
    other = next((report for report in reports[1:] if differs(report)), None)
    return (reports[0], other) if other else None


def _versions_differ(reports: Sequence[Report]) -> str:
    pair = _first_other(reports, lambda other: other.versions != reports[0].versions)
    if pair is None:
        return ""
    first, other = pair
    names = [name for name, old in first.versions.items() if other.versions.get(name) != old]
    texts = [f"{name} {other.versions.get(name)}, not {first.versions[name]}" for name in names]
    return f"{other} has {'; '.join(texts)}, as {first} has: install the same versions on all hosts"


def _configs_differ(reports: Sequence[Report]) -> str:
    pair = _first_other(reports, lambda other: other.settings != reports[0].settings)
    if pair is None:
        return ""
    first, other = pair
    keys = first.settings.keys() | other.settings.keys()
    changed = sorted(k for k in keys if first.settings.get(k) != other.settings.get(k))
    texts = [
        f"{key} {other.settings.get(key)!r}, not {first.settings.get(key)!r}"
        for key in changed[:_SHOWN]
    ]
    more = f", and {len(changed) - _SHOWN} more keys" if len(changed) > _SHOWN else ""
    return (
        f"{other} has another config than {first}: {'; '.join(texts)}{more}: start the same command"
        " everywhere, with the same files of configs"
    )


def _places_differ(reports: Sequence[Report]) -> str:
    first, local = reports[0], reports[0].place.local_processes
    flag = _COUNTS[first.place.launcher]
    pair = _first_other(reports, lambda other: other.place.local_processes != local)
    if pair:
        return (
            f"{pair[1]} runs {pair[1].place.local_processes} processes, and {first} runs {local}:"
            f" all hosts need the same number ({flag})"
        )
    for report in reports:
        if report.place.rank % local != report.place.local_rank:
            return (
                f"{report} has the local rank {report.place.local_rank}, but ranks must count"
                " through one host after the other (srun --distribution=block)"
            )
    return ""


def _gpus_differ(reports: Sequence[Report]) -> str:
    lucky = next((report for report in reports if report.device == "cuda"), None)
    if lucky is None:
        return ""
    on_cpu = "or train on the CPU everywhere, with MODEL.DEVICE cpu (train.device=cpu)"
    owners: dict[tuple[str, str], Report] = {}
    for report in reports:
        number = report.place.local_rank
        if not report.gpus or report.device != "cuda":
            return (
                f"{report} sees no GPU, but {lucky} does: look there at CUDA_VISIBLE_DEVICES, the"
                f" driver (nvidia-smi) and what the job asks for (--gpus-per-node), {on_cpu}"
            )
        if not report.gpu:
            return (
                f"{report} has the local rank {number}, but sees {report.gpus} GPUs: start no more"
                f" than one process for each, {on_cpu}"
            )
        owner = owners.setdefault((report.host, report.gpu), report)
        if owner is not report:
            return (
                f"{report} sees the GPU of rank {owner.place.rank} alone: each process needs one of"
                f" its own (CUDA_VISIBLE_DEVICES, SLURM's --gpu-bind), {on_cpu}"
            )
    return ""


def _clocks_differ(reports: Sequence[Report]) -> str:
    pair = _first_other(reports, lambda other: abs(other.ahead) > CLOCK_TOLERANCE)
    if pair is None:
        return ""
    first, other = pair
    direction = "ahead of" if other.ahead > 0 else "behind"
    return (
        f"the clock of {other} is {abs(other.ahead):.0f} seconds {direction} that of {first}: set"
        f" both by NTP (timedatectl set-ntp true); {CLOCK_TOLERANCE:.0f} seconds are allowed"
    )
