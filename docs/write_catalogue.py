#!/usr/bin/env python3
"""Write docs/catalogue.md and its drawings from the registries, configs/pyramids and docs/data.

python docs/write_catalogue.py              the page and the drawings
python docs/write_catalogue.py --count      before that, count parameters and operations again
python docs/write_catalogue.py --measure    before that, time all pyramids, on an idle machine

A topology's text is its docstring: a first line "Title, Source.", sentences, and after "::" its
formula. Where a file of configs/pyramids has the name of no topology, it is a variant, and its text
is the comment that it begins with. An operator's is the first paragraph of its docstring.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, Mapping

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec

from fpn_plugin import add_fpn_config, resolve_config
from fpn_plugin.benchmark.catalogue import (
    REFERENCE,
    Entry,
    catalogue,
    count_costs,
    measure_latencies,
    preset_files,
)
from fpn_plugin.benchmark.timing import Plan
from fpn_plugin.config.files import merge_config_file
from fpn_plugin.config.settings import PyramidSettings
from fpn_plugin.modeling.recursion import RecursivePyramid
from fpn_plugin.paths import configs_dir
from fpn_plugin.pyramid.blocks import ACTIVATIONS, BLOCKS
from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resample import DOWNSAMPLE, UPSAMPLE
from fpn_plugin.pyramid.topologies import TOPOLOGIES
from fpn_plugin.registry import Registry
from fpn_plugin.report.environment import collect_environment, environment_warnings
from fpn_plugin.report.progress import Bar
from fpn_plugin.report.tables import Table
from fpn_plugin.visualize.complexity import count_parameters
from fpn_plugin.visualize.draw import draw_graph

DOCS = Path(__file__).resolve().parent
PAGE, DATA, PUBLISHED = DOCS / "catalogue.md", DOCS / "data", DOCS / "data" / "published_ap.csv"
COSTS, TIMES = DATA / "catalogue_costs.json", DATA / "catalogue_times.json"
DRAWINGS = DOCS / "images" / "pyramids"
CONFIG = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RECURSIVE = "COCO-InstanceSegmentation/mask_rcnn_R_50_RFP_1x.yaml"
SIZE = (800, 1344)
R50 = {f"res{i}": ShapeSpec(channels=128 << i - 1, stride=1 << i) for i in range(2, 6)}
ORDER = ("fpn", "pafpn", "pafpn_mmdet", "bifpn", "qufpn", "nas_fpn", "fpg", "hrfpn", "bfp", "asff")
ORDER += ("fapn", "freq", "hybrid", "hybrid_dfine", "hybrid_deimv2", "csp_pan", "csp_pan_rtmdet")
ORDER += ("csp_pan_yolov8", "csp_pan_ppyoloe", "repgfpn", "bifusion", "msdeform", "dyhead", "sepc")
ORDER += ("simple", "projector", "projector_rfdetr", "feature2pyramid", "channel_mapper")
OPERATORS: dict[str, tuple[str, Registry[Any]]] = {
    "Fusions": ("`MODEL.FPN.FUSE_TYPE`", FUSIONS),
    "Upsamplers": ("`MODEL.FPN.UPSAMPLE`", UPSAMPLE),
    "Downsamplers": ("`MODEL.FPN.DOWNSAMPLE`", DOWNSAMPLE),
    "Blocks": ("`MODEL.FPN.LATERAL` and `BLOCK`", BLOCKS),
}
HEAD = """\
# The catalogue

<!-- Written by `python docs/write_catalogue.py`: edit docstrings, configs/pyramids, docs/data. -->

Every pyramid that the plugin has: what it computes, what it costs, what is known of it. To put
one into a config of yours, of any head and any network:

```
fpn train --config-file mine_bifpn.yaml
fpn show --config-file mine.yaml --all --latency    # all of them on your network and image size
```

where `mine_bifpn.yaml` is two lines (names are looked for beside the file, then among this
plugin's configs, then in Detectron2's zoo):

```text
_BASE_: [mine.yaml, pyramids/bifpn.yaml]
OUTPUT_DIR: output/mine_bifpn
```

Such a file sets the wiring, fusion, blocks, norm and repeats of the paper, and lets the heads
read what the pyramid gives. The width, the network underneath, the maps that are read from it,
and anchors of your own stay. Every part is a key of its own ([config.md](config.md)); what to
take for what is in [choosing.md](choosing.md).

