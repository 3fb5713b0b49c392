"""Converting the batch norms of a network of any library.

They come as torch's, torchvision's, Detectron2's and timm's classes, frozen or not; timm's include
the activation. Their replacements keep the names `weight` and `bias` (and `running_mean`,
`running_var`), so weight files still match.
"""

from __future__ import annotations

import sys
from typing import Any, Callable

from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from fpn_plugin.bottom_up.base import freeze
from fpn_plugin.registry import unknown_name

KEY = "MODEL.BOTTOM_UP.NORM"
GROUPS = 32

_WITHOUT_ACTIVATION = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    FrozenBatchNorm2d,
    TorchvisionFrozenBatchNorm2d,
)


def convert_norms(module: nn.Module, norm: str, where: str) -> None:
    """Replace every batch norm of `module` by `norm`, in place; frozen layers stay frozen.

    Args:
        norm: FrozenBN, BN, SyncBN or GN (with 32 groups, or the largest number below that divides
            the channels); "" changes nothing.
        where: the network's name, for messages.

    Raises:
        ValueError: if the network has no batch norms. (KeyError for an unknown norm.)
    """
    if not norm:
        return
    if norm not in NORMS:
        raise unknown_name(KEY, norm, ["", *NORMS])
    norms = _batch_norms(module)
    if not norms:
        raise ValueError(
            f"{KEY}: {norm!r}: {where} has no batch norms to convert (its norms:"
            f" {', '.join(_norm_names(module)) or 'none'}); leave it empty"
        )
    affine = {parameter for old in norms.values() for parameter in old.parameters()}
    frozen = {name for name in norms if _is_in_frozen_layer(module, name, affine)}
    for name, old in norms.items():
        new = NORMS[norm](_as_batch_norm(old))
        freeze(new.parameters() if name in frozen else ())
        _replace(module, name, new)


def freeze_norm_statistics(module: nn.Module) -> None:
    """Replace every batch norm whose parameters are frozen by a FrozenBN, in place, as Detectron2
    does."""
    for name, norm in _batch_norms(module).items():
        parameters = list(norm.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            _replace(module, name, _frozen(_as_batch_norm(norm)))


def _batch_norms(module: nn.Module) -> dict[str, Any]:
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, _WITHOUT_ACTIVATION) or _is_frozen_with_activation(child)
    }


def _is_frozen_with_activation(module: nn.Module) -> bool:
    """Whether it is timm's class; timm is not imported, as only its importers can have one."""
    layers: Any = sys.modules.get("timm.layers.norm_act")
    return layers is not None and isinstance(module, layers.FrozenBatchNormAct2d)


def _norm_names(module: nn.Module) -> list[str]:
    classes = {type(child).__name__ for child in module.modules()}
    return sorted(name for name in classes if "norm" in name.lower())


def _is_in_frozen_layer(module: nn.Module, name: str, affine: set[nn.Parameter]) -> bool:
    """Whether the parameters beside a norm are frozen: those of the nearest enclosing module that
    has any.

    Args:
        affine: the parameters of all norms, which do not count.
    """
    while name:
        name = name.rpartition(".")[0]
        beside = [p for p in module.get_submodule(name).parameters() if p not in affine]
        if beside:
            return not any(parameter.requires_grad for parameter in beside)
    return False


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    old = module.get_submodule(name)
    setattr(module.get_submodule(parent), child, new.train(old.training))


def _as_batch_norm(norm: Any) -> Any:
    """The same norm as torch's or timm's trainable class, which the converters accept."""
    if isinstance(norm, nn.BatchNorm2d):
        return norm
    if hasattr(norm, "act"):
        from timm.layers import BatchNormAct2d

        new = BatchNormAct2d(norm.weight.numel(), eps=norm.eps)
        new.act, new.drop = norm.act, norm.drop
    else:
        new = nn.BatchNorm2d(norm.weight.numel(), eps=norm.eps)
    new = new.to(norm.weight)
    new.momentum = getattr(norm, "momentum", new.momentum)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(new, name).data.copy_(getattr(norm, name))
    return new


def _frozen(norm: nn.BatchNorm2d) -> nn.Module:
    if hasattr(norm, "act"):
        from timm.layers import freeze_batch_norm_2d

        return freeze_batch_norm_2d(norm)
    return FrozenBatchNorm2d.convert_frozen_batchnorm(norm)


def _synced(norm: nn.BatchNorm2d) -> nn.Module:
    if hasattr(norm, "act"):
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(norm)
    return nn.SyncBatchNorm.convert_sync_batchnorm(norm)


def _grouped(norm: Any) -> nn.Module:
    channels = norm.num_features
    groups = max(count for count in range(1, GROUPS + 1) if channels % count == 0)
    if hasattr(norm, "act"):
        from timm.layers import GroupNormAct

        new: Any = GroupNormAct(channels, groups)
        new.act, new.drop = norm.act, norm.drop
    else:
        new = nn.GroupNorm(groups, channels)
    if norm.affine:
        new.weight, new.bias = norm.weight, norm.bias
    return new


NORMS: dict[str, Callable[[Any], nn.Module]] = {
    "FrozenBN": _frozen,
    "BN": lambda norm: norm,
    "SyncBN": _synced,
    "GN": _grouped,
}
