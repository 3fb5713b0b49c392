"""The text, tables and figure of docs/scaling.md, which docs/write_scaling.py writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, Mapping

import write_scaling as figures

from fpn_plugin.benchmark.scaling import MB, Network, Part, last_efficient, step_time
from fpn_plugin.report.tables import Table

HEAD = """\
# Scaling: on paper, past these machines

<!-- Written by `python docs/write_scaling.py`: edit docs/scaling_page.py and docs/data. -->

How long a training step takes on 1 to 512 GPUs, by arithmetic. **Nothing on this page was measured
on a GPU or on a cluster.** A formula, its inputs, what it says of each pyramid, and how far it was
off where it could be checked: on one and two processes of a CPU.

```
python docs/write_scaling.py --print --seconds 0.12 --between 25e9    # for a cluster of yours
```

`--seconds` is what a step of Mask R-CNN R50-FPN with two images takes on one of your GPUs
(`fpn benchmark --what train`), `--between` the bytes per second from host to host.

```text
ring(n, bytes) = 2 (n - 1) / n * bytes / B + 2 (n - 1) * L
start[k] = max(ready[k], end[k - 1]);  end[k] = start[k] + ring(n, bucket[k])
step = max(data, forward + max(backward, end[last]) + norms + update)
```

- `bucket[k]`: gradients of float32, in DistributedDataParallel's buckets (the first of 1 MiB, then
  25 MiB), from the heads to the network; `ready[k]`: when the backward pass has them.
