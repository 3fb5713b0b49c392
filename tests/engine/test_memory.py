"""When memory runs out, the error says what to lower, with the values that the run has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import torch
from bad import At
from crash_child import Child, run_with_little_memory
from detectron2.config import CfgNode, LazyCall
from tiny import TRAIN, VAL
from torch import nn

from fpn_plugin.engine import lazy
from fpn_plugin.engine.faults.actionable import OutOfMemoryError, actionable_errors
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.modeling.python_config import read_python_config

MakeConfig = Callable[..., CfgNode]
CONFIG = Path(__file__).parents[2] / "configs" / "lazy" / "faster_rcnn_trees_FPN.py"


def test_a_process_that_may_take_no_more(dataset: Path, tmp_path: Path) -> None:
    sizes = {"INPUT__MIN_SIZE_TRAIN": (3000,), "INPUT__MAX_SIZE_TRAIN": 4000}
    child = Child(str(dataset), str(tmp_path / "run"), sizes, target=run_with_little_memory)
    assert child.end() == 1
    text = child.error.removeprefix("OutOfMemoryError: ")
    assert text.startswith("Out of memory while training: ") and "DefaultCPUAllocator" in text
    assert "- SOLVER.IMS_PER_BATCH (2), and SOLVER.BASE_LR (0.01) in proportion\n" in text
    shape = "; the last batch's images, height x width: "
    lower = re.escape(f"- INPUT.MIN_SIZE_TRAIN ((3000,)) and MAX_SIZE_TRAIN (4000){shape}")
    assert re.search(lower + "(3000x4000|4000x3000)", text)  # as the order of images has it
    assert "SOLVER.AMP.ENABLED True" in text and "MODEL.FPN.RECOMPUTE True" in text
    assert text.endswith("- MODEL.FPN.OUT_CHANNELS (32)")


def exhausted(*args: Any) -> None:
    """As CUDA's allocator says it."""
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_gpu_that_has_no_more(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    on: dict[str, Any] = {
        "SOLVER__AMP__ENABLED": True,
        "MODEL__FPN__RECOMPUTE": True,
        "TEST__EVAL_PERIOD": 0,
    }
    on["MODEL__BACKBONE__NAME"] = "build_pyramid_backbone"
    trainer = Trainer(make_config(SOLVER__CHECKPOINT_PERIOD=1, **on))
    trainer.register_hooks([At(lambda model: model.roi_heads.register_forward_hook(exhausted))])
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        trainer.train()
    text = str(caught.value)
    assert type(caught.value.__cause__) is torch.cuda.OutOfMemoryError
    assert text.startswith("Out of memory while training: CUDA out of memory. Tried to allocate 2")
    assert "AMP" not in text and "RECOMPUTE" not in text
    assert "height x width: " in text and text in caplog.text
    assert Path(trainer.cfg.OUTPUT_DIR, "last_checkpoint").read_text() == "model_0000000.pth"


def test_in_evaluation(make_config: MakeConfig) -> None:
    cfg = make_config(DATASETS__TEST=(VAL,))
    model = nn.Linear(1, 1)
    model.register_forward_pre_hook(exhausted)
    with pytest.raises(OutOfMemoryError, match="^Out of memory while evaluating") as caught:
        with actionable_errors("training", "run", list):
            Trainer.test(cfg, model)
    assert "INPUT.MIN_SIZE_TEST (64) and MAX_SIZE_TEST (96)" in str(caught.value)
    assert "SIZE_TRAIN" not in str(caught.value)


class Loader:
    """Takes what a training loader takes."""

    def __init__(self, **settings: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        raise MemoryError


def test_from_a_python_config(dataset: Path, tmp_path: Path) -> None:
    cfg = read_python_config(
        str(CONFIG),
        [
            "model.backbone.bottom_up.weights=''",
            f"dataloader.train.dataset.names={TRAIN}",
            f"train.output_dir={tmp_path}",
        ],
    )
    cfg.dataloader.train = LazyCall(Loader)(**cfg.dataloader.train)
    with pytest.raises(OutOfMemoryError, match="while training: MemoryError") as caught:
        lazy.train(cfg)
    text = str(caught.value)
    assert "- dataloader.train.mapper.augmentations[0].short_edge_length ([320, 352" in text
    assert "- dataloader.train.total_batch_size (2)\n" in text
    assert "- model.backbone.recompute (not set)\n" in text
