#!/usr/bin/env python3
"""Write docs/scaling.md and its figure from docs/data.

python docs/write_scaling.py              the page and the figure
python docs/write_scaling.py --count      before that, count parameters and operations again
python docs/write_scaling.py --measure    before that, time 1 and 2 processes on this CPU

For a cluster of your own:
python docs/write_scaling.py --print --seconds 0.12 --between 25e9 --latency 5e-6
prints the table of a machine whose step of two images takes 0.12 s with a ResNet-50 and `fpn`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, Mapping

from fpn_plugin.benchmark.scaling import Network, Part, Step, step_time

DOCS = Path(__file__).resolve().parent
PAGE, FIGURE = DOCS / "scaling.md", DOCS / "images" / "scaling.svg"
DATA, ANNOTATIONS = DOCS / "data" / "scaling.json", DOCS / "data" / "annotations.json"
CATALOGUE = DOCS / "data" / "catalogue_costs.json"
MEASURED = DOCS / "data" / "scaling_measured.json"
CONFIGS = {
    "R50": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "Swin-T": "backbones/mask_rcnn_Swin_T_FPN_1x.yaml",
    "ViT-B": "backbones/mask_rcnn_ViT_B_Simple_1x.yaml",
}
SIZE, IMAGES = (800, 1344), 2
SMALLER = (384, 640)  # on which the necks of other networks than R50 are counted
ZOO_SECONDS = 0.261  # of Detectron2's zoo: Mask R-CNN R50-FPN 1x, two images on each of 8 V100
PROCESSES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
NETWORKS = {
    "InfiniBand, 100 Gb/s": Network(130e9, 5e-6, 12.5e9, 1e-5),
    "Ethernet, 10 Gb/s": Network(130e9, 5e-6, 1.25e9, 5e-5),
}


def count() -> None:
    """The trained parameters and the operations of each network, neck and of the heads."""
    import torch
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from fpn_plugin import add_fpn_config, resolve_config
    from fpn_plugin.benchmark.catalogue import catalogue, count_costs
    from fpn_plugin.config.files import merge_config_file
    from fpn_plugin.paths import configs_dir
    from fpn_plugin.visualize.complexity import Cost, totals

    def trained(module: Any) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    data: dict[str, Any] = {}
    for network, config in CONFIGS.items():
        cfg = get_cfg()
        add_fpn_config(cfg)
        merge_config_file(cfg, str(configs_dir() / config))
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.BOTTOM_UP.WEIGHTS = "cpu", "", ""
        cfg = resolve_config(cfg)
        model = build_model(cfg)
        cost = totals(model.backbone, "bottom_up", SIZE)
        below = model.backbone.bottom_up
        shapes = below.output_shape()
        entries = catalogue(cfg, shapes, SMALLER, getattr(below, "size_divisibility", 0))
        # write_catalogue.py has counted those of R50
        known = json.loads(CATALOGUE.read_text())["entries"] if network == "R50" else {}
        costs = {name: Cost(x["parameters"], x["flops"]) for name, x in known.items()}
        missing = [entry for entry in entries if entry.name not in costs]
        share = SIZE[0] * SIZE[1] / (SMALLER[0] * SMALLER[1])  # operations grow with the area
        costs |= {
            name: Cost(cost.parameters, cost.flops * share)
            for name, cost in count_costs(missing).items()
        }
        necks: dict[str, Any] = {}
        for entry in entries:
            if entry.pyramid is None:
                necks[entry.name] = {"reason": entry.reason}
                continue
            kinds = [type(module).__name__ for module in entry.pyramid.modules()]
            necks[entry.name] = {
                "parameters": costs[entry.name].parameters,
                "flops": round(costs[entry.name].flops),
                "sync_norms": sum("SyncB" in kind for kind in kinds),
            }
        heads = trained(model.proposal_generator) + trained(model.roi_heads)
        data[network] = {
            "parameters": trained(below),
            "flops": round(cost["bottom_up"].flops),
            "heads": {"parameters": heads, "flops": head_flops()},
            "necks": necks,
        }
        print(network, len(necks), flush=True)
        del model
        torch.manual_seed(0)
    DATA.write_text(json.dumps(data, indent=1) + "\n")


def head_flops() -> int:
    """Multiply-accumulates of Mask R-CNN's heads for an image in training, as in its zoo config:
    RPN on five maps, 512 boxes, a mask for a quarter of them."""
    places = sum(SIZE[0] * SIZE[1] // stride**2 for stride in (4, 8, 16, 32, 64))
    rpn = places * 256 * (256 * 9 + 3 * 5)
    box = 512 * (256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 80))
    mask = 128 * (14 * 14 * 256 * 256 * (4 * 9 + 4) + 28 * 28 * 256 * 80)
    return rpn + box + mask


def parts_of(data: Mapping[str, Any], network: str, neck: str, rate: float) -> list[Part]:
    """Network, neck and heads; a backward pass takes twice as many operations as a forward one."""
    counted = data[network]
    cost = counted["necks"][neck]
    made = []
    for part in (counted, cost, counted["heads"]):
        forward = IMAGES * part["flops"] / rate
        made.append(Part(part["parameters"], forward, 2 * forward, part.get("sync_norms", 0)))
    return made


def rate_of(data: Mapping[str, Any], seconds: float) -> float:
    """Multiply-accumulates per second of a process whose step with R50 and `fpn` takes so long."""
    r50 = data["R50"]
    parts = (r50, r50["necks"]["fpn"], r50["heads"])
    return 3 * IMAGES * sum(part["flops"] for part in parts) / seconds


def curve(parts: list[Part], network: Network, **options: Any) -> dict[int, Step]:
    return {n: step_time(parts, n, network, **options) for n in PROCESSES}


def measure(rounds: int, sizes: list[int]) -> None:
    """This machine: gloo between two processes, and steps of Mask R-CNN R50-FPN."""
    from detectron2.engine import launch

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    path = DOCS / "data" / "scaling_step.json"
    found: dict[str, Any] = {"rounds": rounds, "free": round(idle_share(5.0), 2), "sizes": {}}
    for size in sizes:
        steps = found["sizes"][str(size)] = {}
        for processes in (1, 2):
            launch(_measure_rank, processes, dist_url="auto", args=(rounds, size, str(path)))
            steps[str(processes)] = json.loads(path.read_text())
    path.unlink()
    found["date"] = time.strftime("%Y-%m-%d")
    MEASURED.write_text(json.dumps(found, indent=1) + "\n")


def idle_share(seconds: float) -> float:
    """How much of the machine's cores nobody uses."""

    def read() -> list[int]:
        return [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]

    before = read()
    time.sleep(seconds)
    change = [b - a for a, b in zip(before, read())]
    return (change[3] + change[4]) / sum(change)