`C_l` is the bottom-up map of level `l`, of stride `2**l` pixels; `P_l` is an output; `up` and
`down` are `UPSAMPLE` and `DOWNSAMPLE`, `fuse` is `FUSE_TYPE`, `lateral` is `LATERAL` and `block`
is `BLOCK`; `3x3 s2` is a convolution of stride 2.
"""


@dataclass(frozen=True)
class Text:
    """What a topology's docstring says, or a variant's file.

    Attributes:
        title: its name in words.
        source: the paper, or whose code it is.
        sentences: in Markdown, one paragraph.
        formula: in lines; "" of a variant.
    """

    title: str
    source: str
    sentences: str
    formula: str


def names() -> list[str]:
    """The topologies of this plugin and the variants, those of the page's order first."""
    own = {name for name in TOPOLOGIES.names() if _is_ours(TOPOLOGIES.get(name))}
    every = sorted(own | set(preset_files()))
    return sorted(every, key=lambda name: (name not in ORDER, (*ORDER, name).index(name)))


def _is_ours(obj: Any) -> bool:
    return obj.__module__.split(".")[0] == "fpn_plugin"


def text_of(name: str, docstring: str | None = None) -> Text:
    """What a topology's docstring says, or the comment of a variant's file.

    Raises:
        ValueError: naming the topology and what its docstring lacks.
    """
    if docstring is None and name not in TOPOLOGIES:
        return _text_of_file(preset_files()[name])
    doc = inspect.cleandoc(docstring or TOPOLOGIES.get(name).__doc__ or "")
    first, _, rest = doc.partition("\n\n")
    title, comma, source = " ".join(first.split()).rstrip(".").partition(", ")
    sentences, colons, formula = rest.partition("\n\n::\n\n")
    formula = re.split(r"\n(?=\S)", formula)[0]  # the lines that are indented
    lacks = [
        what
        for what, is_there in (
            ("a first line 'Title, Source.'", comma and source),
            ("two sentences or more", len(re.findall(r"[.:] |\.$", sentences.strip())) > 1),
            ("a formula: indented lines after '::'", colons and formula.strip()),
        )
        if not is_there
    ]
    if lacks:
        raise ValueError(
            f"topology {name!r}: its docstring, which docs/catalogue.md is made of, lacks"
            f" {' and '.join(lacks)}; see `fpn` in fpn_plugin/pyramid/topologies/fpn.py"
        )
    return Text(title, source, " ".join(sentences.split()), inspect.cleandoc(formula))


def _text_of_file(path: Path) -> Text:
    """The comment that a file begins with: "Title, source", how to use it, and sentences."""
    lines = [line.lstrip("# ") for line in path.read_text().splitlines() if line[:1] == "#"]
    title, _, source = lines[0].partition(", ")
    return Text(title, source, " ".join(lines[2:]), "")


def entries_on(shapes: Mapping[str, ShapeSpec]) -> dict[str, Entry]:
    """The catalogue on a ResNet-50's maps, or others.

    Raises:
        ValueError: naming what cannot be built, or the file that a topology lacks.
    """
    cfg = get_cfg()
    add_fpn_config(cfg)
    merge_config_file(cfg, str(configs_dir() / CONFIG))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    entries = {entry.name: entry for entry in catalogue(resolve_config(cfg), shapes, SIZE)}
    for name in names():
        if name not in entries:
            raise ValueError(f"topology {name!r}: there is no file configs/pyramids/{name}.yaml")
    for entry in entries.values():
        if entry.reason:
            raise ValueError(f"configs/pyramids/{entry.name}.yaml: {entry.reason}")
    return {name: entries[name] for name in names()}


def changed_settings(settings: PyramidSettings | None) -> dict[str, Any]:
    """The settings that are not the plain FPN's, as JSON has them."""
    assert settings is not None
    default, values = (
        json.loads(json.dumps(each.as_keys())) for each in (PyramidSettings(), settings)
    )
    return {key: value for key, value in values.items() if value != default[key]}


def read_data(path: Path, entries: Mapping[str, Entry], option: str) -> dict[str, Any]:
    """Recorded numbers; times may lack a pyramid, which the page then says.

    Raises:
        ValueError: if they are of other pyramids than configs/pyramids has now, with the command.
    """
    data = json.loads(path.read_text()) if path.is_file() else {"entries": {}}
    for name, entry in entries.items():
        recorded = data["entries"].get(name, {}).get("settings")
        if recorded is None and option == "--measure":
            continue
        if recorded != changed_settings(entry.settings) and (
            data["entries"] or option == "--count"
        ):
            raise ValueError(
                f"{path.name}: {name!r} was {'never' if recorded is None else 'otherwise'} recorded"
                f" ({recorded}): run python docs/write_catalogue.py {option}"
            )
    return data


