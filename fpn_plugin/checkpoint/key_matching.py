"""Matching the keys of a weight file with a network's, across the libraries' naming schemes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import Iterable, Mapping

# The names under which other modules hold a network: a key may begin with several of these
_HOLDERS = frozenset(
    "module model backbone bottom_up body encoder net network trunk _orig_mod img_backbone".split()
)

# Detectron2's keys of a ResNet -> torchvision's, which timm shares
_SPELLINGS = (
    (re.compile(r"^stem\.conv1\.norm\."), "bn1."),
    (re.compile(r"^stem\.conv1\."), "conv1."),
    (re.compile(r"^linear\."), "fc."),
    (re.compile(r"^res([2-5])\."), lambda match: f"layer{int(match[1]) - 1}."),
    (re.compile(r"\.conv(\d)\.norm\."), r".bn\1."),
    (re.compile(r"\.shortcut\.norm\."), ".downsample.1."),
    (re.compile(r"\.shortcut\."), ".downsample.0."),
    # torchvision's published DenseNet files, whose keys it converts itself while loading
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
)

# Other libraries' pyramids, whose maps are numbered from the finest: torchvision's (`0`: a
# convolution, `1`: its norm; old files have neither) and MMDetection's
_OTHER_FPN = re.compile(
    r"(backbone\.fpn\.|neck\.)(inner_blocks|lateral_convs|layer_blocks|fpn_convs)\.(\d+)\.(.+)"
)
_OTHER_TOP = re.compile(r"backbone\.fpn\.extra_blocks\.(p\d+\.\w+)")
_LATERALS = ("inner_blocks", "lateral_convs")
_OUR_LATERAL = re.compile(r"backbone\.fpn_lateral(\d+)\.")

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class KeyMatching:
    """How the keys of a network and of a file correspond.

    Attributes:
        pairs: the file's key of each tensor of the network that the file has.
        prefix: of the file's keys, before the network's own.
    """

    pairs: Mapping[str, str]
    prefix: str


def match_keys(
    network_keys: Iterable[str], file_keys: Iterable[str], prefix: str = ""
) -> KeyMatching:
    """Find the tensors of a network in a file.

    On both sides the keys may begin with the names of modules that hold the network. Of all such
    prefixes those with which most tensors match are taken, and of these the shortest. Then equal
    keys match, and keys with the same :func:`canonical_key` where that is unambiguous.

    Args:
        prefix: another one that the file's keys may have.
    """
    network_keys, file_keys = list(network_keys), list(file_keys)
    file_prefixes = holder_prefixes(file_keys)
    if prefix and prefix not in file_prefixes:
        file_prefixes.append(prefix)
    best = KeyMatching({}, "")
    for network_prefix, file_prefix in product(holder_prefixes(network_keys), file_prefixes):
        pairs = _pairs(_strip(network_prefix, network_keys), _strip(file_prefix, file_keys))
        if len(pairs) > len(best.pairs):
            best = KeyMatching(pairs, file_prefix)
    return best


def match_detector(model_keys: Iterable[str], file_keys: Iterable[str]) -> dict[str, str]:
    """Find the network and the pyramid of a Detectron2 detector in a file that has other names for
    them: a model's of torchvision or MMDetection, or a checkpoint with the same network from
    elsewhere.

    The heads of torchvision's detectors are left out: they compute something else from tensors of
    the same names, as the background is their first class.

    Returns:
        the file's key of each tensor that was found; {} if the network has the model's own names in
        the file, or is not found.
    """
    model_keys, file_keys = list(model_keys), list(file_keys)
    network = network_keys(model_keys)
    others = [key for key in file_keys if key.startswith("backbone.")]
    if not network or not others or set(network) & set(file_keys):
        return {}
    pairs = dict(match_keys(network, others).pairs)
    if not pairs:
        return {}
    is_torchvisions = any(key.startswith(("backbone.body.", "backbone.fpn.")) for key in others)
    known = set(model_keys)
    pairs |= {} if is_torchvisions else {key: key for key in file_keys if key in known}
    levels = [int(m[1]) for m in map(_OUR_LATERAL.match, model_keys) if m]
    matches = [m for m in map(_OTHER_FPN.fullmatch, file_keys) if m]
    laterals = {int(m[3]) for m in matches if m[2] in _LATERALS}
    for m in matches if levels else ():
        # both end at the network's last map
        level = max(levels) - max(laterals, default=0) + int(m[3])
        pairs[f"backbone.{_our_node(m[2], level, max(levels))}.{_our_leaf(m[4])}"] = m[0]
    pairs |= {f"backbone.top_block.{m[1]}": m[0] for m in map(_OTHER_TOP.fullmatch, file_keys) if m}
    return {name: source for name, source in pairs.items() if name in known}


def network_keys(model_keys: Iterable[str]) -> list[str]:
    """Of a detector's keys those of the network below its pyramid, or of its whole backbone."""
    backbone = [key for key in model_keys if key.startswith("backbone.")]
    return [key for key in backbone if key.startswith("backbone.bottom_up.")] or backbone


