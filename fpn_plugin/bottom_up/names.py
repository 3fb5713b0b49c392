"""Which tensor of a weight file is which of a network: one network, named by several libraries."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import Iterable, Mapping

# What other modules call the network that they hold: a name may begin with several of these
_HOLDERS = frozenset(
    "module model backbone bottom_up body encoder net network trunk _orig_mod img_backbone".split()
)

# Detectron2's names of a ResNet -> torchvision's, which are timm's too
_SPELLINGS = (
    (re.compile(r"^stem\.conv1\.norm\."), "bn1."),
    (re.compile(r"^stem\.conv1\."), "conv1."),
    (re.compile(r"^linear\."), "fc."),
    (re.compile(r"^res([2-5])\."), lambda found: f"layer{int(found[1]) - 1}."),
    (re.compile(r"\.conv(\d)\.norm\."), r".bn\1."),
    (re.compile(r"\.shortcut\.norm\."), ".downsample.1."),
    (re.compile(r"\.shortcut\."), ".downsample.0."),
    # in the DenseNet files that torchvision publishes and renames when it loads them itself
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
)


_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Matching:
    """How the names of a file and of a network belong together.

    Attributes:
        pairs: the file's name of each tensor of the network that the file has.
        prefix: what the file's names have before the network's own.
    """

    pairs: Mapping[str, str]
    prefix: str


def match_names(wanted: Iterable[str], given: Iterable[str], prefix: str = "") -> Matching:
    """Find the tensors of a network in a file.

    Both sides may have the names of modules that hold the network before its own; of all such
    prefixes those by which most tensors match count, and of these the shortest. Then equal names
    belong together, and names that are equal in the spelling of :func:`canonical`, where that
    leaves no choice.

    Args:
        wanted: the network's names.
        given: the file's names.
        prefix: another one that the file's names may have.
    """
    wanted, given = list(wanted), list(given)
    best = Matching({}, "")
    ours, theirs = prefixes(wanted), prefixes(given)
    for own, other in product(
        ours, theirs if not prefix or prefix in theirs else [*theirs, prefix]
    ):
        pairs = _pairs(_without(own, wanted), _without(other, given))
        if len(pairs) > len(best.pairs):
            best = Matching(pairs, other)
    return best


def prefixes(names: Iterable[str]) -> list[str]:
    """What could stand before a network's own names: "", "module.", "backbone.bottom_up.", ..."""
    found = {""}
    for name in names:
        words = name.split(".")[:-1]
        prefix = ""
        for i, word in enumerate(words):
            if word not in _HOLDERS and not (i and word.isdigit()):
                break
            prefix += f"{word}."
            found.add(prefix)
    return sorted(found, key=lambda item: (len(item), item))


def lost_blocks(given: Iterable[str], matched: Iterable[str]) -> list[str]:
    """Modules of a file that are numbered like matched ones beside them in one stage.

    What the network lacks of them is missing from its middle: `layer1.2` beside a matched
    `layer1.1`. A stage is a module with a number in its name, so that whole stages after the last
    that the network has (`layer4`, `blocks.6`, `features.7`) do not count.

    Args:
        given: names of tensors that nothing matches.
        matched: names of tensors that match, as the file has them.
    """
    beside: set[str] = set()
    for name in matched:
        beside.update(_numbered(module) for module in _modules(name))
    own = {module for name in matched for module in _modules(name)}
    found: dict[str, None] = {}
    for name in given:
        new = next((module for module in _modules(name) if module not in own), "")
        stage, _, last = new.rpartition(".")
        if _DIGITS.search(stage) and _DIGITS.search(last) and _numbered(new) in beside:
            found[new] = None
    return list(found)


def canonical(name: str) -> str:
    """One spelling for the names that libraries give one tensor.

    A ResNet's are torchvision's, and dots and underscores are one: timm's feature networks write
    `stages_0` for `stages.0`.
    """
    for pattern, spelling in _SPELLINGS:
        name = pattern.sub(spelling, name)
    return name.replace("_", ".")


def _modules(name: str) -> list[str]:
    """The modules that hold a tensor, from the outermost: "a", "a.0", "a.0.conv"."""
    words = name.split(".")[:-1]
    return [".".join(words[: i + 1]) for i in range(len(words))]


def _numbered(module: str) -> str:
    """A module's name with # for the numbers in its last word: its siblings have the same."""
    stage, dot, last = module.rpartition(".")
    return stage + dot + _DIGITS.sub("#", last)


def _without(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """The names that begin with the prefix, by what follows it."""
    return {name[len(prefix) :]: name for name in names if name.startswith(prefix)}


def _pairs(wanted: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    ours, theirs = _by_spelling(wanted), _by_spelling(given)
    pairs = {}
    for name, full in wanted.items():
        spelling = canonical(name)
        if name in given:
            pairs[full] = given[name]
        elif ours[spelling] and (found := theirs.get(spelling)):
            pairs[full] = given[found]
    return pairs


def _by_spelling(names: Iterable[str]) -> dict[str, str]:
    """Each name by its canonical spelling; "" where several have the same."""
    found: dict[str, str] = {}
    for name in names:
        spelling = canonical(name)
        found[spelling] = "" if spelling in found else name
    return found
