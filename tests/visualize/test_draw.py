"""Drawn graphs: where boxes and arrows go, and the files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from backbones import bifpn, toy_backbone
from PIL import Image

from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.graph import Graph
from fpn_plugin.pyramid.graph_yaml import parse_graph
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.visualize.draw import box_kind, check_extension, draw_graph
from fpn_plugin.visualize.fusion_weights import fusion_weights
from fpn_plugin.visualize.layout import entrance, lay_out, output_mark, ports

INPUTS = {"res3": 3, "res4": 4, "res5": 5}


def all_to_all() -> Graph:
    inputs = {"res2": 2, **INPUTS}
    nodes = [{"name": f"lat{n}", "level": n, "inputs": [f"res{n}"]} for n in inputs.values()]
    laterals = [node["name"] for node in nodes]
    nodes += [{"name": f"all{n}", "level": n, "inputs": laterals} for n in inputs.values()]
    nodes += [
        {"name": f"out{n}", "level": n, "inputs": [f"all{n}", f"res{n}", "res2"]} for n in (3, 4, 5)
    ]
    return parse_graph(inputs, nodes)


GRAPHS = {
    "fpn": build_graph("fpn", {"res2": 2, **INPUTS}, extra_levels="maxpool"),
    "retinanet": build_graph("fpn", INPUTS, extra_levels="conv_c5"),
    "fpn x 3": build_graph("fpn", INPUTS, repeats=3),
    "mapper": build_graph("channel_mapper", INPUTS),
    "bifpn x 1": parse_graph(INPUTS, bifpn(1)),
    "bifpn x 3": parse_graph(INPUTS, bifpn(3)),
    "all to all": all_to_all(),
    "one node": build_graph("channel_mapper", {"c3": 3}),
}


def pyramid_of(name: str) -> Pyramid:
    graph = GRAPHS[name]
    return Pyramid(graph, {key: 4 * level for key, level in graph.inputs.items()}, Defaults(8))


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_boxes_and_routes(graph: Graph) -> None:
    """Boxes have a cell of their own; routes cross no box, and share tracks with their source's."""
    layout = lay_out(graph)
    cells = layout.cells
    assert len(set(cells.values())) == len(cells), "two boxes in one cell"
    assert all(cells[name][0] == 0 for name in graph.inputs)
    for node in graph.nodes:
        for name, level in node.maps().items():
            column, row = cells[name]
            assert layout.levels[row] == level
            assert all(cells[edge.source][0] < column for edge in node.inputs)
    assert {cells[output_mark(name)][0] for name in graph.outputs} == {layout.columns - 1}

    edges = [
        (edge.source, entrance(node, i))
        for node in graph.nodes
        for i, edge in enumerate(node.inputs)
    ]
    edges += [(name, output_mark(name)) for name in graph.outputs]
    assert sorted((route.source, route.target) for route in layout.routes) == sorted(edges)
    users: dict[Any, str] = {}
    for route in layout.routes:
        crossed = range(cells[route.source][0] + 1, cells[route.target][0])
        assert (route.track is None) == (len(crossed) == 0)
        for column in crossed if route.track else ():
            assert users.setdefault((route.track, column), route.source) == route.source
            if route.track.lane is None:
                assert (column, route.track.row) not in cells.values()


def test_columns_are_longest_paths() -> None:
    cells = lay_out(GRAPHS["fpn"]).cells
    assert {name: cells[name] for name in ("fpn_lateral2", "fpn_merge2", "fpn_output2")} == {
        "fpn_lateral2": (1, 4),
        "fpn_merge2": (4, 4),
        "fpn_output2": (5, 4),
    }


def test_a_taken_cell_moves_a_node_to_the_next_column() -> None:
    nodes = [{"name": name, "level": 3, "inputs": ["c3"]} for name in ("a", "b")]
    nodes.append({"name": "c", "level": 3, "inputs": ["a", "b"]})
    cells = lay_out(parse_graph({"c3": 3}, nodes)).cells
    assert [cells[name][0] for name in "abc"] == [1, 2, 3]


def test_ports_keep_the_order_and_stay_on_the_box() -> None:
    heights = [5.0, 1.0, 0.0, 3.0, 1.0]
    entered = ports(heights, 1.0, 0.3)
    assert sorted(range(5), key=heights.__getitem__) == sorted(range(5), key=entered.__getitem__)
    assert all(abs(height - 1.0) <= 0.3 + 1e-9 for height in entered)
    assert ports([1.0], 1.0, 0.3) == ports([7.0], 1.0, 0.3) == [1.0]
    assert ports([1.0, 9.0], 1.0, 0.3) == [1.0, pytest.approx(1.15)]