def _our_node(module: str, level: int, last: int) -> str:
    """The node that a list of another library's pyramid has for a level."""
    if module in _LATERALS:
        return f"fpn_lateral{level}"
    return f"fpn_output{level}" if level <= last else f"top_block.p{level}"


def _our_leaf(leaf: str) -> str:
    """`weight` and `norm.weight` for what other libraries call `0.weight`, `bn.weight`, ..."""
    return re.sub(r"^(1|bn|gn|ln|norm)\.", "norm.", re.sub(r"^(0|conv)\.", "", leaf))


def holder_prefixes(keys: Iterable[str]) -> list[str]:
    """The prefixes of keys that may belong to modules around a network, shortest first: "",
    "module.", "backbone.bottom_up.", ..."""
    prefixes = {""}
    for key in keys:
        prefix = ""
        for i, word in enumerate(key.split(".")[:-1]):
            if word == "features":  # torchvision's, whose detectors hold them under other names
                prefixes.add(f"{prefix}features.")
            if word not in _HOLDERS and not (i and word.isdigit()):
                break
            prefix += f"{word}."
            prefixes.add(prefix)
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))


def surplus_blocks(unmatched: Iterable[str], matched: Iterable[str]) -> list[str]:
    """The blocks by which the file's network is deeper, within stages that both networks have.

    Such a block is a module numbered like a matched one of the same stage: `layer1.2` beside a
    matched `layer1.1`. A stage is a module with a number in its name, so whole stages after the
    network's last (`layer4`, `blocks.6`, `features.7`) do not count.

    Args:
        unmatched: the file's keys that match nothing.
        matched: the file's keys that match.
    """
    matched_modules = {module for key in matched for module in _modules(key)}
    siblings = {_number_sign(module) for module in matched_modules}
    blocks: dict[str, None] = {}
    for key in unmatched:
        module = next((module for module in _modules(key) if module not in matched_modules), "")
        stage, _, block = module.rpartition(".")
        if _DIGITS.search(stage) and _DIGITS.search(block) and _number_sign(module) in siblings:
            blocks[module] = None
    return list(blocks)


def canonical_key(key: str) -> str:
    """One spelling of the keys that libraries have for the same tensor.

    A ResNet's are torchvision's. Dots and underscores are the same: timm's feature networks have
    `stages_0` for `stages.0`.
    """
    for pattern, spelling in _SPELLINGS:
        key = pattern.sub(spelling, key)
    return key.replace("_", ".")


def _modules(key: str) -> list[str]:
    """The modules that contain a tensor, from the outermost: "a", "a.0", "a.0.conv"."""
    words = key.split(".")[:-1]
    return [".".join(words[: i + 1]) for i in range(len(words))]


def _number_sign(module: str) -> str:
    """A module's name with # for the numbers in its last word, the same for its siblings."""
    stage, dot, last = module.rpartition(".")
    return stage + dot + _DIGITS.sub("#", last)


def _strip(prefix: str, keys: Iterable[str]) -> dict[str, str]:
    """The keys with this prefix, by what follows it."""
    return {key[len(prefix) :]: key for key in keys if key.startswith(prefix)}


def _pairs(network: Mapping[str, str], file: Mapping[str, str]) -> dict[str, str]:
    """The full keys that match; both sides give them by their keys without a prefix."""
    network_spellings, file_spellings = _by_spelling(network), _by_spelling(file)
    pairs = {}
    for key, full_key in network.items():
        spelling = canonical_key(key)
        if key in file:
            pairs[full_key] = file[key]
        elif network_spellings[spelling] and file_spellings.get(spelling):
            pairs[full_key] = file[file_spellings[spelling]]
    return pairs


def _by_spelling(keys: Iterable[str]) -> dict[str, str]:
    """Each key by its canonical spelling; "" where several have the same."""
    spellings: dict[str, str] = {}
    for key in keys:
        spelling = canonical_key(key)
        spellings[spelling] = "" if spelling in spellings else key
    return spellings
