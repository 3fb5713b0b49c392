"""timm's norms with an activation, also for one value per channel: as `GroupNorm` and `BatchNorm2d`
of fpn_plugin/pyramid/blocks.py. Imported where a network has them, since it needs timm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm import layers
from torch import Tensor, nn


class GroupNormAct(layers.GroupNormAct):
    """timm's, also for a group of one value."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(y))


class BatchNormAct2d(layers.BatchNormAct2d):
    """timm's, also for a batch with one value per channel."""

    def forward(self, x: Tensor) -> Tensor:
        uses_batch = self.training and x.numel() > x.shape[1]
        if uses_batch and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            uses_batch,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(y))


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    layers.GroupNormAct: GroupNormAct,
    layers.BatchNormAct2d: BatchNormAct2d,
}
