"""Every head on several pyramids: one training step and one evaluation.

Panoptic FPN is evaluated by its boxes, masks and semantic segmentation: Detectron2's panoptic quality needs
panopticapi, which is on no package index.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from detectron2.evaluation import SemSegEvaluator
from PIL import Image
from runs import HEADS, PYRAMIDS, check_run, config
from scene_data import SEM_SEG

from fpn_plugin.evaluation.build import build_evaluator

OTHERS = [name for name in PYRAMIDS if name not in ("fpn", "simple")]
# Each head on every other pyramid of these, so that each pyramid has half of the heads; on the fpn
# all are trained in bfloat16, and compared with Detectron2's own
PAIRS = [
    (head, pyramid)
    for row, head in enumerate(HEADS)
    for column, pyramid in enumerate(OTHERS)
    if (row + column) % 2 == 0
]


@pytest.mark.parametrize("head, pyramid", PAIRS)
def test_one_step_and_one_evaluation(
    head: str, pyramid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_run(head, config(head, pyramid, tmp_path), monkeypatch)


@pytest.mark.parametrize("head", HEADS)
def test_one_step_and_one_evaluation_in_bfloat16(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_run(head, config(head, "fpn", tmp_path, "SOLVER.AMP.ENABLED", True), monkeypatch)


def test_semantic_labels_are_read_into_an_array_of_its_own(tmp_path: Path) -> None:
    """The evaluator writes into it; Detectron2's own reader is an error in numpy 2."""
    evaluator = build_evaluator(config("panoptic_fpn", "fpn", tmp_path), SEM_SEG)
    assert isinstance(evaluator, SemSegEvaluator)
    Image.fromarray(np.array([[0, 255], [1, 0]], dtype=np.uint8)).save(tmp_path / "labels.png")
    labels = evaluator.sem_seg_loading_fn(str(tmp_path / "labels.png"), dtype=int)
    labels[labels == 255] = 2
    assert labels.dtype == int and labels.tolist() == [[0, 2], [1, 0]]
