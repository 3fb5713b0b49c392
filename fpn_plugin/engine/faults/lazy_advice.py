"""What a Python config (LazyConfig) says where training diverges or memory runs out: its keys, with
their present values."""

from __future__ import annotations

from typing import Sequence

from omegaconf import DictConfig, OmegaConf

from fpn_plugin.engine.faults.memory import shown
from fpn_plugin.engine.faults.watched import DivergenceRules

_RATE = ("optimizer.lr", "train.amp.enabled")
_TRAINING = (
    "dataloader.train.total_batch_size",
    "train.amp.enabled",
    "model.backbone.recompute",
    "model.backbone.out_channels",
)


def divergence_rules(cfg: DictConfig) -> DivergenceRules:
    """When training stops.

    Raises:
        ValueError: if `train.max_loss_ratio` is neither 0 nor more than 1.
    """
    ratio = cfg.train.get("max_loss_ratio", DivergenceRules.max_ratio)
    advice = f"a lower rate, clipped gradients, no AMP: {', '.join(_present(cfg, _RATE))}"
    return DivergenceRules(ratio, "train.max_loss_ratio", advice, cfg.train.output_dir)


def training_hints(cfg: DictConfig, sizes: Sequence[tuple[int, ...]] = ()) -> list[str]:
    """What to lower, or to switch on, where training runs out of memory.

    Args:
        sizes: heights and widths in pixels of the last batch's images.
    """
    return [*_present(cfg, _TRAINING), _images(cfg, "train") + shown(sizes)]


def evaluation_hints(cfg: DictConfig) -> list[str]:
    """The same where an evaluation does."""
    return [_images(cfg, "test"), *_present(cfg, ("train.amp.enabled",))]


def _images(cfg: DictConfig, half: str) -> str:
    resize = f"dataloader.{half}.mapper.augmentations[0]"
    return " and ".join(_present(cfg, [f"{resize}.short_edge_length", f"{resize}.max_size"]))


def _present(cfg: DictConfig, keys: Sequence[str]) -> list[str]:
    return [f"{key} ({OmegaConf.select(cfg, key, default='not set')})" for key in keys]
