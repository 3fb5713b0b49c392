"""What the keys of `SOLVER.DDP` and `SOLVER.ACCUMULATE` cost: steps of two processes on this CPU.

    python tests/benchmarks/exchange.py [--rounds 8] [--size 256]

RetinaNet R50-FPN on images of noise. The keys take turns, in an order that is drawn in each round;
each time is divided by that of the step with the defaults in the same round.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import time
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from fpn_plugin.config import add_fpn_config
from fpn_plugin.engine.parallel import make_parallel, read_exchange
from fpn_plugin.engine.step import build_optimizer, build_step_trainer

CONFIG = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
IMAGES = 2  # of a process
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "the same again": {},
    "GRADIENT_AS_BUCKET_VIEW": {"DDP.GRADIENT_AS_BUCKET_VIEW": True},
    "STATIC_GRAPH": {"DDP.STATIC_GRAPH": True},
    "BUCKET_MB 5": {"DDP.BUCKET_MB": 5},
    "BUCKET_MB 200": {"DDP.BUCKET_MB": 200},
    "COMPRESS fp16": {"DDP.COMPRESS": "fp16"},
    "COMPRESS bf16": {"DDP.COMPRESS": "bf16"},
    "ACCUMULATE 2": {"ACCUMULATE": 2},
    "nothing is sent": {},
}


def make_trainer(settings: dict[str, Any], size: int) -> Any:
    """A step trainer of always the same model and batch."""
    torch.manual_seed(0)
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(CONFIG))
    values = {"MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": "", "SOLVER.BASE_LR": 1e-6}
    values |= {f"SOLVER.{key}": value for key, value in settings.items()}
    cfg.merge_from_list([part for pair in values.items() for part in pair])
    model = build_model(cfg)
    batch = []
    for _ in range(IMAGES):
        boxes = Boxes(torch.tensor([[20.0, 30.0, 120.0, 140.0]]))
        truth = Instances((size, size), gt_boxes=boxes, gt_classes=torch.tensor([3]))
        image = torch.randint(0, 255, (3, size, size), dtype=torch.uint8)
        batch.append({"image": image, "instances": truth, "height": size, "width": size})
    optimizer = build_optimizer(cfg, model)
    parallel = make_parallel(model, "cpu", read_exchange(cfg))
    return build_step_trainer(cfg, parallel, itertools.repeat(batch), optimizer)


def measure(rounds: int, size: int) -> None:
    """One of the processes; the first prints the table."""
    torch.set_num_threads(1)
    trainers = {name: make_trainer(keys, size) for name, keys in SETTINGS.items()}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    with EventStorage(0):
        for number in range(rounds + 2):  # DDP arranges its buckets in the first
            for name in random.Random(number).sample(list(trainers), len(trainers)):
                comm.synchronize()
                start = time.perf_counter()
                step(trainers[name], name == "nothing is sent")
                comm.synchronize()
                if number > 1:
                    times[name].append(time.perf_counter() - start)
    if comm.is_main_process():
        load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
        print(f"seconds of a step: {statistics.median(times['defaults']):.2f}; load {load}")
        for name, values in times.items():
            ratios = sorted(a / b for a, b in zip(values, times["defaults"]))
            median = statistics.median(ratios)
            print(f"{name:26}{median:6.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})")


def step(trainer: Any, is_silent: bool) -> None:
    """One step."""
    if is_silent:
        with trainer.model.model.no_sync():
            trainer.run_step()
    else:
        trainer.run_step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else Detectron2 takes NCCL
    launch(measure, 2, dist_url="auto", args=(args.rounds, args.size))
