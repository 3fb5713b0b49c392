"""docs/extending.md, from its first file to its last command."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, register, write_dataset

from fpn_plugin.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# so that each command takes seconds: they come after the page's own overrides
KEYS = ("MODEL.DEVICE", "INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST")
KEYS += ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "DATALOADER.NUM_WORKERS", "SOLVER.IMS_PER_BATCH")
SMALL: dict[str, Any] = {key: TINY[key] for key in KEYS}
SMALL |= {"SOLVER.MAX_ITER": 2, "SOLVER.STEPS": (1,), "MODEL.ROI_HEADS.NUM_CLASSES": 2}
SMALL |= {key: value for key, value in TINY.items() if key.startswith("MODEL.RESNETS")}
SMALL |= {"MODEL.RESNETS.OUT_FEATURES": ("res2", "res3", "res4", "res5")}
SMALL |= {"MODEL.BOTTOM_UP.NAME": "build_resnet_backbone", "MODEL.BOTTOM_UP.NORM": ""}
SMALL |= {"MODEL.BOTTOM_UP.WEIGHTS": ""}
DATA = {"DATASETS.TRAIN": ("engine_train",), "DATASETS.TEST": ("engine_val",)}


def run(line: str) -> None:
    _, command, *words = shlex.split(line)
    changes = {"train": SMALL, "show": {"MODEL.BOTTOM_UP.WEIGHTS": ""}}.get(command, {})
    if command == "train" and "DATASETS.TRAIN" not in words:
        changes = changes | DATA  # in the place of the demo's
    words += [str(word) for pair in changes.items() for word in pair]
    assert not main([command, *words])


def test_the_page_runs(own_folder: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("onnxruntime")
    for split in ("train", "val"):
        images = own_folder / "crowns" / split
        images.mkdir(parents=True)
        write_dataset(images, 3).rename(f"crowns/{split}.json")
    register(write_dataset(own_folder, 3))
    outputs = []
    for language, code in BLOCK.findall(PAGE.read_text()):
        name = re.match(r"# (\w+\.py)\n", code)
        if language == "python" and name:
            Path(name[1]).write_text(code)
        for line in [] if language else code.replace("\\\n", " ").splitlines():
            if line.startswith("fpn "):
                run(line)
                outputs.append(capsys.readouterr().out)
    shown, _, exported, parts, _ = outputs
    listed = next(code for language, code in BLOCK.findall(PAGE.read_text()) if language == "text")
    for row in listed.splitlines()[1:]:
        assert " ".join(row.split()) in " ".join(shown.split())
    assert "soft_maximum" in shown and Path("dense.svg").stat().st_size
    assert "1x3x256x288: largest difference" in exported
    assert "bicubic" in parts and "residual" in parts
    assert "my_pyramids.py" in Path("dense/config.yaml").read_text()
    assert "bbox/AP" in Path("crowns_run/metrics.json").read_text()
    runpy.run_path("run_dense.py")
    names = [row.split()[0] for row in capsys.readouterr().out.splitlines()]
    assert names == ["p2", "p3", "p4", "p5", "p6"]
