"""Cheaper inference with the same results: folding norms into the convolutions before them, and
casting weights once. Both change the model in place;
:func:`fpn_plugin.modeling.speed.prepare_for_inference` passes a copy."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from typing import Any, Iterator

import torch
from detectron2.layers import Conv2d as Detectron2Conv2d
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.fusion import fuse_conv_bn_weights

logger = logging.getLogger(__name__)

_CASTABLE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def fold_norms(model: nn.Module) -> int:
    """Fold every norm with fixed statistics into the convolution that it follows.

    Which convolution that is follows from the structure for Detectron2's `Conv2d` (and so for the
    pyramid's blocks) and for `nn.Sequential`; :func:`fold_traced` finds the others. Norms that
    compute their statistics from the map, and convolutions that compute their weights as they run,
    are left alone. A block of parallel convolutions then becomes one, if it has a method
    `merge_branches` (the pyramid's `rep`).

    Returns:
        the number of norms that are gone.
    """
    uses = _count_uses(model)
    pairs = [(owner, *pair) for owner in model.modules() for pair in _neighbours(owner)]
    count = sum(_fold(conv, owner, name, uses) for owner, conv, name in pairs)
    blocks: list[Any] = [each for each in model.modules() if hasattr(each, "merge_branches")]
    for block in blocks:
        parts = [*block.modules(), *block.parameters()]
        if all(uses[id(part)] <= 1 for part in parts):  # none is another's too
            block.merge_branches()
    return count


def fold_traced(network: nn.Module) -> int:
    """:func:`fold_norms` for a network whose `forward` alone determines the order of its layers.

    torch.fx traces that order. A norm is folded if nothing else reads the convolution's map. If
    torch.fx cannot trace the network, its norms are kept and a warning is logged.
    """
    if not any(_is_fixed(module) for module in network.modules()):
        return 0
    try:
        nodes = _LayerTracer().trace(network).nodes
    except Exception as error:  # whatever a forward raises when it is given torch.fx's proxies
        logger.warning(f"Batch norms are not folded, since torch.fx cannot trace it: {error}")
        return 0
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    uses = _count_uses(network)
    count = 0
    for node in nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        if calls[node.target] == calls[source.target] == 1:
            owner, _, name = node.target.rpartition(".")
            conv = network.get_submodule(str(source.target))
            count += _fold(conv, network.get_submodule(owner), name, uses)
    return count


class _LayerTracer(fx.Tracer):
    """Records convolutions and norms as one call each."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_layer = isinstance(m, nn.Conv2d) or _is_fixed(m)
        return is_layer or super().is_leaf_module(m, module_qualified_name)


def _count_uses(model: nn.Module) -> Counter[int]:
    """The number of places in the model that use each module and each parameter, by id."""
    modules = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return modules + Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )


def _neighbours(owner: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Each convolution with the name of what follows it in the module `owner`."""
    if isinstance(owner, Detectron2Conv2d) and isinstance(owner.norm, nn.Module):
        yield owner, "norm"
    if type(owner) is nn.Sequential:
        children = list(owner.named_children())
        for (_, conv), (name, _) in zip(children, children[1:]):
            if getattr(conv, "norm", None) is None and getattr(conv, "activation", None) is None:
                yield conv, name


def _fold(conv: Any, owner: nn.Module, name: str, uses: Counter[int]) -> bool:
    """Fold the child `name` of `owner` into a convolution, if that is possible."""
    norm = getattr(owner, name)
    if not (_is_plain(conv) and _is_fixed(norm)):
        return False
    if max(uses[id(conv)], uses[id(conv.weight)], uses[id(norm)]) > 1:
        return False  # shared: another reader would get the norm too
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    # timm's batch norms also have a dropout and an activation
    rest = [getattr(norm, part, nn.Identity()) for part in ("drop", "act")]
    rest = [module for module in rest if not isinstance(module, nn.Identity)]
    setattr(owner, name, nn.Sequential(*rest) if rest else nn.Identity())
    return True


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a convolution that uses its weights as they are.

    A subclass may compute others from them, as timm's `StdConv2d` does.
    """
    plain: tuple[Any, ...] = (nn.Conv2d._conv_forward, nn.Conv2d.forward, Detectron2Conv2d.forward)
    timm = sys.modules.get("timm.layers")
    if timm is not None:
        plain += (timm.Conv2dSame.forward,)
    # a pyramid's blocks that activate first are Detectron2's convolutions otherwise
    return isinstance(module, nn.Conv2d) and (
        type(module).forward in plain or hasattr(module, "pre_activation")
    )


def _is_fixed(norm: nn.Module) -> bool:
    """Whether it is a batch norm that uses its running statistics."""
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        return False
    if isinstance(norm, _NormBase):
        return not norm.training
    # torchvision's and timm's frozen norms have Detectron2's attributes, but no common base
    return "Frozen" in type(norm).__name__


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of convolutions and linear layers once, as autocast does in every forward
    pass.

    Nothing else changes its type, and the results under autocast stay the same.
    """
    for module in model.modules():
        if not (type(module) in _CASTABLE or _is_plain(module)):
            continue
        for name in ("weight", "bias"):
            value = getattr(module, name)
            if isinstance(value, nn.Parameter) and value.dtype == torch.float32:
                setattr(module, name, nn.Parameter(value.detach().to(dtype), requires_grad=False))
