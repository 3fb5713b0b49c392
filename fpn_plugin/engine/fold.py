"""What makes a model cheaper to run without changing what it computes, where nothing is learned:
norms folded into the convolutions before them, weights cast once. Both change the model in place;
:func:`fpn_plugin.engine.speed.prepare_for_inference` gives them a copy."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any, Callable, Iterator

import torch
from detectron2.layers import Conv2d as Detectron2Conv2d
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_CASTABLE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def fold_norms(model: nn.Module) -> int:
    """Fold every norm with fixed statistics into the convolution that it follows.

    Which convolution that is follows from the structure alone for Detectron2's `Conv2d` (and so for
    the pyramid's blocks) and for `nn.Sequential`; :func:`fold_traced` finds the others. What
    computes its statistics from the map, and convolutions that change their weights as they run,
    are left alone.

    Returns:
        the number of norms that are gone.
    """
    uses = _uses(model)
    found = 0
    for owner in model.modules():
        for conv, name in _neighbours(owner):
            found += _fold(conv, owner, name, uses)
    return found


def fold_traced(network: nn.Module, image: Tensor) -> int:
    """:func:`fold_norms` for a network whose forward says what follows what: it is run once, and a
    norm is folded if it was the only reader of a convolution's map.

    Args:
        image: what the network is run on.
    """
    watch = _Watch(network)
    with torch.no_grad(), watch:
        given = tree_leaves(network(image))
    uses = _uses(network)
    owners = {
        id(child): (owner, name)
        for owner in network.modules()
        for name, child in owner.named_children()
    }
    return sum(_fold(conv, *owners[id(norm)], uses) for norm, conv in watch.pairs(given))


def _uses(model: nn.Module) -> Counter[int]:
    """How often each module, and each parameter, has a place in the model."""
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


def _fold(conv: nn.Module, owner: nn.Module, name: str, uses: Counter[int]) -> int:
    """Fold the child `name` of `owner` into a convolution if both are fit for it."""
    norm = getattr(owner, name)
    if not (_is_plain(conv) and _is_fixed(norm)):
        return 0
    weight: Any = conv.weight
    if max(uses[id(conv)], uses[id(weight)], uses[id(norm)]) > 1:
        return 0  # shared: what is folded in for one reader would be there for the others
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    layout = torch.channels_last if _is_channels_last(weight) else torch.contiguous_format
    folded = (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype)
    conv.weight = nn.Parameter(folded.contiguous(memory_format=layout), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    setattr(owner, name, _what_remains(norm))
    return 1


def _is_channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a convolution that uses its weights as they are.

    A subclass may compute others from them, as timm's `StdConv2d` does.
    """
    plain: tuple[Any, ...] = (nn.Conv2d._conv_forward, nn.Conv2d.forward, Detectron2Conv2d.forward)
    timm = sys.modules.get("timm.layers")
    if timm is not None:
        plain += (timm.Conv2dSame.forward,)
    # a pyramid's blocks activate first, and then are Detectron2's
    return isinstance(module, nn.Conv2d) and (
        type(module).forward in plain or hasattr(module, "pre_activation")
    )


def _is_fixed(norm: Any) -> bool:
    """Whether it is a batch norm that has its statistics, and uses them."""
    known = all(isinstance(getattr(norm, name, None), Tensor) for name in _STATISTICS)
    learned = isinstance(norm, nn.modules.batchnorm._NormBase)
    if not known or (learned and norm.training) or not hasattr(norm, "eps"):
        return False
    return learned or "Frozen" in type(norm).__name__


_STATISTICS = ("running_mean", "running_var")


def _what_remains(norm: nn.Module) -> nn.Module:
    """Of timm's batch norms: their dropout and their activation."""
    rest = [getattr(norm, name, None) for name in ("drop", "act")]
    left = [module for module in rest if isinstance(module, nn.Module)]
    left = [module for module in left if not isinstance(module, nn.Identity)]
    if not left:
        return nn.Identity()
    return left[0] if len(left) == 1 else nn.Sequential(*left)


class _Watch(TorchFunctionMode):
    """Sees what reads the map of each convolution: the norm that is called with it, and every torch
    function."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # by id; the maps are kept, so that ids stay unique
        self._maps: dict[int, tuple[Tensor, nn.Module]] = {}
        self._readers: Counter[int] = Counter()
        self._norms: list[tuple[int, nn.Module]] = []
        convs = [module for module in network.modules() if _is_plain(module)]
        norms = [module for module in network.modules() if _is_fixed(module)]
        self._hooks = [conv.register_forward_hook(self._note_map) for conv in convs]
        self._hooks += [norm.register_forward_pre_hook(self._note_norm) for norm in norms]

    def _note_map(self, conv: nn.Module, args: tuple, output: Tensor) -> None:
        self._maps[id(output)] = (output, conv)

    def _note_norm(self, norm: nn.Module, args: tuple) -> None:
        self._norms.append((id(args[0]) if id(args[0]) in self._maps else 0, norm))

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not _is_question(func):
            self._readers.update(id(x) for x in tree_leaves((args, kwargs)) if id(x) in self._maps)
        return func(*args, **(kwargs or {}))

    def pairs(self, given: list[Any]) -> list[tuple[nn.Module, nn.Module]]:
        """Each norm with its convolution, where neither ran more than once.

        Args:
            given: what the network returns, which has a reader outside of it.
        """
        for hook in self._hooks:
            hook.remove()
        kept = {id(x) for x in given}
        runs = Counter(id(conv) for _, conv in self._maps.values())
        times = Counter(id(norm) for _, norm in self._norms)
        pairs = [
            (norm, self._maps[key][1])
            for key, norm in self._norms
            if key in self._maps and key not in kept and self._readers[key] == 1
        ]
        return [pair for pair in pairs if times[id(pair[0])] == 1 == runs[id(pair[1])]]


def _is_question(func: Callable) -> bool:
    """Whether a function asks for a tensor's shape or kind, and not for its values."""
    return getattr(func, "__name__", "") in ("__get__", "dim", "size", "numel", "is_floating_point")


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give convolutions and linear layers their weights in the type that autocast would cast them
    to on every forward.

    Nothing else changes its type, and a model under autocast gives the same numbers.
    """
    for module in model.modules():
        castable = type(module) in _CASTABLE or (
            isinstance(module, nn.Conv2d) and _is_plain(module)
        )
        if not castable:
            continue
        for name in ("weight", "bias"):
            value = getattr(module, name)
            if isinstance(value, nn.Parameter) and value.dtype == torch.float32:
                setattr(module, name, nn.Parameter(value.detach().to(dtype), requires_grad=False))