def test_kinds() -> None:
    pyramid = pyramid_of("fpn")
    expected = {
        "res2": "bottom-up map",
        "fpn_lateral2": "lateral or block",
        "fpn_merge2": "fusion",
        "fpn_output2": "output node",
        "top_block.p6": "extra level",
        output_mark("fpn_output2"): "",
    }
    assert {name: box_kind(pyramid, name) for name in expected} == expected
    assert box_kind(pyramid_of("bifpn x 1"), "c1_p6") == "output node"


@pytest.mark.parametrize("name", GRAPHS)
def test_svg_has_every_name(name: str, tmp_path: Path) -> None:
    pyramid = pyramid_of(name)
    path = tmp_path / "graph.svg"
    draw_graph(pyramid, path, title="a title")
    texts = {item.text for item in ElementTree.parse(path).iter() if item.tag.endswith("}text")}
    names = [*pyramid.graph.inputs, *(item.name for item in pyramid.graph.nodes)]
    assert texts.issuperset([*names, *pyramid.graph.output_names(), "a title"])


def test_svg_says_what_happens_on_the_way(tmp_path: Path) -> None:
    draw_graph(toy_backbone(graph=bifpn(1), out_channels=16), tmp_path / "graph.svg")
    text = (tmp_path / "graph.svg").read_text()
    assert ">24 ch<" in text and ">48 ch<" in text
    assert ">conv1x1<" in text and ">fast_normalized<" in text and ">separable<" in text
    assert "to a finer level (nearest)" in text and "to a coarser level (maxpool)" in text


def line_widths_of(path: Path) -> set[float]:
    widths = re.findall(r"stroke-width: ([0-9.]+)", path.read_text())
    return {round(float(width), 2) for width in widths}


def test_learned_weights_are_on_the_arrows(tmp_path: Path) -> None:
    backbone = toy_backbone(fuse_type="fast_normalized", out_channels=8)
    backbone.fpn_merge2_fuse.weights.data = torch.tensor([3.0, 1.0])
    backbone.fpn_merge3_fuse.weights.data = torch.tensor([0.0, 2.0])
    draw_graph(backbone, tmp_path / "plain.svg")
    draw_graph(backbone, tmp_path / "learned.svg", weights=fusion_weights(backbone))
    plain, learned = ((tmp_path / f"{name}.svg").read_text() for name in ("plain", "learned"))
    for text in (">0.75<", ">0.25<", ">0.00<", ">1.00<", "on an arrow: learned weight"):
        assert text in learned and text not in plain
    # 0.5 points for nothing, 3 for the most, in proportion between
    assert {0.5, 1.13, 2.38, 3.0} <= line_widths_of(tmp_path / "learned.svg")
    assert not {2.38, 3.0} & line_widths_of(tmp_path / "plain.svg")


def test_nothing_learned_draws_as_before(tmp_path: Path) -> None:
    backbone = toy_backbone()
    draw_graph(backbone, tmp_path / "a.svg", weights=fusion_weights(backbone))
    draw_graph(backbone, tmp_path / "b.svg")
    # and the same graph always gives the same bytes
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_png_grows_with_the_graph(tmp_path: Path) -> None:
    widths = []
    for name in ("one node", "fpn", "bifpn x 3"):
        draw_graph(pyramid_of(name), tmp_path / "graph.PNG", dpi=40)
        with Image.open(tmp_path / "graph.PNG") as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(100_000)) > 20
            widths.append(picture.width)
    assert widths == sorted(widths) and widths[0] < widths[-1] / 4


@pytest.mark.parametrize("path", ["graph.pdf", "graph"])
def test_unknown_extension(path: str) -> None:
    with pytest.raises(ValueError, match=rf"'{path}': cannot draw .* choose from \.png, \.svg"):
        check_extension(path)


def test_folders_are_made_and_the_users_settings_stay(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    draw_graph(pyramid_of("one node"), tmp_path / "new" / "deep" / "graph.svg")
    assert (tmp_path / "new" / "deep" / "graph.svg").is_file()
    assert dict(matplotlib.rcParams) == before