def write_data(
    path: Path, entries: Mapping[str, Entry], numbers: Mapping[str, Any], **more: Any
) -> None:
    """Record numbers by entry, with the settings that they are of."""
    recorded = {
        name: {**numbers[name], "settings": changed_settings(entry.settings)}
        for name, entry in entries.items()
    }
    path.write_text(json.dumps({**more, "entries": recorded}, indent=1) + "\n")


def count(entries: Mapping[str, Entry], bar: Bar) -> None:
    bar.begin("counting", len(entries))
    costs = count_costs(list(entries.values()), bar.step)
    numbers = {
        name: {"parameters": cost.parameters, "flops": round(cost.flops)}
        for name, cost in costs.items()
    }
    write_data(COSTS, entries, numbers, size=SIZE)
    bar.end()


def measure(entries: Mapping[str, Entry], size: tuple[int, int], rounds: int, bar: Bar) -> None:
    environment = collect_environment("cpu")
    for warning in environment_warnings(environment):
        bar.say(f"WARNING {warning}")
    environment.pop("commit")
    smaller = [replace(entry, maps=_scaled(entry, size)) for entry in entries.values()]
    bar.begin("rounds", rounds)
    plan = Plan(rounds, rounds, min_sample=0.0, warm_up=1)
    latencies = measure_latencies(smaller, plan, bar.step)
    numbers = {
        name: {
            "ms": round(1000 * each.seconds, 1),
            "relative": [round(x, 3) for x in each.relative],
        }
        for name, each in latencies.items()
    }
    write_data(TIMES, entries, numbers, size=size, rounds=rounds, environment=environment)
    bar.end()


