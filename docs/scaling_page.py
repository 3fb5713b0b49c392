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
python docs/write_scaling.py --print --seconds 0.12 --between 25e9    # the table for a cluster of yours
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
10 µs (InfiniBand, 100 Gb/s for a host) or 1.25 GB/s and 50 µs (Ethernet, 10 Gb/s). Float32, two images of
800 x 1344 pixels on each GPU: the total batch grows with the GPUs. A ring; NCCL takes a tree for
small messages between many hosts, whose latency grows with the logarithm of `n`: what the table
says of latency (SyncBN above all) is a worst case.
**Operations are not time**: depthwise convolutions, deformable sampling and attention run far below
the rate of `fpn`'s convolutions ([catalogue.md](catalogue.md) has CPU times). Such a pyramid's step
is longer than here, and its exchange better hidden: its share is an upper bound.
"""
CHANGE = """\
## What to change

| what stops it | what to do |
|---|---|
| the bytes (the share falls between the first two hosts and then stays) | more images on a GPU; gradient accumulation; gradients sent in half precision; a faster link. Half the bytes are in the heads' first linear layer and the network's last stage: fewer channels of the pyramid count twice |
| latency (the share falls with each doubling) | larger buckets: fewer messages; NCCL's tree (its default between many hosts); more images on a GPU |
| SyncBN (the column of layers) | `MODEL.FPN.NORM GN`, which waits for nobody; or `FrozenBN` |
| loading | more workers; a process needs `images * seconds per image / step` of them |
| the batch | a schedule holds for a batch: `SOLVER.REFERENCE_WORLD_SIZE` scales batch and rate together, which the literature supports for COCO up to batches of some hundreds with a long warm-up, not for 1024 |
"""


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
        CHANGE,
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
    return "\n".join(lines)


def levers_text(data: Mapping[str, Any], rate: float) -> str:
    """What each lever does to R50 with `fpn` and `bifpn` on the slow network, 64 GPUs."""
    cluster = figures.NETWORKS["Ethernet, 10 Gb/s"]
    options: dict[str, dict[str, Any]] = {
        "as it is": {},
        "half precision sent": {"bytes_each": 2},
        "buckets of 100 MiB": {"bucket": 100 * MB},
        "four passes a step (accumulation)": {"steps": 4},
    }
    rows = []
    for what, option in options.items():
        row = [what]
        for neck in ("fpn", "bifpn", "nas_fpn"):
            row.append(_share(figures.parts_of(data, "R50", neck, rate), cluster, option))
        rows.append(row)
    row = ["without SyncBN"]
    for neck in ("fpn", "bifpn", "nas_fpn"):
        parts = figures.parts_of(data, "R50", neck, rate)
        row.append(_share([replace(part, sync_norms=0) for part in parts], cluster, {}))
    rows.append(row)
    made = Table("", ["R50, Ethernet, 64 GPUs", "`fpn`", "`bifpn`", "`nas_fpn`"], rows)
    return made.text("github")


def _share(parts: list[Part], cluster: Network, options: Mapping[str, Any]) -> str:
    alone, many = (step_time(parts, n, cluster, **options).seconds for n in (1, 64))
    return f"{100 * alone / many:.0f}%"


def check_section(data: Mapping[str, Any]) -> Iterator[str]:
    """The model beside the measurement of two processes."""
    yield "## Checked: one and two processes"
    if not figures.MEASURED.is_file():
        yield "Not measured yet."
        return
    found = json.loads(figures.MEASURED.read_text())
    alone, pair = found["1"]["alone"], found["2"]
    sizes = sorted((int(size), seconds) for size, seconds in pair["all_reduce"].items())
    latency = sizes[0][1] / 2  # two messages
    bandwidth = sizes[-1][0] / (sizes[-1][1] - sizes[0][1])
    gloo = Network(bandwidth, latency, bandwidth, latency, 2)
    forward, backward, update = (pair["alone"][key] for key in ("forward", "backward", "update"))
    counted = data["R50"]
    costs = (counted, counted["necks"]["fpn"], counted["heads"])
    total = sum(cost["flops"] for cost in costs)
    parts = [
        Part(c["parameters"], forward * c["flops"] / total, backward * c["flops"] / total)
        for c in costs
    ]
    modelled = step_time(parts, 2, gloo, update=update).seconds
    measured = pair["exchange"]["whole"]
    rows = []
    for what, seconds, spread in (
        ("one process", alone["whole"], alone["range"]),
        ("two, without exchange", pair["alone"]["whole"], pair["alone"]["range"]),
        ("two, with exchange", measured, pair["exchange"]["range"]),
        ("two, with exchange, by the model", modelled, None),
    ):
        rows.append(
            [what, f"{seconds:.2f} s", f"{spread[0]:.2f} … {spread[1]:.2f}" if spread else ""]
        )
    yield (
        f"Mask R-CNN R50-FPN, one image of {found['size']} x {found['size']} pixels for each"
        f" process of one thread, gloo on two cores of one CPU, medians of {found['rounds']} steps,"
        f" {found['date']}. Of the two cores {100 * found['free']:.0f}% were free when it began:"
        " other work ran beside it, and times of different runs are not comparable. So the model"
        " is given the steps without exchange of the same two processes, taken in turns with those"
        " with it, and says what the exchange adds."
    )
    yield Table("", ["", "step", "least … most"], rows).text("github")
    yield (
        f"gloo's exchange: {1e-9 * bandwidth:.2f} GB/s and {1e6 * latency:.0f} µs a message. The"
        f" model is off by {100 * (modelled / measured - 1):+.0f}%. It lets communication run"
        " beside the backward pass for nothing; on a CPU gloo copies and adds on the same cores,"
        " so that a model which is too fast here is expected. On a GPU other units do that."
        " With two processes it says little of 512."
    )


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
        "With Detectron2's list, a process and the workers that it forks share it. Each rank would"
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
        f" needs the memory to read the JSON once: {whole:.0f} GB. Where that is too much, register"
        " a dataset function of several smaller JSONs (`DATASETS.TRAIN` takes several names, but"
        " holds all of their records until they are serialised), or a stream (an `IterableDataset`),"
        " which is not resumable at an iteration."
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
