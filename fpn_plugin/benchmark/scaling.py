"""How long a training step takes on many processes: arithmetic, no measurement.

::

    ring(n, bytes) = 2 (n - 1) / n * bytes / B + 2 (n - 1) * L
    start[k] = max(ready[k], end[k - 1]);  end[k] = start[k] + ring(n, bucket[k])
    step = max(data, forward + max(backward, end[last]) + norms + update)

`ready[k]` is when the backward pass has the gradients of DistributedDataParallel's bucket `k`: the
parts of a detector in turn from its end, in a part evenly over its parameters. Seconds and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

MB = 1 << 20
FIRST_BUCKET, BUCKET = 1 * MB, 25 * MB  # torch's


@dataclass(frozen=True)
class Part:
    """A part of a detector.

    Attributes:
        parameters: those that are trained.
        forward: seconds for the images of a process.
        backward: likewise.
        sync_norms: its SyncBN layers, which wait for all processes in both directions.
    """

    parameters: int
    forward: float
    backward: float
    sync_norms: int = 0


@dataclass(frozen=True)
class Network:
    """What joins the processes.

    Attributes:
        bandwidth: bytes per second on the slowest link of a ring within a host.
        latency: seconds of a message there.
        between: bytes per second of a host's link to the next; every ring crosses it.
        latency_between: seconds of a message there.
        per_host: processes of a host.
    """

    bandwidth: float
    latency: float
    between: float
    latency_between: float
    per_host: int = 8

    def all_reduce(self, processes: int, size: float) -> float:
        """Seconds of a ring of so many processes."""
        if processes == 1:
            return 0.0
        hosts = -(-processes // self.per_host)
        bandwidth = self.bandwidth if hosts == 1 else min(self.bandwidth, self.between)
        crossing = hosts if hosts > 1 else 0
        latency = (crossing * self.latency_between + (processes - crossing) * self.latency) / (
            processes
        )
        around = 2 * (processes - 1)
        return around / processes * size / bandwidth + around * latency


@dataclass(frozen=True)
class Step:
    """The time of a training step.

    Attributes:
        compute: forward, backward and update.
        exposed: of the gradients' exchange, what the backward pass does not hide.
        norms: the waits of SyncBN.
        data: what loading takes longer than all of that.
    """

    compute: float
    exposed: float
    norms: float
    data: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.norms + self.data


def buckets(
    parts: Sequence[Part], size: int = BUCKET, bytes_each: int = 4
) -> list[tuple[int, float]]:
    """The bytes of each bucket and when the backward pass has filled it.

    Args:
        parts: from the image to the losses; gradients come the other way.
        bytes_each: of a gradient: 2 where it is sent in half precision.
    """
    made: list[tuple[int, float]] = []
    limit, filled, clock = FIRST_BUCKET // 4, 0, 0.0  # in gradients: of float32
    for part in reversed(parts):
        left = part.parameters
        while left:
            taken = min(left, limit - filled)
            filled, left = filled + taken, left - taken
            if filled == limit:
                done = 1 - left / part.parameters
                made.append((filled * bytes_each, clock + done * part.backward))
                limit, filled = size // 4, 0
        clock += part.backward
    if filled:
        made.append((filled * bytes_each, clock))
    return made


def step_time(
    parts: Sequence[Part],
    processes: int,
    network: Network,
    update: float = 0.0,
    data: float = 0.0,
    bucket: int = BUCKET,
    bytes_each: int = 4,
    steps: int = 1,
    overlaps: bool = True,
) -> Step:
    """The time of an optimizer's step.

    Args:
        parts: from the image to the losses.
        update: seconds of the optimizer.
        data: seconds in which the workers of a process load its images.
        bucket: bytes of float32 gradients that are sent at once.
        bytes_each: of a gradient that is sent.
        steps: forward and backward passes before the gradients are exchanged.
        overlaps: whether the exchange goes on beside the backward pass, which costs that nothing.
    """
    forward = sum(part.forward for part in parts)
    backward = sum(part.backward for part in parts)
    end = 0.0
    if processes > 1:
        for size, ready in buckets(parts, bucket, bytes_each):
            end = max(ready if overlaps else backward, end) + network.all_reduce(processes, size)
    compute = steps * (forward + backward) + update
    waits = 2 * steps * sum(part.sync_norms for part in parts)  # forward and backward
    norms = waits * network.all_reduce(processes, 2 * 256 * 4)  # sums of 256 channels
    exposed = max(0.0, end - backward)
    return Step(compute, exposed, norms, max(0.0, steps * data - compute - exposed - norms))


def last_efficient(times: dict[int, Step], least: float = 0.8) -> int:
    """The largest number of processes, of those in `times`, up to which a process does at least
    that share of what one alone does."""
    alone, last = times[min(times)].seconds, min(times)
    for processes in sorted(times):
        if alone / times[processes].seconds < least:
            break
        last = processes
    return last
