"""What a run says on the terminal and in its log, and what is in files of its own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
from detectron2.utils import logger as detectron2_logger
from tiny import VAL

from fpn_plugin.cli import train as train_command
from fpn_plugin.engine.setup import argument_parser

PACKAGES = ("fpn_plugin", "detectron2", "fvcore")


@pytest.fixture
def terminal() -> Iterator[None]:
    """As in a process of its own: no handlers before, and none left."""
    before = {name: list(logging.getLogger(name).handlers) for name in PACKAGES}
    detectron2_logger.setup_logger.cache_clear()
    for name in PACKAGES:
        logging.getLogger(name).handlers.clear()
    yield
    for name, handlers in before.items():
        logging.getLogger(name).handlers[:] = handlers
    detectron2_logger.setup_logger.cache_clear()


def test_a_log_that_one_reads(
    terminal: None, make_config: Any, capfd: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["/env/fpn_plugin/__main__.py", "train", "SEED", "7"])
    cfg = make_config(
        MODEL__BACKBONE__NAME="build_pyramid_backbone",
        MODEL__FPN__TOPOLOGY="pafpn",
        DATASETS__TEST=(VAL,),
        SOLVER__MAX_ITER=1,
    )
    args = argument_parser().parse_args([])
    train_command.train(cfg, args)
    folder, shown = Path(cfg.OUTPUT_DIR), capfd.readouterr().out
    before, _, after = shown.partition("Starting training")
    assert before.count("\n") < 75 and "Namespace(" not in shown and "BatchNorm2d(" not in shown
    for text in (
        "Command: fpn train SEED 7",
        "model     GeneralizedRCNN with StandardROIHeads (boxes), ",
        "heads     RPN on p2 p3 p4 p5 p6; ROI_HEADS on p2 p3 p4 p5; 2 classes: a, b",
        "train on  engine_train (10 images, 20 objects)",
        "test on   engine_val (10 images, 20 objects), every 2 iterations and at the end",
        "schedule  1 iterations (0.2 times all images), SGD at 0.01, warm-up 4, SEED 7",
        "topology           pafpn",
        "  map  parameters",
    ):
        assert before.count(text) == 1, text
    assert "Serializing" not in shown
    assert after.rstrip().endswith(f"--input photo.jpg --output {folder}/predictions")
    assert f"fpn visualize --config-file {folder}/config.yaml --weights {folder}/model_f" in after
    assert "(res5): Sequential(" in (folder / "model.txt").read_text()
    assert "PyTorch" in (folder / "environment.txt").read_text()
    log = (folder / "log.txt").read_text()
    assert "The run:" in log and "Serializing" in log and "BatchNorm2d(" not in log


def test_a_mistake_in_training_is_said_once(
    terminal: None, make_config: Any, capfd: pytest.CaptureFixture
) -> None:
    cfg, args = make_config(SOLVER__BASE_LR=1e30), argument_parser().parse_args([])
    with pytest.raises(FloatingPointError):
        train_command.train(cfg, args)
    assert "Traceback" not in capfd.readouterr().out
    assert "Traceback" in Path(cfg.OUTPUT_DIR, "log.txt").read_text()
