"""The command lines of show_pyramid.py and draw_detections.py, as a user gives them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
from folders import load_tool
from helpers import own_datasets
from PIL import Image

ROOT = Path(__file__).parents[2]
CONFIG = """
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  BACKBONE: {NAME: build_pyramid_backbone}
  BOTTOM_UP: {WEIGHTS: there-is-no-such-file.pth}
  RESNETS: {OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6]}
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5]}
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs a tool and returns what it prints."""

    def run(tool: str, *args: object) -> str:
        monkeypatch.setattr("sys.argv", [tool, *map(str, args)])
        load_tool(Path(tool).stem).main()
        return capsys.readouterr().out

    with own_datasets():
        yield run


TOOLS = [
    path
    for path in sorted((ROOT / "tools").glob("*.py"))
    if re.search(r"^(import|from) (torch|detectron2|fpn_plugin)\b", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_threads_are_told_to_sleep_before_torch_is_imported(path: Path) -> None:
    before = path.read_text().partition('os.environ.setdefault("OMP_WAIT_POLICY", "passive")')
    assert before[1] and re.findall(r"^(?:import|from) (\w+)", before[0], re.MULTILINE) == ["os"]


def test_show_pyramid(run: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    drawn = tmp_path / "fpn.svg"
    args = ["--config-file", config, "--draw", drawn, "--size", 100, 128]
    out = run("show_pyramid.py", *args, "MODEL.FPN.EXTRA_LEVELS", "maxpool")
    assert "3,344,384 parameters" in out
    assert "128 x 128 pixels" in out
    assert "build_resnet_backbone" in out
    for name in ("fpn_lateral2", "fpn_merge4", "fpn_output5", "top_block.p6"):
        assert name in out and f">{name}<" in drawn.read_text()
    maps = {line[:2]: line for line in out.splitlines() if line[:1] == "p" and line[1:2].isdigit()}
    assert list(maps) == ["p2", "p3", "p4", "p5", "p6"]
    assert maps["p2"].endswith("MODEL.RPN.IN_FEATURES, MODEL.ROI_HEADS.IN_FEATURES")
    assert maps["p6"].endswith(" MODEL.RPN.IN_FEATURES")


def test_draw_detections_of_own_data(run: Any, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((40, 50, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    box = {"bbox": [5, 5, 20, 20], "category_id": 1, "image_id": 1}
    data = {
        "images": [{"id": 1, "file_name": "photo.png", "height": 40, "width": 50}],
        "annotations": [{"id": 1, "area": 400, "iscrowd": 0, **box}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(data))
    (tmp_path / "results.json").write_text(json.dumps([{**box, "score": 0.8}]))
    own = f"{{VAL_JSON: {tmp_path / 'val.json'}, VAL_IMAGES: {tmp_path}}}"
    (tmp_path / "config.yaml").write_text(f"DATASETS:\n  OWN: {own}\n")
    args = ["--results", tmp_path / "results.json", "--dataset", "own_val"]
    args += ["--config-file", tmp_path / "config.yaml", "--output", tmp_path / "out"]
    out = run("draw_detections.py", *args)
    assert out.split()[-1] == str(tmp_path / "out" / "detections_1_photo.jpg")
    assert (tmp_path / "out" / "detections_1_photo.jpg").is_file()
