"""Loading a weight file into a network by matching its keys, and logging what was loaded."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager
from typing import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpn_plugin.bottom_up.image_channels import adapt_weight
from fpn_plugin.checkpoint.files import KEY, read_state_dict
from fpn_plugin.checkpoint.key_matching import KeyMatching, match_keys, surplus_blocks

logger = logging.getLogger(__name__)

_STATISTICS = ("running_mean", "running_var")
# The libraries' names for the classifier, which a feature network does not have
_CLASSIFIER = re.compile(
    r"^(fc\d*|heads?|head_dist|classif(ier)?|aux_classifier|linear|last_linear|logits)\."
)


def load_weights(module: nn.Module, path: str, key: str = KEY, prefix: str = "") -> list[str]:
    """Load a weight file into `module`, and log what matched, was missing or left over.

    The file may have another library's keys for the same network, and prefixes of modules around
    it: see :func:`fpn_plugin.checkpoint.key_matching.match_keys`. No code of the file is run.
    Counters of batches are neither required nor reported.

    Args:
        path: see :func:`fpn_plugin.checkpoint.files.read_weights`.
        key: the config key or option that named the file, for messages.
        prefix: one that the file's keys may have, beside the usual ones.

    Returns:
        the names of the network's tensors that the file does not have.

    Raises:
        FileNotFoundError: if there is no such file, or it cannot be fetched.
        ImportError: if it is a safetensors file and safetensors is not installed.
        ValueError: if it cannot be read, nothing in it matches, or a tensor has another shape than
            the network's.
    """
    return load_tensors(module, read_state_dict(path, key), path, key, prefix)


def load_tensors(
    module: nn.Module, given: Mapping[str, Tensor], source: str, key: str = KEY, prefix: str = ""
) -> list[str]:
    """Load tensors as :func:`load_weights` does those of a file.

    Args:
        source: where they are from, for messages.
    """
    title, wanted = f"{key}: {source}", module.state_dict()
    matching = match_keys(wanted, given, prefix)
    if not matching.pairs:
        raise ValueError(
            f"{key}: nothing in {source} matches the network: it has {few(list(given))}, the"
            f" network has {few(list(wanted))}"
        )
    found = {name: given[name_in_file] for name, name_in_file in matching.pairs.items()}
    state = adapt_image_channels(found, wanted, title)
    _check_shapes(title, matching, state, wanted)
    with kept_statistics(module, state):
        module.load_state_dict(state, strict=False)
    missing = [name for name in _without_counters(wanted) if name not in matching.pairs]
    _report(title, module, matching, given, missing)
    return missing


def holds_network(
    network: nn.Module, shapes: Mapping[str, torch.Size], prefixes: Sequence[str]
) -> bool:
    """Whether a detector's checkpoint has every tensor of its bottom-up network.

    Args:
        shapes: of the checkpoint's tensors, by name.
        prefixes: of the network's names in it.
    """
    state = network.state_dict()
    return all(
        any(shapes.get(prefix + name) == state[name].shape for prefix in prefixes)
        for name in _without_counters(state)
    )


def adapt_image_channels(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], title: str
) -> dict[str, Tensor]:
    """A state dict whose first convolution fits images of other than three channels: see
    :func:`adapt_weight`.

    Args:
        state: by the names of the network; what has another shape for other reasons stays as it is.
        wanted: the network's own.
        title: of the file, for the log.
    """
    adapted = dict(state)
    for name, x in state.items():
        shape = wanted[name].shape if name in wanted else ()
        if x.ndim != 4 or len(shape) != 4 or not (x.shape[1] == 3 != shape[1]):
            continue
        if shape[:1] + shape[2:] == x.shape[:1] + x.shape[2:]:
            adapted[name] = adapt_weight(x, shape[1])
            how = "summed for one" if shape[1] == 1 else f"repeated for {shape[1]}"
            logger.info("%s: the three input channels of %s are %s", title, name, how)
    return adapted


@contextmanager
def kept_statistics(module: nn.Module, state: Collection[str]) -> Iterator[None]:
    """While a state dict is loaded: the running statistics of frozen norms of which it has nothing
    stay as they are.

    Detectron2 resets them where a state dict has no version. That is right only if it has the
    affine of the norm alone, as Caffe2's files do: the statistics are in it.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    for name, norm in module.named_modules():
        if isinstance(norm, FrozenBatchNorm2d):
            prefix = f"{name}." if name else ""
            absent = [leaf for leaf in _STATISTICS if prefix + leaf not in state]
            is_affine = any(prefix + leaf in state for leaf in ("weight", "bias"))
            if len(absent) < len(_STATISTICS) or not is_affine:
                kept += [(x, x.clone()) for x in (getattr(norm, leaf) for leaf in absent)]
    yield
    for x, before in kept:
        x.copy_(before)


