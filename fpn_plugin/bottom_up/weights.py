"""Loading a weight file into a bottom-up network, and saying what of it fitted."""

from __future__ import annotations

import logging
import re
from typing import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpn_plugin.bottom_up.names import Matching, lost_blocks, match_names
from fpn_plugin.bottom_up.weight_files import KEY, read_state_dict

__all__ = ["KEY", "load_weights", "read_state_dict"]
logger = logging.getLogger(__name__)

_STATISTICS = ("running_mean", "running_var")
# How libraries call the classifier, which a feature network does not have
_CLASSIFIER = re.compile(
    r"^(fc\d*|heads?|head_dist|classif(ier)?|aux_classifier|linear|last_linear|logits)\."
)


def load_weights(module: nn.Module, path: str, key: str = KEY, prefix: str = "") -> list[str]:
    """Load a weight file into `module` by name, and log what matched, was missing or left over.

    The names may be those of another library for the same network, with the names of modules that
    hold it before them: see :func:`fpn_plugin.bottom_up.names.match_names`. No code of the file is
    run. What only counts batches is neither asked for nor reported.

    Args:
        path: see :func:`fpn_plugin.bottom_up.weight_files.read_state_dict`.
        key: the config key or option that named the file, for messages.
        prefix: what the names in the file may have before the network's own, beside the usual.

    Returns:
        the names of the network's tensors that the file does not have.

    Raises:
        FileNotFoundError: if there is no such file, or it cannot be fetched.
        ImportError: if it is a safetensors file and safetensors is not installed.
        ValueError: if it cannot be read, nothing in it matches, or a tensor has another shape than
            the network's.
    """
    given, wanted = read_state_dict(path, key), module.state_dict()
    matching = match_names(wanted, given, prefix)
    if not matching.pairs:
        raise ValueError(
            f"{key}: nothing in {path} matches the network: it has {_few(list(given))}, the"
            f" network has {_few(list(wanted))}"
        )
    _check_shapes(f"{key}: {path}", matching, given, wanted)
    module.load_state_dict({n: given[source] for n, source in matching.pairs.items()}, strict=False)
    missing = [n for n in _counted(wanted) if n not in matching.pairs]
    _report(f"{key}: {path}", module, matching, given, missing)
    return missing


def _check_shapes(
    title: str, matching: Matching, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    wrong = [
        f"{_named(name, source)} is {tuple(given[source].shape)} in the file,"
        f" {tuple(wanted[name].shape)} in the network"
        for name, source in matching.pairs.items()
        if given[source].shape != wanted[name].shape
    ]
    if wrong:
        fit = f"{len(matching.pairs) - len(wrong)} of the network's {len(wanted)} tensors fit"
        more = f"; {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{title} does not fit: {'; '.join(wrong[:5])}{more}; {fit}")


def _report(
    title: str,
    module: nn.Module,
    matching: Matching,
    given: Mapping[str, Tensor],
    missing: Sequence[str],
) -> None:
    """One line for what the file fills of the network, and a table of names below it."""
    wanted = module.state_dict()
    matched = _counted(matching.pairs)
    affine = _affine(module, missing, given)
    lost = [name for name in missing if name not in affine]
    rows = [("matched", matched, ""), ("missing", lost, "")]
    rows.append(
        ("missing", affine, "statistics of frozen norms: the file has them in their affine")
    )
    rows += _left_over(given, matching)
    table = "".join(
        f"\n  {kind:<9} {len(names):>5}  {_few(names)}{f' ({remark})' if remark else ''}"
        for kind, names, remark in rows
        if names
    )
    blocks = _lost_blocks(given, matching)
    more = (
        f"; it has {len(blocks)} more blocks in the stages that matched ({_few(blocks)}): is it of"
        " a deeper network?"
        if blocks
        else ""
    )
    if not lost:
        what = f"all {len(_counted(wanted))} tensors of the network are in the file{more}"
        logger.log(logging.WARNING if blocks else logging.INFO, "%s: %s%s", title, what, table)
        return
    share = sum(wanted[n].numel() for n in matched) / sum(
        wanted[n].numel() for n in [*matched, *lost]
    )
    logger.warning(
        "%s: only %d of the network's %d tensors are in the file (%.1f%% of its numbers);"
        " the others keep their initial values%s%s",
        *(title, len(matched), len(_counted(wanted)), 100 * share, more, table),
    )


def _affine(module: nn.Module, missing: Sequence[str], given: Iterable[str]) -> list[str]:
    """Statistics that a file from Caffe2 lacks because its norms are only scale and shift.

    A frozen norm computes the same with its initial mean 0 and variance 1; one that trains
    does not.
    """
    if any(name.endswith(_STATISTICS) for name in given):
        return []
    statistics = [name for name in missing if name.endswith(_STATISTICS)]
    owners = {name: module.get_submodule(name.rpartition(".")[0]) for name in statistics}
    return [name for name, owner in owners.items() if not isinstance(owner, _BatchNorm)]


def _lost_blocks(given: Iterable[str], matching: Matching) -> list[str]:
    """See :func:`lost_blocks`; the classifier may be as deep as it wants."""
    used, prefix = set(matching.pairs.values()), matching.prefix
    inside = [name for name in _counted(given) if name.startswith(prefix)]
    rest = [name[len(prefix) :] for name in inside if name not in used]
    matched = [name[len(prefix) :] for name in inside if name in used]
    return lost_blocks([name for name in rest if not _CLASSIFIER.match(name)], matched)


def _left_over(given: Iterable[str], matching: Matching) -> list[tuple[str, list[str], str]]:
    """Rows of the table for what the network has no place for."""
    used, prefix = set(matching.pairs.values()), matching.prefix
    unused = [name for name in _counted(given) if name not in used]
    inside = [name for name in unused if name.startswith(prefix)]
    classifier = [name for name in inside if _CLASSIFIER.match(name[len(prefix) :])]
    return [
        ("left over", [name for name in inside if name not in classifier], ""),
        ("left over", classifier, "the classifier, which a pyramid does not use"),
        ("left over", [n for n in unused if n not in inside], f"not below {prefix!r}"),
    ]


def _counted(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _named(name: str, source: str) -> str:
    return name if name == source else f"{name} ({source})"


def _few(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