def _scaled(entry: Entry, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The maps of an image of another size, padded as the pyramid needs."""
    assert entry.pyramid is not None and entry.maps is not None
    levels = entry.pyramid.graph.inputs
    step = max(entry.pyramid.graph.size_divisibility(), *(2**level for level in levels.values()), 1)
    height, width = (-(-side // step) * step for side in size)
    return {
        name: (*shape[:2], height // 2 ** levels[name], width // 2 ** levels[name])
        for name, shape in entry.maps.items()
    }


def draw(entries: Mapping[str, Entry], folder: Path) -> None:
    """One drawing per entry, of one repeat."""
    for name, entry in entries.items():
        assert entry.settings is not None and entry.pyramid is not None
        levels = entry.pyramid.graph.inputs
        settings = replace(entry.settings, repeats=1)
        channels = {each: R50[each].channels or 1 for each in levels}
        with torch.device("meta"):
            pyramid = Pyramid(settings.build_graph(dict(levels)), channels, settings.defaults())
        draw_graph(pyramid, folder / f"{name}.svg")


def page(entries: Mapping[str, Entry]) -> str:
    """The page."""
    costs = read_data(COSTS, entries, "--count")["entries"]
    times = read_data(TIMES, entries, "--measure")
    published = list(csv.DictReader(PUBLISHED.open()))
    configs = configs_of(entries)
    parts = [HEAD, "## At a glance", at_a_glance(entries, costs, times, configs)]
    parts.append("## The pyramids")
    for name, entry in entries.items():
        parts += pyramid_section(name, entry, costs[name], times, configs[name], published)
    parts += ["## Run again", *recursion_section()]
    for title, (keys, registry) in OPERATORS.items():
        parts += [f"## {title}", f"By {keys}.", operators_table(registry)]
    parts += ["## Norms and activations", norms_text(), "## Published results", published_text()]
    parts.append(published_table(published))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def at_a_glance(
    entries: Mapping[str, Entry],
    costs: Mapping[str, Any],
    times: Mapping[str, Any],
    configs: Mapping[str, list[Path]],
) -> str:
    header = [
        "pyramid",
        "parameters",
        "GFLOPs",
        "of `fpn`'s",
        "CPU",
        "time / `fpn`'s",
        "GPU",
        "config",
    ]
    rows = []
    for name in entries:
        flops, time = costs[name]["flops"], times["entries"].get(name)
        row = [f"[`{name}`](#{name})", f"{costs[name]['parameters']:,}", f"{flops / 1e9:.1f}"]
        row.append(f"{flops / costs[REFERENCE]['flops']:.2f}×")
        row += [f"{time['ms']:.0f} ms", _relative(time)] if time else ["not measured"] * 2
        row += ["not measured", _link(configs[name][0]) if configs[name] else ""]
        rows.append(row)
    table = Table("", header, rows).text("github")
    note = (
        "The pyramid alone, with its file of `configs/pyramids` and 256 channels, on a"
        " ResNet-50's maps. Parameters and GFLOPs (10⁹ multiply-accumulates, counted by"
        f" fvcore) for an image of {SIZE[0]} x {SIZE[1]} pixels with the padding that each"
        f" needs. {times_note(times)}"
    )
    return f"{table}\n\n{note}\n\n{bifpn_sentence(costs, times)}"


def times_note(times: Mapping[str, Any]) -> str:
    if not times["entries"]:
        return "Times were not measured yet."
    machine, (height, width) = times["environment"], times["size"]
    return (
        f"Times: forward pass in float32, {height} x {width} pixels, norms not folded, in turns"
        f" within one process; medians over {times['rounds']} rounds and their 95%"
        f" interval, on {machine['threads']} threads of an {machine['cpu']}, torch"
        f" {machine['versions']['torch']}, {machine['date'][:10]}. On a GPU nothing was"
        " measured."
    )


def bifpn_sentence(costs: Mapping[str, Any], times: Mapping[str, Any]) -> str:
    saved = 1 - costs["bifpn"]["flops"] / costs[REFERENCE]["flops"]
    text = f"**Operations are not time.** `bifpn` counts {100 * saved:.0f}% fewer than `fpn`"
    if not times["entries"]:
        return f"{text}; many of them are small and depthwise."
    ratio = times["entries"]["bifpn"]["relative"][0]
    what = f"takes {ratio:.1f} times as long" if ratio > 1 else f"takes {ratio:.2f} of its time"
    return (
        f"{text} and {what} on this CPU: its convolutions are depthwise and small, and fusions,"
        " norms and activations cost as much."
    )


def pyramid_section(
    name: str,
    entry: Entry,
    cost: Mapping[str, Any],
    times: Mapping[str, Any],
    configs: list[Path],
    published: list[dict[str, str]],
) -> Iterator[str]:
    text = text_of(name)
    yield f"### {name}"
    yield f"**{text.title}** ({_linked(text.source)}). {text.sentences}"
    if text.formula:
        yield f"```text\n{text.formula}\n```"
    yield f"[![{text.title} as a graph](images/pyramids/{name}.svg)](images/pyramids/{name}.svg)"
    assert entry.settings is not None
    repeats = entry.settings.repeats
    settings = {
        k: v
        for k, v in changed_settings(entry.settings).items()
        if k not in ("IN_FEATURES", "EXTRA_LEVELS")
    }
    shown = (
        ", ".join(f"`{key}: {value}`" for key, value in settings.items())
        or "all keys at their defaults"
    )
    drawn = f" (one of its {repeats} repeats is drawn)" if repeats > 1 else ""
    time = times["entries"].get(name)
    took = f"; {time['ms']:.0f} ms on the CPU, {_relative(time)} of `fpn`'s time" if time else ""
    lines = [
        f"- preset: [`pyramids/{name}.yaml`](../configs/pyramids/{name}.yaml): {shown}{drawn}",
        f"- cost: {cost['parameters']:,} parameters, {cost['flops'] / 1e9:.1f} GFLOPs{took}",
        *([f"- configs: {', '.join(map(_link, configs))}"] if configs else []),
    ]
    own = [row for row in published if _config_path(row) in configs]
    lines += [f"- published: {_published_line(row)}" for row in own]
    if not own:
        lines.append("- published: no number with a ResNet-50 under a head of Detectron2 was found")
    yield "\n".join(lines)


def recursion_section() -> Iterator[str]:
    """What `RFP_STEPS` does with any pyramid, from the docstring of the class behind it."""
    doc = inspect.cleandoc(RecursivePyramid.__doc__ or "")
    first, _, rest = doc.partition("\n\n::\n\n")
    formula, rest = re.split(r"\n\n(?=\S)", rest, maxsplit=1)
    sentences = " ".join(rest.partition("\n\nArgs:")[0].split())
    source = _linked("Qiao et al. 2020, arXiv:2006.02334")
    yield f"**The recursive feature pyramid** (DetectoRS, {source}). {first} {sentences}"
    yield f"```text\n{inspect.cleandoc(formula)}\n```"
    yield (
        "- keys: `MODEL.FPN.RFP_STEPS: 2` beside any pyramid of this page; networks: Detectron2's"
        f" ResNets\n- config: {_link(configs_dir() / RECURSIVE)}"
    )


def configs_of(entries: Mapping[str, Entry]) -> dict[str, list[Path]]:
    """The configs of COCO-* by the preset that they stand on, Mask R-CNN's first."""
    found: dict[str, list[Path]] = {name: [] for name in entries}
    paths = sorted(
        configs_dir().glob("COCO-*/*_1x.yaml"), key=lambda path: (path.stem[:4] != "mask", path)
    )
    by_file = {path: re.findall(r"^_BASE_: .*$", path.read_text(), re.MULTILINE) for path in paths}
    for path, base in by_file.items():
        line = base[0] if base else ""
        below = re.fullmatch(r"_BASE_: (\S+)", line)
        if below and (path.parent / below[1]).resolve() in by_file:  # D0 to D2 stand on another
            line = next(iter(by_file[(path.parent / below[1]).resolve()]), "")
        match = re.search(r"pyramids/(\w+)\.yaml", line)
        if match:
            found[match[1]].append(path)
    return found


def operators_table(registry: Registry[Any]) -> str:
    rows = [
        [f"`{name}`", _linked(_first_paragraph(registry.get(name)))]
        for name in registry.names()
        if name and _is_ours(registry.get(name))
    ]
    return Table("", ["name", "what it computes"], rows, left=2).text("github")


def _first_paragraph(obj: Any) -> str:
    """Of an operator's docstring.

    Raises:
        ValueError: naming the operator, if it has none of its own.
    """
    doc = vars(obj).get("__doc__") if inspect.isclass(obj) else obj.__doc__
    if not doc:
        raise ValueError(
            f"{obj.__qualname__}: its docstring, which docs/catalogue.md is made of, is missing"
        )
    return " ".join(inspect.cleandoc(doc).partition("\n\n")[0].split())


def norms_text() -> str:
    classes = ", ".join(
        f"`{name}` (`torch.nn.{ACTIVATIONS.get(name).__name__}`)"
        for name in ACTIVATIONS.names()
        if name
    )
    return (
        "`MODEL.FPN.NORM`: `GN` (32 groups), `BN`, `SyncBN` (over all processes), `FrozenBN`,"
        " `LN` (over the channels of each place) or none; they also take a map of one pixel. "
        f"`MODEL.FPN.ACTIVATION`: {classes}; empty: none, or what a topology prescribes."
    )


def published_text() -> str:
    return (
        "Box and mask AP on COCO val2017, in per cent, as their authors give them. **None of"
        " them was measured here.** `exact`: the same model, schedule and weights in"
        " Detectron2's own"
        " zoo, whose checkpoints give the same numbers with this plugin's `fpn`. All others"
        " differ in what stands beside them, and are no promise for the config of the row."
    )


def published_table(published: list[dict[str, str]]) -> str:
    header = ["config", "box AP", "mask AP", "other", "match", "what was run", "source"]
    rows = []
    for row in published:
        name, box, mask, other, match, remark, source = row.values()
        path = _config_path(row)
        cell = _link(path) if path.is_file() else name.replace("MODEL.FPN.", "")
        remark = "" if match == "exact" else remark
        rows.append([cell, box, mask, other, match, remark, source])
    return Table("", header, rows, left=7).text("github")


def _published_line(row: Mapping[str, str]) -> str:
    name, box, mask, other, match, remark, source = row.values()
    numbers = [f"box AP {box}"] if box else []
    numbers += [f"mask AP {mask}"] if mask else []
    numbers += [other] if other else []
    differs = ", exact" if match == "exact" else f"; **{match}**: {remark}"
    return f"{', '.join(numbers)} for `{Path(name).name}`{differs} ({source})"


def _config_path(row: Mapping[str, str]) -> Path:
    return configs_dir() / f"{row['plugin config']}.yaml"


def _relative(time: Mapping[str, Any]) -> str:
    value, low, high = time["relative"]
    return f"{value:.2f}× ({low:.2f}…{high:.2f})"


def _link(path: Path) -> str:
    name = path.relative_to(configs_dir()).as_posix()
    return f"[`{path.stem}`](../configs/{name})"


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def check_parameters(entries: Mapping[str, Entry]) -> None:
    """Compare the recorded parameters with the pyramids'.

    Raises:
        ValueError: naming the entry.
    """
    recorded = read_data(COSTS, entries, "--count")["entries"]
    for name, entry in entries.items():
        assert entry.pyramid is not None
        if count_parameters(entry.pyramid) != recorded[name]["parameters"]:
            raise ValueError(
                f"{COSTS.name}: {name!r} has another number of parameters: run --count"
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", action="store_true", help="count again (a minute)")
    parser.add_argument("--measure", action="store_true", help="time again (8 minutes)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="of times (10)")
    parser.add_argument("--size", nargs=2, type=int, default=(512, 512), metavar=("H", "W"))
    args = parser.parse_args()
    entries, bar = entries_on(R50), Bar()
    if args.count:
        count(entries, bar)
    if args.measure:
        measure(entries, tuple(args.size), args.rounds, bar)
    draw(entries, DRAWINGS)
    PAGE.write_text(page(entries), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
