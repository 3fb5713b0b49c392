"""The command lines: one real process each, as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def run(tool: str, *args: object) -> str:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, args)]
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


TOOLS = [
    path
    for path in sorted((ROOT / "tools").glob("*.py"))
    if re.search(r"^(import|from) (torch|detectron2|fpn_plugin)\b", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_threads_are_told_to_sleep_before_torch_is_imported(path: Path) -> None:
    before = path.read_text().partition('os.environ.setdefault("OMP_WAIT_POLICY", "passive")')
    assert before[1] and re.findall(r"^(?:import|from) (\w+)", before[0], re.MULTILINE) == ["os"]


def test_show_pyramid(tmp_path: Path) -> None:
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
