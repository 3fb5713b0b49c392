"""A batch in parts gives the step of the whole batch, and processes exchange gradients as asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from bad import OURS, RETINA, nan_pixel, spoilt_trainer
from crash_child import EXCHANGES, exchange_gradients
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils.events import EventStorage
from test_resume import assert_same
from tiny import add_masks, register, write_dataset
from torch import Tensor, nn

from fpn_plugin.checkpoint.finite import DivergedError
from fpn_plugin.checkpoint.run_folder import metric_lines
from fpn_plugin.engine.accumulate import Accumulator, _Padding, check_parts
from fpn_plugin.engine.faults.actionable import actionable_errors
from fpn_plugin.engine.faults.divergence import DivergenceRules, StepRecorder
from fpn_plugin.engine.parallel import read_exchange, read_python_exchange
from fpn_plugin.engine.trainer import Trainer

MakeConfig = Callable[..., CfgNode]
# images wide and high in one batch, so that parts alone would be padded to other sizes; clipped
MIXED: dict[str, Any] = {
    "MODEL__RESNETS__NORM": "FrozenBN",
    "SOLVER__IMS_PER_BATCH": 4,
    "SOLVER__MAX_ITER": 2,
    "SOLVER__CLIP_GRADIENTS__ENABLED": True,
    "SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "norm",
    "DATALOADER__ASPECT_RATIO_GROUPING": False,
    "TEST__EVAL_PERIOD": 0,
}
# All anchors and proposals of images of one size, so that nothing is drawn; only the true boxes
# themselves are positive, two in each image, so that the parts count alike.
WHOLE_MASK_RCNN: dict[str, Any] = {
    **OURS,
    **MIXED,
    "MODEL__FPN__NORM": "GN",
    "MODEL__MASK_ON": True,
    "MODEL__ROI_MASK_HEAD__CONV_DIM": 16,
    "MODEL__RPN__BATCH_SIZE_PER_IMAGE": 100_000,
    "MODEL__RPN__PRE_NMS_TOPK_TRAIN": 10_000,
    "MODEL__RPN__POST_NMS_TOPK_TRAIN": 10_000,
    "MODEL__RPN__NMS_THRESH": 1.0,
    "MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE": 10_000,
    "MODEL__ROI_HEADS__POSITIVE_FRACTION": 1.0,
    "MODEL__ROI_HEADS__IOU_THRESHOLDS": [0.99],
    "INPUT__MIN_SIZE_TRAIN": (64,),
    "DATALOADER__ASPECT_RATIO_GROUPING": True,
    "SOLVER__MAX_ITER": 1,
}
DENSE_GN = {**MIXED, "MODEL__FPN__NORM": "GN", "SOLVER__MAX_ITER": 2}
DETECTORS: dict[str, tuple[dict[str, Any], float]] = {
    "RetinaNet": ({**RETINA, **MIXED}, 1e-3),
    "FCOS": (
        {
            **RETINA,
            **DENSE_GN,
            "MODEL__META_ARCHITECTURE": "FCOS",
            "MODEL__FCOS__NUM_CLASSES": 2,
        },
        1e-3,
    ),
    "Mask R-CNN": (WHOLE_MASK_RCNN, 1e-3),
    "RetinaNet in bfloat16": (
        {
            **RETINA,
            **MIXED,
            "SOLVER__AMP__ENABLED": True,
            # oneDNN's gradients of maps of one pixel are not always numbers
            "MODEL__FPN__EXTRA_LEVELS": "none",
            "MODEL__RETINANET__IN_FEATURES": ["p3", "p4", "p5"],
            "MODEL__ANCHOR_GENERATOR__SIZES": [[32], [64], [128]],
        },
        0.1,
    ),
}


@pytest.fixture
def masked(dataset: Path, tmp_path: Path) -> Any:
    """The dataset with masks, for this test only."""
    path = write_dataset(tmp_path)
    add_masks(path)
    register(path)
    yield
    register(dataset)


def train(cfg: CfgNode) -> tuple[dict[str, Tensor], dict[str, Tensor], Trainer]:
    """The weights before and after."""
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.train()
    return before, trainer.model.state_dict(), trainer


def difference(before: Any, a: Any, b: Any) -> float:
    """Of two trainings, relative to what they have changed."""
    norms = [
        torch.cat([(x[key] - y[key]).double().flatten() for key in x]).norm()
        for x, y in ((a, b), (a, before))
    ]
    return float(norms[0] / norms[1])


@pytest.mark.parametrize("name", DETECTORS)
def test_the_step_of_the_whole_batch(name: str, make_config: MakeConfig, masked: None) -> None:
    overrides, tolerance = DETECTORS[name]
    before, whole, one = train(make_config("whole", **overrides))
    _, parts, several = train(make_config("parts", SOLVER__ACCUMULATE=2, **overrides))
    assert 0 < difference(before, whole, parts) < tolerance
    lines = [metric_lines(x.cfg.OUTPUT_DIR)[-1] for x in (one, several)]
    counts = [{k: v for k, v in x.items() if re.search("num_|total", k)} for x in lines]
    assert lines[0].keys() == lines[1].keys() and len(counts[0]) > 1
    assert counts[0] == pytest.approx(counts[1], rel=tolerance)
    normalizers = [getattr(x.model, "loss_normalizer", 0.0) for x in (one, several)]
    assert normalizers[0] == pytest.approx(normalizers[1], rel=1e-9)
    assert [x.scheduler.get_last_lr() for x in (one,)] == [several.scheduler.get_last_lr()]


def test_a_bad_image_of_any_part_is_named(make_config: MakeConfig) -> None:
    """Four of the second batch are spoilt; the parts are looked at in their order."""
    overrides = {**RETINA, "SOLVER__IMS_PER_BATCH": 2, "SOLVER__ACCUMULATE": 2}
    with pytest.raises(DivergedError) as caught:
        spoilt_trainer(nan_pixel)(make_config(TEST__EVAL_PERIOD=0, **overrides)).train()
    assert "Iteration 1: the loss is not finite" in str(caught.value)
    assert re.search(
        r"the batch, before the model: 'image' of sample 0 \(.*png\)", str(caught.value)
    )


class Backbone(nn.Module):
    """With what Detectron2's have."""

    size_divisibility = 32
    padding_constraints: dict[str, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Toy(nn.Module):
    """Its loss counts the pixels that its backbone gives."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.backbone = Backbone()
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.ignore_value = 255

    def forward(self, batch: Any) -> Tensor:
        images = torch.stack([x["image"] for x in batch])
        assert batch[0]["sem_seg"].shape == (96, 64) and batch[0]["sem_seg"][-1, -1] == 255
        return self.weight.sum() * self.backbone(images)[0, 0].numel()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_parts_are_padded_to_the_size_of_the_batch(is_compiled: bool) -> None:
    model = Toy()
    if is_compiled:
        model.backbone.compile(backend="eager", dynamic=True)
    step = Accumulator(StepRecorder(model, "cpu", None, DivergenceRules(), 2), 2, "parts")
    batch = [
        {"image": torch.zeros(3, *size), "sem_seg": torch.zeros(size)}
        for size in ((70, 10), (5, 40))
    ]
    with EventStorage(0):
        assert step(batch)["total_loss"].item() == 96 * 64
    assert model.weight.grad.item() == 96 * 64 / 2, "the last part's gradient is the trainer's task"
    scaled = Accumulator(step.recorder, 2, "parts", lambda loss: loss * 1024)  # for fp16
    model.zero_grad()
    with EventStorage(0):
        scaled(batch)
    assert model.weight.grad.item() == 1024 * 96 * 64 / 2
    assert model.backbone(torch.zeros(1, 3, 5, 5)).shape == (1, 3, 5, 5)
    assert batch[0]["sem_seg"].shape == (70, 10), "the batch was changed"
    with pytest.raises(ValueError, match="parts: 3 images of a process cannot be divided by 2"):
        step([*batch, batch[0]])
    assert _Padding(nn.Linear(1, 1))._size_of([{"image": torch.zeros(3, 5, 5)}]) is None


def test_two_processes(dataset: Path, quick_ranks: None, tmp_path: Path) -> None:
    launch(exchange_gradients, 2, dist_url="auto", args=(str(dataset), str(tmp_path)))
    (before, plain, calls), *others = (torch.load(tmp_path / f"{name}.pth") for name in EXCHANGES)
    exact, parts, fp16, bf16 = others
    assert_same(plain, exact[1])
    assert difference(before, plain, parts[1]) < 1e-3
    assert calls == parts[2] > 0, "gradients were exchanged between the parts"
    for _, weights, _ in (fp16, bf16):
        assert 0 < difference(before, plain, weights) < 0.02


def test_a_graph_that_is_not_static() -> None:
    said = (
        "Your training graph has changed ... this is not compatible with static_graph set to True"
    )
    with pytest.raises(
        ValueError, match="SOLVER.DDP.STATIC_GRAPH .*: True, but .* set it to False"
    ):
        with actionable_errors("training", "run", list):
            raise RuntimeError(said)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "2"])
def test_a_bad_number_of_parts(value: Any) -> None:
    with pytest.raises(ValueError, match=f"a.b: {value!r} is not the number of parts"):
        check_parts("a.b", value)


def test_what_cannot_be_exchanged(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = make_config(SOLVER__DDP__COMPRESS="int8")
    with pytest.raises(KeyError, match="SOLVER.DDP.COMPRESS.*'int8'.*bf16, fp16"):
        read_exchange(cfg).check()
    with pytest.raises(KeyError, match="train.ddp.*'static_grap'"):
        read_python_exchange({"static_grap": True})
    with pytest.raises(ValueError, match="train.ddp: fp16_compression True and compress 'bf16'"):
        read_python_exchange({"fp16_compression": True, "compress": "bf16"})
    with pytest.raises(ValueError, match="train.ddp.bucket_cap_mb: -1 is no size"):
        read_python_exchange({"bucket_cap_mb": -1}).check()
    monkeypatch.setattr(torch.version, "cuda", None)
    cfg.SOLVER.DDP.COMPRESS = "bf16"
    with pytest.raises(ValueError, match="SOLVER.DDP.COMPRESS: 'bf16' needs a torch built with"):
        read_exchange(cfg).check()
