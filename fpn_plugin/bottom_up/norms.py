"""What the norms of a network become, for a network of any library.

Batch norms come as torch's, torchvision's, Detectron2's and timm's classes, frozen or not; timm's
carry an activation. What replaces them keeps the names `weight`, `bias` (and `running_mean`,
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

_PLAIN = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d)


def convert_norms(module: nn.Module, norm: str, where: str) -> None:
    """Replace every batch norm of `module` by `norm`, in place; what is frozen stays so.

    Args:
        norm: FrozenBN, BN, SyncBN or GN (32 groups, or as many of the numbers below that divide the
            channels); "" leaves all as it is.
        where: the network's name, for messages.

    Raises:
        ValueError: if the network has no batch norms. (KeyError for an unknown norm.)
    """
    if not norm:
        return
    if norm not in NORMS:
        raise unknown_name(KEY, norm, ["", *NORMS])
    found = _batch_norms(module)
    if not found:
        raise ValueError(
            f"{KEY}: {norm!r}: {where} has no batch norms to convert (its norms:"
            f" {', '.join(_norm_names(module)) or 'none'}); leave it empty"
        )
    own = {parameter for old in found.values() for parameter in old.parameters()}
    frozen = {name for name in found if _in_frozen_part(module, name, own)}
    for name, old in found.items():
        new = NORMS[norm](_as_batch_norm(old))
        freeze(new.parameters() if name in frozen else ())
        _replace(module, name, new)


def freeze_norm_statistics(module: nn.Module) -> None:
    """Make every batch norm whose parameters are frozen a FrozenBN, in place, as Detectron2
    does."""
    for name, norm in _batch_norms(module).items():
        parameters = list(norm.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            _replace(module, name, _frozen(_as_batch_norm(norm)))


def _batch_norms(module: nn.Module) -> dict[str, Any]:
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, _PLAIN) or _is_frozen_with_activation(child)
    }


def _is_frozen_with_activation(module: nn.Module) -> bool:
    """timm's class for it, without importing timm: nobody can hold one who did not."""
    layers: Any = sys.modules.get("timm.layers.norm_act")
    return layers is not None and isinstance(module, layers.FrozenBatchNormAct2d)


def _norm_names(module: nn.Module) -> list[str]:
    kinds = {type(child).__name__ for child in module.modules()}
    return sorted(kind for kind in kinds if "norm" in kind.lower())


def _in_frozen_part(module: nn.Module, name: str, norms: set[nn.Parameter]) -> bool:
    """Whether the parameters beside a norm are frozen: those of the nearest module around it that
    has any.

    Args:
        norms: the parameters of all norms, which are not looked at.
    """
    while name:
        name = name.rpartition(".")[0]
        beside = [p for p in module.get_submodule(name).parameters() if p not in norms]
        if beside:
            return not any(parameter.requires_grad for parameter in beside)
    return False


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    old = module.get_submodule(name)
    setattr(module.get_submodule(parent), child, new.train(old.training))


def _as_batch_norm(norm: Any) -> Any:
    """The same numbers as a plain or timm's trainable batch norm, whose converters know them."""
    if isinstance(norm, nn.BatchNorm2d):
        return norm
    if hasattr(norm, "act"):
        from timm.layers import BatchNormAct2d

        made = BatchNormAct2d(norm.weight.numel(), eps=norm.eps)
        made.act, made.drop = norm.act, norm.drop
    else:
        made = nn.BatchNorm2d(norm.weight.numel(), eps=norm.eps)
    made = made.to(norm.weight)
    made.momentum = getattr(norm, "momentum", made.momentum)
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        getattr(made, tensor).data.copy_(getattr(norm, tensor))
    return made


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

        made: Any = GroupNormAct(channels, groups)
        made.act, made.drop = norm.act, norm.drop
    else:
        made = nn.GroupNorm(groups, channels)
    if norm.affine:
        made.weight, made.bias = norm.weight, norm.bias
    return made


NORMS: dict[str, Callable[[Any], nn.Module]] = {
    "FrozenBN": _frozen,
    "BN": lambda norm: norm,
    "SyncBN": _synced,
    "GN": _grouped,
}
