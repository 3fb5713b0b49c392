"""Two pyramids as one graph: what they share, where weights come from, and that it begins as the
old one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CHANNELS, assert_same, levels_of, randomize, small_maps
from torch import nn

from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.graph import Graph, op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.topologies import OWN_LEVELS, TOPOLOGIES, Style
from fpn_plugin.pyramid.warm import WarmPyramid, combine

STACKED = {"bfp": "fpn+bfp", "asff": "fpn+asff", "dyhead": "fpn+dyhead(depth=1)"}
NAMES = [STACKED.get(name, name) for name in TOPOLOGIES.names()]
FIVE_LEVELS = ("bifpn", "qufpn", "nas_fpn", "fpg", "hrfpn", *OWN_LEVELS)


def a_pyramid(topology: str, levels: dict[str, int] | None = None, **defaults: Any) -> Any:
    extra = "none" if topology in FIVE_LEVELS else "maxpool"
    graph = build_graph(topology, levels or levels_of(topology), Style(), extra_levels=extra)
    return graph, Defaults(32, **defaults)


def both(old: tuple[Graph, Defaults], new: tuple[Graph, Defaults]) -> tuple[Pyramid, WarmPyramid]:
    warm = combine(old, new, CHANNELS)
    channels = {name: CHANNELS[name] for name in warm.graph.inputs}
    return randomize(Pyramid(warm.graph, channels, new[1], warm.per_node)), warm


def close_gates(merged: Pyramid, warm: WarmPyramid) -> None:
    for gate in filter(None, warm.gates.values()):
        nn.init.zeros_(merged.get_parameter(f"{gate}_fuse.weights"))


@pytest.mark.parametrize("old_name", NAMES)
def test_any_pyramid_begins_as_any_other(old_name: str) -> None:
    old = a_pyramid(old_name, norm="LN")
    before = randomize(Pyramid(old[0], CHANNELS, old[1])).eval()
    state = before.state_dict()
    # sides of odd maps on the way, except where all is made from one map
    maps = small_maps(*((64, 96) if old_name in OWN_LEVELS else (38, 54)))
    expected = before(maps)
    for new_name in NAMES:
        merged, warm = both(old, a_pyramid(new_name, fuse=op("weighted"), norm="LN"))
        for path, origin in warm.origins.items():
            if origin.exact:
                start = f"{origin.path}."
                part = {n[len(start) :]: x for n, x in state.items() if n.startswith(start)}
                merged.get_submodule(path).load_state_dict(part)
        close_gates(merged, warm)
        found = merged.eval()(maps)
        common = {name: found[name] for name in expected if name in found}
        assert warm.gates.keys() == common.keys()
        fewer = {"bifusion"} & {old_name, new_name}
        assert len(common) >= (3 if OWN_LEVELS & {old_name, new_name} else 5 - len(fewer)), new_name
        assert_same({name: expected[name] for name in common}, common)


@pytest.mark.parametrize("name", ["pafpn", "pafpn_mmdet", "fpn+bfp", "fpn+asff", "fpn+dyhead"])
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
    assert origins["fapn_output3"].path == "fpn_output3"
    assert "fapn_lateral3" not in origins  # a feature selection is no plain convolution
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
    with pytest.raises(ValueError, match="warm_from: no level .* p2, the new one p5"):
        combine(only, high, CHANNELS)


def test_a_gate_opens_by_its_parameter() -> None:
    gate = FUSIONS.get("blend")(3, 2)
    old, new = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    assert torch.equal(gate([old, new]), old)
    gate.weights.data = torch.tensor([0.0, 0.5, 1.0]) / gate.scale
    mixed = gate([old, new])
    assert torch.equal(mixed[:, 0], old[:, 0]) and torch.allclose(mixed[:, 2], new[:, 2])
    assert torch.allclose(mixed[:, 1], (old + new)[:, 1] / 2)
    assert torch.allclose(gate.normalized_weights(), torch.tensor([[1, 0.5, 0], [0, 0.5, 1]]))