def _check_shapes(
    title: str, matching: KeyMatching, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    wrong = [
        f"{_named(name, source)} is {tuple(state[name].shape)} in the file,"
        f" {tuple(wanted[name].shape)} in the network"
        for name, source in matching.pairs.items()
        if state[name].shape != wanted[name].shape
    ]
    if wrong:
        fit = f"{len(matching.pairs) - len(wrong)} of the network's {len(wanted)} tensors fit"
        more = f"; {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{title} does not fit: {'; '.join(wrong[:5])}{more}; {fit}")


def _report(
    title: str,
    module: nn.Module,
    matching: KeyMatching,
    given: Mapping[str, Tensor],
    missing: Sequence[str],
) -> None:
    """Log one line that says how much of the network the file has, and a table of names below."""
    wanted = module.state_dict()
    matched = _without_counters(matching.pairs)
    affine = _affine(module, missing, given)
    unset = [name for name in missing if name not in affine]
    rows = [("matched", matched, ""), ("missing", unset, "")]
    rows.append(
        ("missing", affine, "statistics of frozen norms: the file has them in their affine")
    )
    rows += _left_over(given, matching)
    table = "".join(
        f"\n  {status:<9} {len(names):>5}  {few(names)}{f' ({remark})' if remark else ''}"
        for status, names, remark in rows
        if names
    )
    blocks = _deeper_blocks(given, matching)
    deeper = (
        f"; it has {len(blocks)} more blocks in the stages that matched ({few(blocks)}): is it of"
        " a deeper network?"
        if blocks
        else ""
    )
    if not unset:
        text = (
            f"all {len(_without_counters(wanted))} tensors of the network are in the file{deeper}"
        )
        logger.log(logging.WARNING if blocks else logging.INFO, "%s: %s%s", title, text, table)
        return
    share = sum(wanted[n].numel() for n in matched) / sum(
        wanted[n].numel() for n in [*matched, *unset]
    )
    logger.warning(
        "%s: only %d of the network's %d tensors are in the file (%.1f%% of its numbers);"
        " the others keep their initial values%s%s",
        *(title, len(matched), len(_without_counters(wanted)), 100 * share, deeper, table),
    )


def _affine(module: nn.Module, missing: Sequence[str], given: Iterable[str]) -> list[str]:
    """The missing statistics that a Caffe2 file does not need, as its norms only scale and shift.

    With its initial mean 0 and variance 1 a frozen norm computes the same; a trainable one does
    not.
    """
    if any(name.endswith(_STATISTICS) for name in given):
        return []
    statistics = [name for name in missing if name.endswith(_STATISTICS)]
    owners = {name: module.get_submodule(name.rpartition(".")[0]) for name in statistics}
    return [name for name, owner in owners.items() if not isinstance(owner, _BatchNorm)]


def _deeper_blocks(given: Iterable[str], matching: KeyMatching) -> list[str]:
    """See :func:`surplus_blocks`; those of the classifier do not count."""
    used, prefix = set(matching.pairs.values()), matching.prefix
    inside = [name for name in _without_counters(given) if name.startswith(prefix)]
    rest = [name[len(prefix) :] for name in inside if name not in used]
    matched = [name[len(prefix) :] for name in inside if name in used]
    return surplus_blocks([name for name in rest if not _CLASSIFIER.match(name)], matched)


def _left_over(given: Iterable[str], matching: KeyMatching) -> list[tuple[str, list[str], str]]:
    """The rows of the table for tensors of the file that the network does not have."""
    used, prefix = set(matching.pairs.values()), matching.prefix
    unused = [name for name in _without_counters(given) if name not in used]
    inside = [name for name in unused if name.startswith(prefix)]
    classifier = [name for name in inside if _CLASSIFIER.match(name[len(prefix) :])]
    return [
        ("left over", [name for name in inside if name not in classifier], ""),
        ("left over", classifier, "the classifier, which a pyramid does not use"),
        ("left over", [n for n in unused if n not in inside], f"not below {prefix!r}"),
    ]


def _without_counters(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _named(name: str, source: str) -> str:
    return name if name == source else f"{name} ({source})"


def few(names: Sequence[str], count: int = 4) -> str:
    """The first few names as a text."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
