"""Who runs against whom in a section: subjects by name, and the pairs whose ratios are wanted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Iterable, Mapping, Sequence

from fpn_plugin.analysis.benchmark.convolutions import convolutions_subject
from fpn_plugin.analysis.benchmark.entrants import Entrant
from fpn_plugin.analysis.benchmark.inference import THRESHOLD, calibrate
from fpn_plugin.analysis.benchmark.inputs import Inputs
from fpn_plugin.analysis.benchmark.peers import PEERS, NoPeer, Ours, Peer
from fpn_plugin.analysis.benchmark.prepare import Ready, prepare, without_levers
from fpn_plugin.analysis.benchmark.subjects import (
    SUBJECTS,
    Subject,
    backward_subject,
    forward_subject,
    given_maps,
)
from fpn_plugin.analysis.visualize.complexity import count_parameters, padded_size
from fpn_plugin.modeling.backbone import PyramidBackbone

_WITH_PEERS = {"neck": forward_subject, "neck_train": backward_subject}


@dataclass(frozen=True)
class Pair:
    """Two contestants that are compared.

    Attributes:
        same: whether they have the same weights, and so must give the same.
        compared: whether their outputs are compared at all.
    """

    contestant: str
    reference: str
    same: bool
    compared: bool = True


@dataclass
class Lineup:
    """A section's contestants, in the order in which they run."""

    subjects: dict[str, Subject] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)


@dataclass(frozen=True)
class PeerOf:
    """A peer and the entrants that it equals: a config and its variants."""

    peer: Peer
    name: str
    entrants: tuple[str, ...]


def peers_of(
    entrants: Sequence[Entrant], names: Sequence[str], inputs: Inputs
) -> tuple[list[PeerOf], list[str]]:
    """Every peer of every pyramid, one for all entrants whose pyramids have the same weights.

    Returns:
        the peers, and for the report why a pyramid has none.

    Raises:
        KeyError: for an unknown peer.
        ImportError: if its package is not installed.
    """
    groups: dict[str, list[Entrant]] = {}
    for one in entrants:
        if isinstance(one.model.backbone, PyramidBackbone):
            groups.setdefault(repr(sorted(one.shapes("neck").items())), []).append(one)
    found, notes = [], []
    for name in names:
        build = PEERS.get(name, "--peers")
        for group in groups.values():
            first = group[0]
            backbone, cfg = first.model.backbone, first.contestant.cfg
            try:
                peer = build(Ours(backbone, cfg, padded_size(backbone, inputs.size)))
            except NoPeer as reason:
                notes.append(f"{first.name} has no peer in {name}: {reason}")
                continue
            label = peer.name if len(groups) == 1 else f"{peer.name} ({first.name})"
            found.append(PeerOf(peer, label, tuple(one.name for one in group)))
    return found, notes


def line_up(
    section: str,
    entrants: Mapping[str, Entrant],
    peers: Iterable[PeerOf],
    inputs: Inputs,
    trained: bool,
    convolutions: bool,
) -> Lineup:
    """Everyone who runs in a section.

    Args:
        trained: the weights come from a checkpoint, and so find things by themselves.
        convolutions: also run each pyramid's convolutions alone.
    """
    lineup = Lineup()
    if section == "inference" and not trained:
        _set_thresholds(entrants, inputs)
    for name, entrant in entrants.items():
        lineup.subjects[name] = subject = SUBJECTS.get(section)(entrant, inputs)
        for reference in entrant.contestant.references:
            other = entrants[reference]
            same = entrant.shapes(subject.part) == other.shapes(subject.part)
            lineup.pairs.append(Pair(name, reference, same))
        if convolutions:
            alone = f"convolutions of {name} alone"
            lineup.subjects[alone] = convolutions_subject(entrant, inputs)
            lineup.pairs.append(Pair(name, alone, same=False, compared=False))
    if section in _WITH_PEERS:
        for one in peers:
            _add_peer(lineup, one, section, entrants, inputs)
    return lineup


def _add_peer(
    lineup: Lineup,
    one: PeerOf,
    section: str,
    entrants: Mapping[str, Entrant],
    inputs: Inputs,
) -> None:
    """A peer as its package ships it: float32, plain layout, on the maps of such a config."""
    first = entrants[one.entrants[0]]
    plain = without_levers(first.contestant.cfg)
    maps = given_maps(prepare(first.model, plain, training=False), inputs)
    module = one.peer.module.to(plain.MODEL.DEVICE).train(section == "neck_train")
    ready = Ready(module, inputs.device, None)
    subject = _WITH_PEERS[section](module, maps, ready, inputs)
    subject.facts["parameters"] = count_parameters(module)
    lineup.subjects[one.name] = subject
    lineup.pairs += [Pair(name, one.name, same=True) for name in one.entrants]


def _set_thresholds(entrants: Mapping[str, Entrant], inputs: Inputs) -> None:
    """One score threshold for all entrants of one model; calibrated on the first of them."""
    known: dict[str, float | None] = {}
    for entrant in entrants.values():
        model = repr(sorted(entrant.shapes("model").items()))
        if model not in known:
            known[model] = calibrate(entrant, inputs)
        entrant.facts[THRESHOLD] = known[model]
