"""Two pyramids as one graph: what they share, where weights come from, and that it begins as the
old one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CHANNELS, LEVELS, assert_same, randomize, small_maps

from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.graph import Graph, op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.topologies import TOPOLOGIES, Style
from fpn_plugin.pyramid.warm import WarmPyramid, combine

STACKED = {"bfp": "fpn+bfp", "asff": "fpn+asff"}
NAMES = [STACKED.get(name, name) for name in TOPOLOGIES.names() if name != "simple"]


def a_pyramid(topology: str, levels: dict[str, int] = LEVELS, **defaults: Any) -> Any:
    extra = "none" if topology in ("bifpn", "qufpn", "nas_fpn", "fpg", "hrfpn") else "maxpool"
    graph = build_graph(topology, levels, Style(), extra_levels=extra)
    return graph, Defaults(32, **defaults)


def both(old: tuple[Graph, Defaults], new: tuple[Graph, Defaults]) -> tuple[Pyramid, WarmPyramid]:
    warm = combine(old, new, CHANNELS)
    channels = {name: CHANNELS[name] for name in warm.graph.inputs}
    return randomize(Pyramid(warm.graph, channels, new[1], warm.own)), warm


@pytest.mark.parametrize("old_name, new_name", [("fpn", name) for name in NAMES]
                         + [(name, "fpn") for name in NAMES] + [("bifpn", "pafpn")])
def test_the_whole_begins_as_the_old_pyramid(old_name: str, new_name: str) -> None:
    old = a_pyramid(old_name, norm="GN")
    merged, warm = both(old, a_pyramid(new_name, fuse=op("weighted"), norm="GN"))
    before = randomize(Pyramid(old[0], CHANNELS, old[1]))
    state = before.state_dict()
    for path, origin in warm.origins.items():
        if origin.exact:
            start = f"{origin.path}."
            part = {n[len(start) :]: x for n, x in state.items() if n.startswith(start)}
            merged.get_submodule(path).load_state_dict(part)
    for name, gate in warm.gates.items():
        if gate:
            merged.get_submodule(f"{gate}_fuse").weights.data.zero_()
    maps = small_maps(70, 90)  # odd sizes on the way
    assert_same(merged.eval()(maps), before.eval()(maps))


@pytest.mark.parametrize("name", ["pafpn", "pafpn_mmdet", "fpn+bfp", "fpn+asff"])
def test_what_contains_the_old_pyramid_runs_it_once(name: str) -> None:
    merged, warm = both(a_pyramid("fpn"), a_pyramid(name))
    new = {item.name for item in a_pyramid(name)[0].nodes}
    added = {item.name for item in merged.graph.nodes} - new
    gates = {gate for gate in warm.gates.values() if gate}
    # P6 of the old pyramid has nothing to learn
    assert added == gates | {"warm.top_block.p6"}
    assert ("p2" in warm.gates and warm.gates["p2"] == "") == ("pafpn" in name)


def test_the_same_pyramid_needs_no_gate() -> None:
    merged, warm = both(a_pyramid("bifpn"), a_pyramid("bifpn"))
    assert merged.graph == a_pyramid("bifpn")[0]
    assert set(warm.gates.values()) == {""}


@pytest.mark.parametrize("change", [{"norm": "GN"}, {"fuse": op("avg")}, {"activation": "relu"}])
def test_another_style_is_another_pyramid(change: dict[str, Any]) -> None:
    merged, warm = both(a_pyramid("fpn"), a_pyramid("fpn", **change))
    # laterals read the bottom-up maps alone, so another fusion leaves them what they are
    assert ("warm.fpn_lateral2" in [n.name for n in merged.graph.nodes]) == ("fuse" not in change)
    assert warm.origins["fpn_output2"].path == "fpn_output2"
    assert not warm.origins["fpn_output2"].exact
    assert merged.get_submodule("warm.fpn_output2").norm is None  # type: ignore[union-attr]


def test_roles_give_new_parts_their_first_weights() -> None:
    origins = combine(a_pyramid("fpn"), a_pyramid("fapn"), CHANNELS).origins
    assert origins["fapn_lateral3"].path == "fpn_lateral3"
    assert origins["fapn_output3"].path == "fpn_output3"
    origins = combine(a_pyramid("fpn"), a_pyramid("bifpn"), CHANNELS).origins
    assert origins["bifpn_td4_edge0.project"].path == "fpn_lateral4"
    assert origins["bifpn_out4_edge0.project"].path == "fpn_lateral4"
    assert "bifpn_out4" in origins and "bifpn_td4" not in origins
    origins = combine(a_pyramid("fpn"), a_pyramid("pafpn"), CHANNELS).origins
    assert "pafpn_output4" not in origins  # fpn_output4 is there already


def test_levels_that_the_old_pyramid_lacks_are_new() -> None:
    low = {"res2": 2, "res3": 3}
    merged, warm = both(a_pyramid("fpn", low), a_pyramid("fpn"))
    assert list(warm.gates) == ["p2", "p3", "p4"]
    assert list(merged.graph.output_names()) == ["p2", "p3", "p4", "p5", "p6"]
    only = build_graph("fpn", {"res2": 2}), Defaults(32)
    high = build_graph("fpn", {"res5": 5}), Defaults(32)
    with pytest.raises(ValueError, match="WARM_START: True, but no level .* p2, the config's p5"):
        combine(only, high, CHANNELS)


def test_every_new_parameter_learns_within_two_steps() -> None:
    merged, warm = both(a_pyramid("fpn"), a_pyramid("bifpn", fuse=op("fast_normalized")))
    gates = [merged.get_submodule(f"{gate}_fuse") for gate in warm.gates.values() if gate]
    for gate in gates:
        gate.weights.data.zero_()  # type: ignore[union-attr, operator]
    optimizer = torch.optim.SGD(merged.parameters(), lr=0.01)
    seen = set()
    for _ in range(2):
        optimizer.zero_grad()
        sum(x.square().mean() for x in merged(small_maps()).values()).backward()
        seen |= {n for n, p in merged.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert seen == {name for name, _ in merged.named_parameters()}
