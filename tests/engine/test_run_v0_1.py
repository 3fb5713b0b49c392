"""A run that version 0.1 wrote is resumed, loaded and exported with the numbers of that version.

`data/run_v0_1` is a RetinaNet with a BiFPN of 8 channels on the dataset of `tiny.py`, after two
iterations. `expected.json` has what version 0.1 computed from its checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import DATA, run_setup
from torch import Tensor

from fpn_plugin.checkpoint.run_folder import metric_lines
from fpn_plugin.engine.setup import argument_parser, begin
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.export.export import Settings, export
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.detector import load_detector, read_config

RUN = Path(__file__).parent / "data" / "run_v0_1"
CONFIG, WEIGHTS = str(RUN / "config.yaml"), str(RUN / "model_0000001.pth")
EXPECTED = json.loads((RUN / "expected.json").read_text())


def image() -> Tensor:
    return (torch.arange(3 * 64 * 96).reshape(3, 64, 96) * 7919 % 256).float()


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-4, abs=1e-6)


def summary(maps: dict[str, Tensor]) -> dict[str, Any]:
    return {name: [float(x.mean()), float(x.abs().mean())] for name, x in maps.items()}


def expected_maps() -> dict[str, Any]:
    return {name: [close(mean) for mean in means] for name, means in EXPECTED["maps"].items()}


def test_it_is_resumed(dataset: Path, tmp_path: Path, log: Any, one_order: None) -> None:
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    args = ["--config-file", str(run / "config.yaml"), "--resume", "OUTPUT_DIR", str(run)]
    args += ["SOLVER.MAX_ITER", "4", *DATA]
    trainer = Trainer(begin(run_setup(*args), argument_parser().parse_args(args)))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    trainer.train()
    assert "differs from the run's: SOLVER.MAX_ITER 2 -> 4" in log.text
    weights = dict(trainer.checkpointer.model.named_parameters())
    for name, total in EXPECTED["weights"].items():
        assert float(weights[name].abs().sum()) == close(total), name
    lines = metric_lines(str(run))
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [1, 4]
    losses = {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}
    assert list(losses) == [1, 3] and losses[3] == close(EXPECTED["last_loss"])


def test_its_detections(tmp_path: Path) -> None:
    model: Any = load_detector(read_config(CONFIG, WEIGHTS, [])).model.eval()
    with torch.no_grad():
        maps = model.backbone(model.preprocess_image([{"image": image()}]).tensor)
        instances = model([{"image": image(), "height": 64, "width": 96}])[0]["instances"]
    assert summary(maps) == expected_maps()
    assert instances.scores[:5].tolist() == [close(score) for score in EXPECTED["scores"]]
    boxes = torch.tensor(EXPECTED["boxes"])
    assert torch.allclose(instances.pred_boxes.tensor[:5], boxes, atol=0.01)


def test_its_export(tmp_path: Path) -> None:
    output = tmp_path / "model.ts"
    assert len(export(Settings(CONFIG, "torchscript", output, WEIGHTS), Bar(True))) == 3
    info = json.loads((tmp_path / "model.ts.json").read_text())
    mean, std = (torch.tensor(info[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = torch.nn.functional.pad((image() - mean) / std, (0, 32, 0, 64))  # to 128 x 128
    with torch.no_grad():
        assert summary(torch.jit.load(str(output))(pixels[None])) == expected_maps()
