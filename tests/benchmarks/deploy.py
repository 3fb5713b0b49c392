#!/usr/bin/env python3
"""Time exported files beside Detectron2 as shipped: the table of docs/performance.md.

deploy.py --output output/deploy.md                     Mask R-CNN R50-FPN, 512x512, on an idle machine
deploy.py --output output/deploy.md --size 192 --rounds 2     a try

Random weights of one seed, the same for all but torchvision's model, and a score threshold at which
100 boxes survive. A detector is timed from an image in bytes to masks in the image. All in turns
within one process, on as many threads as there are cores.
"""

import os

# before torch is imported: see tools/benchmark.py
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse  # noqa: E402
import tempfile  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Callable  # noqa: E402

import torch  # noqa: E402
from torchvision.models.detection import maskrcnn_resnet50_fpn  # noqa: E402

from fpn_plugin.benchmark.configs import gather_configs  # noqa: E402
from fpn_plugin.benchmark.inputs import Inputs  # noqa: E402
from fpn_plugin.benchmark.models import BenchmarkModel, build_models  # noqa: E402
from fpn_plugin.benchmark.timing import Plan, WallClock, Work, time_interleaved  # noqa: E402
from fpn_plugin.benchmark.workloads import (  # noqa: E402
    backbone_workload,
    calibrate,
    inference_workload,
    score_holders,
)
from fpn_plugin.export.accuracy import predict_by  # noqa: E402
from fpn_plugin.export.formats import FORMATS, Options, Runner, Shape  # noqa: E402
from fpn_plugin.export.model import ExportModel, export_backbone, export_detector  # noqa: E402
from fpn_plugin.export.openvino_ir import PRECISIONS, Quantisation  # noqa: E402
from fpn_plugin.report.progress import Bar  # noqa: E402
from fpn_plugin.report.tables import Table  # noqa: E402

CONFIG = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
BF16 = (
    "MODEL.CHANNELS_LAST True MODEL.FAST_ROI_ALIGN True TEST.FOLD_NORMS True"
    " SOLVER.AMP.ENABLED True"
)
DETECTRON2, PLUGIN, TORCHVISION = "Detectron2", "the plugin, eager bf16", "torchvision"
TITLES = {"backbone": "backbone and pyramid", "detector": "the whole detector"}
WIDEST = 0.25  # the spread of a ratio, as in tools/benchmark.py


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FILE", help="the tables, in Markdown")
    add("--size", type=int, default=512, help="of the image, a side in pixels")
    add("--rounds", type=int, default=10)
    add("--what", nargs="+", choices=list(TITLES), default=list(TITLES))
    add("--calibrate-num", type=int, default=8, help="random images that int8 is calibrated on")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(os.cpu_count() or 1)
    bar, inputs = Bar(), Inputs((args.size, args.size))
    configs = gather_configs([CONFIG], variants=[f"bf16: {BF16}"])
    models = dict(zip(("baseline", "fpn", "bf16"), build_models(configs, inputs).values()))
    for model in models.values():
        model.score_threshold = calibrate(models["baseline"], inputs)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    texts = []
    for what in args.what:
        with tempfile.TemporaryDirectory() as folder:
            works = gather(what, models, inputs, Path(folder), args.calibrate_num, bar)
            texts.append(measure(what, works, Plan(args.rounds, max_rounds=args.rounds), bar))
        args.output.write_text("\n\n".join(texts) + "\n")
        print(texts[-1])


def gather(
    what: str,
    models: dict[str, BenchmarkModel],
    inputs: Inputs,
    folder: Path,
    count: int,
    bar: Bar,
) -> dict[str, Work]:
    """What is timed, by name."""
    workload = backbone_workload if what == "backbone" else inference_workload
    works = {
        DETECTRON2: workload(models["baseline"], inputs).work,
        PLUGIN: workload(models["bf16"], inputs).work,
    }
    if what == "detector":
        works[TORCHVISION] = torchvision_work(inputs)
    exported = part_of(what, models["fpn"])
    image = exported.example(inputs.size, 1)
    for name, format, options in contestants(exported, inputs, count):
        bar.say(f"writing {what}: {name}")
        path = folder / f"{name.replace(' ', '_')}{FORMATS[format].suffix}"
        FORMATS[format].write(exported, Shape(None, 0, inputs.size), path, options)
        run = FORMATS[format].load(path)
        works[name] = file_work(run, image, exported, models["fpn"].model, inputs)
    return works


def part_of(what: str, model: BenchmarkModel) -> ExportModel:
    for holder in score_holders(model.model):
        holder.test_score_thresh = model.score_threshold
    return (export_backbone if what == "backbone" else export_detector)(
        model.config.cfg, model.model
    )


def contestants(
    exported: ExportModel, inputs: Inputs, count: int
) -> list[tuple[str, str, Options]]:
    """Name, format and options of each file."""
    images = [exported.example(inputs.size, 1).numpy() for _ in range(count)]
    entries = [("onnxruntime", "onnx", Options())]
    for precision in PRECISIONS:
        quantisation = Quantisation(images, lambda image: image) if precision == "int8" else None
        options = Options(precision=precision, quantisation=quantisation)
        entries.append((f"OpenVINO {precision}", "openvino", options))
    return entries


def file_work(
    run: Runner, image: torch.Tensor, exported: ExportModel, detector: Any, inputs: Inputs
) -> Work:
    if exported.what == "backbone":
        return lambda lap: run(image)
    predict, (model_input,) = predict_by(run, exported, detector), inputs.images()
    return lambda lap: predict(model_input)


def torchvision_work(inputs: Inputs) -> Work:
    """torchvision's own Mask R-CNN, with the threshold at which 100 boxes survive."""
    torch.manual_seed(inputs.seed)
    side = inputs.size[0]
    weightless: dict[str, Any] = {"weights": None, "weights_backbone": None}
    model = maskrcnn_resnet50_fpn(**weightless, min_size=side, max_size=side).eval()
    for name, module in model.named_modules():
        if name.endswith("bn3"):  # else features grow from block to block
            torch.nn.init.constant_(module.weight, 0.25)
    image = inputs.images()[0]["image"].float() / 255

    @torch.no_grad()
    def count() -> int:
        return len(model([image])[0]["scores"])

    low, high = 0.0, 1.0
    for _ in range(12):
        middle = model.roi_heads.score_thresh = (low + high) / 2
        low, high = (low, middle) if count() < 100 else (middle, high)
    model.roi_heads.score_thresh = low

    @torch.no_grad()
    def work(lap: Callable[[str], None]) -> Any:
        return model([image])

    return work


def measure(what: str, works: dict[str, Work], plan: Plan, bar: Bar) -> str:
    """The table, in Markdown."""
    bar.begin(f"timing {TITLES[what]}", plan.rounds)
    names = [name for name in works if name != DETECTRON2]
    pairs = [(name, DETECTRON2) for name in names]
    timed = time_interleaved(works, pairs, WallClock(), plan, bar.step)
    bar.end()
    rows = []
    for name in works:
        ratio = timed.ratios.get((name, DETECTRON2), {}).get("whole")
        text = f"{ratio.value:.2f}× ({ratio.low:.2f}…{ratio.high:.2f})" if ratio else ""
        if ratio and ratio.spread > WIDEST:
            text += f", rounds spread by {ratio.spread:.0%}"
        rows.append([name, f"{timed.times[name].median() * 1000:.0f}", text])
    head = [TITLES[what], "ms", "times as fast as Detectron2 (95%)"]
    return Table(TITLES[what], head, rows).text("github")


if __name__ == "__main__":
    main()