def _measure_rank(rounds: int, size: int, path: str) -> None:
    import torch
    import torch.distributed as dist
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.utils import comm
    from detectron2.utils.events import EventStorage
    from torch.nn.parallel import DistributedDataParallel

    from fpn_plugin import add_fpn_config, resolve_config
    from fpn_plugin.benchmark.inputs import Inputs
    from fpn_plugin.config.files import merge_config_file
    from fpn_plugin.engine.step import build_optimizer
    from fpn_plugin.paths import configs_dir

    torch.set_num_threads(1)
    pair = comm.get_world_size() == 2
    result: dict[str, Any] = {}
    if pair:
        exchange = {}
        for length in (1, 1 << 18, 25 << 18):
            x, times = torch.ones(length), []
            for _ in range(15):
                dist.barrier()
                start = time.perf_counter()
                dist.all_reduce(x)
                times.append(time.perf_counter() - start)
            exchange[4 * length] = median(times[3:])
        result["all_reduce"] = exchange
    cfg = get_cfg()
    add_fpn_config(cfg)
    merge_config_file(cfg, str(configs_dir() / CONFIGS["R50"]))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg = resolve_config(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    batch = Inputs((size, size)).annotated(cfg)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if pair else model
    phases: dict[str, dict[str, list[float]]] = {}
    for turn in range(2 * (rounds + 1)):
        exchanging = pair and turn % 2 == 0
        if not pair and turn % 2 == 1:
            continue
        if pair:
            wrapped.require_backward_grad_sync = exchanging
            dist.barrier()
        torch.manual_seed(0)
        start = time.perf_counter()
        with EventStorage():
            loss = sum(wrapped(batch).values())
        forward = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        if turn >= 2:
            named = phases.setdefault("exchange" if exchanging else "alone", {})
            for name, value in (
                ("forward", forward - start),
                ("backward", backward - forward),
                ("update", end - backward),
                ("whole", end - start),
            ):
                named.setdefault(name, []).append(value)
    for name, values in phases.items():
        result[name] = {phase: round(median(each), 4) for phase, each in values.items()}
        result[name]["range"] = [round(min(values["whole"]), 4), round(max(values["whole"]), 4)]
    if comm.is_main_process():
        Path(path).write_text(json.dumps(result))


def main() -> int:
    from scaling_page import draw, page, table  # beside this file

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", action="store_true", help="count again (minutes)")
    parser.add_argument("--measure", action="store_true", help="time again (minutes)")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="of times (6)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 192], metavar="PIXELS")
    parser.add_argument("--print", action="store_true", help="only a table, of the cluster below")
    parser.add_argument("--seconds", type=float, default=ZOO_SECONDS, help="a step with R50, `fpn`")
    parser.add_argument("--within", type=float, default=130e9, help="bytes/s within a host")
    parser.add_argument("--between", type=float, default=12.5e9, help="bytes/s between hosts")
    parser.add_argument("--latency", type=float, default=1e-5, help="seconds, between hosts")
    parser.add_argument("--per-host", type=int, default=8, metavar="N", help="GPUs of a host")
    args = parser.parse_args()
    if args.count:
        count()
    if args.measure:
        measure(args.rounds, args.sizes)
    data = json.loads(DATA.read_text())
    if args.print:
        own = Network(args.within, 5e-6, args.between, args.latency, args.per_host)
        print(table(data, rate_of(data, args.seconds), {"yours": own}).text())
        return 0
    draw(data, FIGURE)
    PAGE.write_text(page(data), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