- `B`, `L`: bytes per second of the slowest link of the ring, and seconds of a message.
- `norms`: each SyncBN waits twice a step for all processes. Nothing hides that.
- compute: multiply-accumulates (three forward passes' worth) at one rate: the rate at which
  Detectron2's zoo gives Mask R-CNN R50-FPN 0.261 s, on 8 V100 with two images each. That includes
  the exchange within the host and loading, which the model takes to be hidden.
"""
ASSUMED = """\
Assumed, not measured: 8 GPUs on a host, 130 GB/s and 5 µs between them; between hosts 12.5 GB/s and
10 µs (InfiniBand, 100 Gb/s for a host) or 1.25 GB/s and 50 µs (Ethernet, 10 Gb/s). Float32, two
images of 800 x 1344 pixels on each GPU: the total batch grows with the GPUs. A ring; NCCL takes a
tree for small messages between many hosts, whose latency grows with the logarithm of `n`: what the
table says of latency (SyncBN above all) is a worst case.
**Operations are not time**: depthwise convolutions, deformable sampling and attention run far below
the rate of `fpn`'s convolutions ([catalogue.md](catalogue.md) has CPU times). Such a pyramid's step
is longer than here, and its exchange better hidden: its share is an upper bound.
"""
WHAT_TO_DO = {
    "the bytes: the share falls from one host to two, and hardly after that": "more images on a"
    " GPU; accumulation (`SOLVER.ACCUMULATE`); gradients in half precision (`SOLVER.DDP.COMPRESS`);"
    " a faster link",
    "latency: the share falls with each doubling": "NCCL's tree, its own choice for small messages;"
    " more images on a GPU. Larger buckets (`SOLVER.DDP.BUCKET_MB`) are fewer messages, but less is"
    " hidden: see the table above",
    "SyncBN: its column is not empty": "`MODEL.FPN.NORM GN`, which waits for nobody, or `FrozenBN`",
    "loading": "more workers: a process needs images x seconds for one / seconds of a step",
    "the batch": "two images on each of 512 GPUs are a batch of 1024. `SOLVER.REFERENCE_WORLD_SIZE`"
    " scales batch and rate together, by a rule that ends to hold somewhere; no such training was"
    " tried here",
}


def table(data: Mapping[str, Any], rate: float, networks: Mapping[str, Network]) -> Table:
    """One row per network and neck: bytes, the step, and the share of a GPU's work at 8 to 512."""
    header = ["network", "neck", "gradients", "SyncBN", "1 GPU"]
    for name in networks:
        header += [f"{name}: 16", "64", "512", "80% up to"]
    rows = []
    for network, counted in data.items():
        for neck, cost in counted["necks"].items():
            if "reason" in cost:
                continue
            parts = figures.parts_of(data, network, neck, rate)
            size = 4 * sum(part.parameters for part in parts)
            row = [network, f"`{neck}`", f"{size / 1e6:.0f} MB", str(cost["sync_norms"] or "")]
            for i, cluster in enumerate(networks.values()):
                times = figures.curve(parts, cluster)
                if i == 0:
                    row.append(f"{1000 * times[1].seconds:.0f} ms")
                row += [f"{100 * times[1].seconds / times[n].seconds:.0f}%" for n in (16, 64, 512)]
                row.append(str(last_efficient(times)))
            rows.append(row)
    return Table("", header, rows, left=2)


def page(data: Mapping[str, Any]) -> str:
    rate = figures.rate_of(data, figures.ZOO_SECONDS)
    sections = [
        HEAD,
        "## What it says",
        "![The share of a GPU's work over the number of GPUs](images/scaling.svg)",
        "In per cent: what each of so many GPUs does of what one alone does. *80% up to*: the"
        " largest number of GPUs (a power of two, up to 512) until which it is 80%.",
        table(data, rate, figures.NETWORKS).text("github"),
        missing_text(data),
        ASSUMED,
        levers_text(data, rate),
        "## What to change",
        Table("", ["what stops it", "what to do"], list(WHAT_TO_DO.items()), left=2).text("github"),
        *check_section(data),
        *annotations_section(),
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def missing_text(data: Mapping[str, Any]) -> str:
    lines = []
    for network, counted in data.items():
        names = [f"`{name}`" for name, cost in counted["necks"].items() if "reason" in cost]
        if names:
            lines.append(
                f"{network} has no row for {', '.join(names)}: it does not give the maps that"
                " their files read."
            )
    lines.append(
        "Where a file reads several maps but ViT-B gives one, of stride 16, its pyramid has fewer"
        " levels than with the others; the heads are counted as on five maps everywhere. What a ViT"
        " is used with are `simple`, `feature2pyramid` and `projector`."
    )
    return "\n".join(lines)


def levers_text(data: Mapping[str, Any], rate: float) -> str:
    """What each lever does to R50 with `fpn` and `bifpn` on the slow network, 64 GPUs."""
    cluster = figures.NETWORKS["Ethernet, 10 Gb/s"]
    options: dict[str, dict[str, Any]] = {
        "as it is": {},
        "half precision sent": {"bytes_each": 2},
        "buckets of 100 MiB": {"bucket": 100 * MB},
        "four passes a step (accumulation)": {"steps": 4},
        "nothing hidden by the backward pass": {"overlaps": False},
    }
    necks, many = ("fpn", "bifpn", "nas_fpn"), (64, 512)
    rows = []
    for what, option in [*options.items(), ("without SyncBN", {})]:
        row = [what]
        for neck in necks:
            parts = figures.parts_of(data, "R50", neck, rate)
            if what == "without SyncBN":
                parts = [replace(part, sync_norms=0) for part in parts]
            row += [_share(parts, cluster, option, n) for n in many]
        rows.append(row)
    header = ["R50, Ethernet", *(f"`{neck}`, {n} GPUs" for neck in necks for n in many)]
    return Table("", header, rows).text("github")


def _share(parts: list[Part], cluster: Network, options: Mapping[str, Any], n: int) -> str:
    alone, many = (step_time(parts, each, cluster, **options).seconds for each in (1, n))
    return f"{100 * alone / many:.0f}%"


def check_section(data: Mapping[str, Any]) -> Iterator[str]:
    """The model beside the measurement of two processes."""
    yield "## Checked: one and two processes"
    if not figures.MEASURED.is_file():
        yield "Not measured yet."
        return
    found = json.loads(figures.MEASURED.read_text())
    rows, added = [], []
    for size, steps in found["sizes"].items():
        alone, pair = steps["1"]["alone"], steps["2"]
        silent, hidden, shown = modelled(data, pair)
        measured = pair["exchange"]["whole"] - pair["alone"]["whole"]
        rows.append(
            [size, *map(_span, (alone, pair["alone"], pair["exchange"]))]
            + [f"{seconds:.2f}" for seconds in (hidden, shown)]
        )
        added.append(
            f"{1000 * measured:.0f} ms at {size} pixels ({1000 * (hidden - silent):.0f} and"
            f" {1000 * (shown - silent):.0f} by the model)"
        )
    gloo = _gloo(pair)
    header = ["pixels", "one process", "two, no exchange", "two, exchange"]
    header += ["by the model: hidden", "not hidden"]
    yield (
        "Mask R-CNN R50-FPN, one square image for each process of one thread, gloo on two cores of"
        f" one CPU: seconds of a step, median (least … most) of {found['rounds']}, {found['date']}."
        f" {100 * found['free']:.0f}% of the two cores were free when it began. The model is given"
        " the phases of the two processes' own steps without exchange, which take turns with those"
        " with it, and gloo's own speed:"
        f" {1e-9 * gloo.bandwidth:.2f} GB/s and {1e6 * gloo.latency:.0f} µs a message."
    )
    yield Table("", header, rows).text("github")
    yield (
        f"**What this shows:** the exchange adds {' and '.join(added)}. On a CPU, gloo adds"
        " gradients up on the cores of the backward pass, so nothing is hidden: the time of the"
        " exchange itself is about what the ring says, and the overlap, which GPUs have copy"
        " engines and streams for, is not confirmed by this. The table above has a row without it."
        " Two processes say nothing of how time grows with 512, and GPUs were not at hand."
    )


def modelled(data: Mapping[str, Any], pair: Mapping[str, Any]) -> tuple[float, float, float]:
    """Seconds of a step of two processes by the model: without exchange, with it beside the
    backward pass, and with it after that."""
    forward, backward, update = (pair["alone"][key] for key in ("forward", "backward", "update"))
    counted = data["R50"]
    costs = (counted, counted["necks"]["fpn"], counted["heads"])
    total = sum(cost["flops"] for cost in costs)
    parts = [
        Part(c["parameters"], forward * c["flops"] / total, backward * c["flops"] / total)
        for c in costs
    ]
    cases = ((1, True), (2, True), (2, False))
    steps = (step_time(parts, n, _gloo(pair), update, overlaps=each) for n, each in cases)
    return tuple(step.seconds for step in steps)


def _gloo(pair: Mapping[str, Any]) -> Network:
    sizes = sorted((int(size), seconds) for size, seconds in pair["all_reduce"].items())
    latency = sizes[0][1] / 2  # two messages
    bandwidth = sizes[-1][0] / (sizes[-1][1] - sizes[0][1])
    return Network(bandwidth, latency, bandwidth, latency, 2)


def _span(times: Mapping[str, Any]) -> str:
    low, high = times["range"]
    return f"{times['whole']:.2f} ({low:.2f} … {high:.2f})"


def annotations_section() -> Iterator[str]:
    """The memory of the annotation list."""
    yield "## The annotation list"
    if not figures.ANNOTATIONS.is_file():
        yield "Not measured yet: `python docs/measure_annotations.py --folder FOLDER`."
        return
    found = json.loads(figures.ANNOTATIONS.read_text())
    rows = [
        [
            f"{load['images']:,}",
            f"{load['boxes']:,}",
            f"{load['json']:.2f} GB",
            f"{load['peak'] - load['before']:.2f} GB",
            f"{load['serialised']:.2f} GB",
        ]
        for load in found["loads"]
    ]
    largest, smallest = found["loads"][-1], found["loads"][0]
    grown = [load["peak"] - load["before"] for load in (smallest, largest)]
    slope = (grown[1] - grown[0]) / (largest["boxes"] - smallest["boxes"])
    whole = grown[1] + slope * (found["boxes"] - largest["boxes"])
    own, shared = found["detectron2"], found["shared"]
    yield (
        f"Objects365 has {found['images'] / 1e6:.1f} million training images; the synthetic JSON of"
        f" that many has {found['boxes']:,} boxes and {found['json']:.1f} GB. Reading it as"
        " Detectron2 does (pycocotools, then dataset dicts, then its serialised list) was measured"
        " on parts, as the whole does not fit into this machine's memory:"
    )
    header = ["images", "boxes", "JSON", "peak of reading", "serialised list"]
    yield Table("", header, rows, left=0).text("github")
    yield (
        f"The line through them gives **about {whole:.0f} GB for the whole**, while it is read"
        f" (extrapolated). The serialised list was made at full size, in a stream:"
        f" **{own['serialised']:.2f} GB**."
    )
    yield Table(
        "", ["GB, full size", "resident", "its share", "its alone"], list(_processes(own))
    ).text("github")
    yield (
        "(More is resident than that list: what it took to make it was not all given back.) With"
        " Detectron2's list, a process and the workers that it forks share it. Each rank would"
        f" have one of its own: 8 ranks on a host {8 * own['serialised']:.0f} GB, and"
        f" {8 * whole:.0f} GB while all read. So the plugin reads once on a host"
        " (`fpn_plugin/data/shared_records.py`): its first process writes the records to a file of"
        " the temporary folder, all map it, and it is removed. Two ranks with their workers:"
    )
    yield Table(
        "", ["GB, full size", "resident", "its share", "its alone"], list(_processes(shared))
    ).text("github")
    total = sum(each["share"] for each in shared["processes"].values())
    yield (
        f"All together {total:.2f} GB, of which PyTorch and the code are a part. The host still"
        f" needs the memory to read the JSON once: {whole:.0f} GB, in its first process. Where that"
        " is too much, register a stream (an `IterableDataset`), which a resumed run starts over."
    )


def _processes(found: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, each in found["processes"].items():
        yield [name, *(f"{each[key]:.2f}" for key in ("resident", "share", "alone"))]


def draw(data: Mapping[str, Any], path: Path) -> None:
    """The share of a GPU's work over the number of GPUs, for R50 and both networks."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.ticker import ScalarFormatter

    from fpn_plugin.report.figures import COLOURS, new_figure, page_style

    rate = figures.rate_of(data, figures.ZOO_SECONDS)
    with page_style():
        figure, axes = new_figure(3.4)
        for colour, (network, neck) in zip(
            COLOURS,
            (("R50", "fpn"), ("R50", "bifpn"), ("R50", "nas_fpn"), ("ViT-B", "simple")),
        ):
            parts = figures.parts_of(data, network, neck, rate)
            for style, cluster in zip(("-", "--"), figures.NETWORKS.values()):
                times = figures.curve(parts, cluster)
                shares = [100 * times[1].seconds / times[n].seconds for n in figures.PROCESSES]
                label = f"{network} {neck}" if style == "-" else None
                axes.plot(figures.PROCESSES, shares, style, color=colour, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(figures.PROCESSES)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylim(0, 105)
        axes.set_xlabel("GPUs (solid: InfiniBand, dashed: Ethernet of 10 Gb/s)")
        axes.set_ylabel("% of one GPU's work, each")
        axes.legend(frameon=False, loc="lower left")
        FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None})
