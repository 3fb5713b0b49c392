"""What each option of learning brings: averaged weights, a cosine schedule, large-scale jitter,
copy-paste and test-time augmentation, over seeds.

    python tests/benchmarks/learning.py CONFIG [KEY VALUE …] --output FOLDER [--seeds 0,1,2] [--only NAMES]
        [--augment NAMES]

Each way to train is trained once per seed, without what else CONFIG may have of these options, and
with `MODEL.EMA`: as a run is trained the same with and
without (tests/engine/test_ema.py), it gives the results of both. Each is evaluated as trained and
averaged, with and without `TEST.AUG` (with masks that may take as long as training: `--augment` names
the ways that are), on `DATASETS.TEST`: name one that may be chosen on. What is there is not done
again, so that the command goes on where it was interrupted; it ends with the table of all that is
there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch
from detectron2.data import DatasetCatalog

from fpn_plugin.checkpoint.checkpointer import StrictCheckpointer
from fpn_plugin.config.resolve import load_config
from fpn_plugin.engine.trainer import Trainer

JITTER = {"INPUT.LSJ.ENABLED": True, "INPUT.LSJ.MIN_SCALE": 0.5}
PASTE = {"INPUT.COPY_PASTE.ENABLED": True}
COSINE = {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"}
PLAIN = {  # whatever the config has
    "INPUT.LSJ.ENABLED": False,
    "INPUT.COPY_PASTE.ENABLED": False,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
}
TRAININGS: dict[str, dict[str, Any]] = {
    "steps": {},
    "cosine": COSINE,
    "lsj": JITTER,
    "lsj-wide": {**JITTER, "INPUT.LSJ.MIN_SCALE": 0.1},
    "copy_paste": PASTE,  # needs masks
    "lsj+copy_paste": {**JITTER, **PASTE},
    "lsj+copy_paste+cosine": {**JITTER, **PASTE, **COSINE},
}
BASELINE = ("steps", "as trained", "")
SCALES = (0.8, 1.0, 1.25)  # of test-time augmentation


def options(values: dict[str, Any]) -> list[str]:
    """`KEY VALUE …` as on a command line."""
    return [str(part) for pair in values.items() for part in pair]


def training_keys(name: str, seed: int, side: int) -> dict[str, Any]:
    """What is set in the config for one of `TRAININGS`.

    Args:
        side: of the images of `INPUT.LSJ`, in pixels.
    """
    keys = {**PLAIN, **TRAININGS[name], "SEED": seed}
    return {**keys, "INPUT.LSJ.IMAGE_SIZE": side} if keys["INPUT.LSJ.ENABLED"] else keys


def train(config: str, folder: Path, keys: dict[str, Any], opts: list[str]) -> None:
    """Train a run to its end, or go on with it."""
    keys = {**keys, "MODEL.EMA.ENABLED": True, "DATASETS.TEST": "()", "OUTPUT_DIR": folder}
    command = [sys.executable, "-m", "fpn_plugin", "train", "--config-file", config, "--resume"]
    subprocess.run([*command, *opts, *options(keys)], check=True)


def evaluate(
    config: str, folder: Path, opts: list[str], augmented: bool
) -> dict[str, dict[str, Any]]:
    """The results of a run: those of the weights as trained, and of the averages."""
    args = argparse.Namespace(config_file=config, opts=[*opts, "OUTPUT_DIR", str(folder / "eval")])
    cfg = load_config(args)
    cfg.TEST.AUG.ENABLED = augmented
    side = cfg.INPUT.MIN_SIZE_TEST or shorter_side(cfg.DATASETS.TEST)  # 0: as the images are
    cfg.TEST.AUG.MIN_SIZES = tuple(round(scale * side) for scale in SCALES)
    cfg.MODEL.BOTTOM_UP.WEIGHTS = ""
    results = {}
    for name in ("averaged", "as trained"):
        model = Trainer.build_model(cfg)
        path = folder / "model_final.pth"
        if name == "as trained":
            checkpoint = torch.load(path)
            trained = checkpoint["trainer"]["hooks"]["EMAHook"]["trained"]
            path = folder / "as_trained.pth"
            torch.save({"model": {**checkpoint["model"], **trained}}, path)
        StrictCheckpointer(model).load(str(path))
        results[name] = Trainer.test(cfg, model)
    return results


def shorter_side(names: Sequence[str]) -> float:
    """The median of the shorter sides of datasets' images, in pixels."""
    records = [record for name in names for record in DatasetCatalog.get(name)]
    return statistics.median(min(record["height"], record["width"]) for record in records)


def collect(root: Path) -> dict[tuple[str, str, str], dict[int, dict[str, float]]]:
    """The AP of all that is there, by way of training, weights and augmentation, then by seed."""
    table: dict[tuple[str, str, str], dict[int, dict[str, float]]] = {}
    names = [name for name in TRAININGS if (root / name).is_dir()]
    for name in names:
        for file in sorted((root / name).glob("seed*/results.json")):
            seed = int(file.parent.name.removeprefix("seed"))
            for weights, results in json.loads(file.read_text()).items():
                for task, values in results.items():
                    kind, _, suffix = task.partition("_")
                    row = table.setdefault((name, weights, suffix), {}).setdefault(seed, {})
                    row[kind] = values["AP"]
    return table


def rows(root: Path) -> Iterator[str]:
    """The table in Markdown; differences are to `BASELINE` with the same seed."""
    table = collect(root)
    kinds = sorted({kind for row in table.values() for ap in row.values() for kind in ap})
    heads = [text for kind in kinds for text in (f"{kind} AP", "difference", "of each seed")]
    yield f"| training | weights | test | seeds | {' | '.join(heads)} |"
    yield "|" + "---|" * (4 + len(heads))
    for (name, weights, suffix), row in table.items():
        cells = [name, weights, suffix or "plain", str(len(row))]
        for kind in kinds:
            values = [ap[kind] for ap in row.values()]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            base = table.get(BASELINE, {})
            gains = [row[seed][kind] - base[seed][kind] for seed in sorted(row) if seed in base]
            cells.append(f"{statistics.fmean(values):.1f}{spread}")
            cells.append(f"{statistics.fmean(gains):+.1f}" if gains else "")
            cells.append(", ".join(f"{gain:+.1f}" for gain in gains))
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="steps,cosine,lsj", help=", ".join(TRAININGS))
    parser.add_argument("--augment", default=",".join(TRAININGS), help="default: all")
    parser.add_argument("opts", nargs="*")
    args = parser.parse_intermixed_args()
    inputs = load_config(argparse.Namespace(config_file=args.config, opts=args.opts)).INPUT
    side = round(inputs.MIN_SIZE_TEST or statistics.median(inputs.MIN_SIZE_TRAIN))
    for seed in map(int, args.seeds.split(",")):
        for name in args.only.split(","):
            folder = args.output / name / f"seed{seed}"
            if (folder / "results.json").is_file():
                continue
            train(args.config, folder, training_keys(name, seed, side), args.opts)
            results = evaluate(args.config, folder, args.opts, name in args.augment.split(","))
            (folder / "results.json").write_text(json.dumps(results))
            print("\n".join(rows(args.output)), flush=True)
    print("\n".join(rows(args.output)))


if __name__ == "__main__":
    main()
