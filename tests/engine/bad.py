"""Trainers whose data or model goes bad on the way, in ways that people meet."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Callable

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.engine import HookBase
from detectron2.engine.hooks import CallbackHook
from detectron2.utils import comm
from tiny import register, tiny_config
from torch import Tensor, nn

from fpn_plugin.checkpoint.finite import DivergedError
from fpn_plugin.engine.data import build_train_loader
from fpn_plugin.engine.trainer import Trainer

OURS = {"MODEL__BACKBONE__NAME": "build_pyramid_backbone", "SOLVER__MAX_ITER": 2}
RETINA = {
    **OURS,
    "MODEL__META_ARCHITECTURE": "RetinaNet",
    "MODEL__FPN__IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL__RETINANET__NUM_CLASSES": 2,
    "SOLVER__BASE_LR": 1e-3,
}
Spoil = Callable[[dict[str, Any]], None]


class At(HookBase):
    """Does something to the model before the second iteration."""

    def __init__(self, spoil: Callable[[Any], None]) -> None:
        self.spoil = spoil

    def before_step(self) -> None:
        if self.trainer.iter == 1:
            with torch.no_grad():
                self.spoil(self.trainer.checkpointer.model)


class SpoiltMapper:
    """Detectron2's mapper, and then something bad: to each sample from the third on."""

    def __init__(self, cfg: CfgNode, spoil: Spoil) -> None:
        self.mapper = DatasetMapper(cfg, is_train=True)
        self.spoil = spoil
        self.calls = 0

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        sample = self.mapper(copy.deepcopy(record))
        self.calls += 1
        if self.calls > 2:
            self.spoil(sample)
        return sample


def spoilt_trainer(spoil: Spoil) -> type[Trainer]:
    """A trainer whose second batch is bad."""

    class SpoiltTrainer(Trainer):
        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> Any:
            return build_train_loader(cfg, SpoiltMapper(cfg, spoil))

    return SpoiltTrainer


def nan_pixel(sample: dict[str, Any]) -> None:
    sample["image"] = sample["image"].float()
    sample["image"][1, 20, 30] = torch.nan


def nan_box(sample: dict[str, Any]) -> None:
    sample["instances"].gt_boxes.tensor[0, 2] = torch.nan


class Root(nn.Module):
    """Adds nothing, by a square root whose slope at zero is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (0 * x).sqrt()


def train_where_one_is_bad(json_file: str, output: str) -> None:
    """One of two processes, the second of which meets a bad image; leaves what it was told.

    First with a detector whose losses are then NaN, and after that, in the last iteration, with one
    whose forward pass fails in that process alone.
    """
    register(Path(json_file))
    kind = spoilt_trainer(nan_pixel) if comm.get_rank() == 1 else Trainer
    for name, overrides in (("retina", RETINA), ("rcnn", OURS)):
        steps = {"SOLVER__MAX_ITER": 3, "SOLVER__CHECKPOINT_PERIOD": 1, "TEST__EVAL_PERIOD": 0}
        try:
            trainer = kind(tiny_config(Path(output, name), **{**overrides, **steps}))
            # the second process goes on only when the first one has written its checkpoint
            wait = CallbackHook(after_step=lambda trainer: comm.synchronize())
            trainer.register_hooks([wait])
            trainer.train()
        except DivergedError as error:
            Path(output, f"{name}{comm.get_rank()}.txt").write_text(str(error))
            if name == "rcnn":
                raise
