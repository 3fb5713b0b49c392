"""The maps that are recorded, and which of them are shown."""

from __future__ import annotations

from typing import Any, Mapping

import pytest
import torch
from backbones import toy_backbone
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone
from helpers import randomize
from torch import Tensor

from fpn_plugin.pyramid.graph import Step
from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.pyramid.topologies import OWN_LEVELS, TOPOLOGIES
from fpn_plugin.visualize.maps import map_rows, record_maps, strength

STACKS = ["nas_fpn x 7", "bifpn x 3", "fpn+bfp", "fpn+asff"]


def backbone_of(name: str) -> Any:
    topology, _, repeats = name.partition(" x ")
    channels = {4: 24} if topology in OWN_LEVELS else {2: 8, 3: 16, 4: 24, 5: 48}
    arguments = {"topology": topology, "repeats": int(repeats or 1), "extra_levels": "none"}
    return randomize(toy_backbone(channels, 32, **arguments)).eval()


def reference(backbone: GraphExecutor, x: Tensor) -> dict[str, Mapping[str, Tensor]]:
    """Every fused map and every node's map, one part after the other, nothing in one pass."""
    maps = dict(backbone.bottom_up(x))
    levels = dict(backbone.graph.inputs)
    sizes = {level: list(maps[name].shape[2:]) for name, level in levels.items()}
    before, fused = {}, {}
    for step in backbone.steps:
        arrived: list[Tensor] = []
        for edge in step.edges:
            y = maps[edge.source]
            for part in edge.parts():
                guide = []
                if part.path in backbone._guides:
                    guide = [arrived[backbone._guides[part.path]]]
                size = [sizes.get(step.node.input_level)] if part.kind in ("up", "down") else []
                y = backbone.get_submodule(part.path)(y, *size, *guide)
            arrived.append(y)
        if step.block and step.block.kind == "step":
            given = backbone.get_submodule(step.block.path)(arrived)
            maps.update(zip(step.node.maps(), given))
            continue
        y = arrived[0]
        if step.fuse:
            same_level = [i for i, edge in enumerate(step.edges) if edge.resample is None]
            before.update({step.node.name: arrived[same_level[0]]} if same_level else {})
            fusion = backbone.get_submodule(step.fuse.path)
            y = fused[step.node.name] = fusion(arrived)
        results = [y]
        if isinstance(step.node, Step):
            results = backbone.get_submodule(step.block.path)(arrived)
        elif step.block:
            results = [backbone.get_submodule(step.block.path)(y)]
        for (given, level), y in zip(step.node.maps().items(), results):
            maps[given] = y
            sizes.setdefault(level, list(y.shape[2:]))
    return {"before": before, "fused": fused, "nodes": maps}


@torch.no_grad()
@pytest.mark.parametrize("name", [*TOPOLOGIES.names(), *STACKS])
def test_every_map_is_what_the_graph_says(name: str) -> None:
    backbone, x = backbone_of(name), torch.rand(2, 3, 64, 96)
    plain = backbone(x)
    with record_maps(backbone) as maps:
        recorded = backbone(x)
    assert all(torch.equal(plain[key], recorded[key]) for key in plain)
    expected = reference(backbone, x)
    for stage in ("before", "fused", "nodes"):
        for node, strengths in getattr(maps, stage).items():
            reached = strength(expected[stage][node])
            torch.testing.assert_close(strengths, reached, rtol=1e-4, atol=1e-5)
    assert maps.fused.keys() == expected["fused"].keys()
    assert maps.before.keys() == expected["before"].keys()
    built = {name for step in backbone.steps if [*step.parts()] for name in step.node.maps()}
    assert built <= maps.nodes.keys()
    assert list(maps.outputs) == list(plain) and list(maps.inputs) == list(backbone.graph.inputs)
    assert all(torch.equal(maps.outputs[key], strength(plain[key])) for key in plain)
    # rows are few, and name their maps
    rows = map_rows(backbone, maps, image=1)
    assert rows[0].title == "bottom-up map" and rows[-1].title == "output, after the block"
    assert len(rows) <= 6 and all(row.cells for row in rows)
    for row in rows:
        for level, cell in row.cells.items():
            assert cell.strength.shape == (-(-64 // 2**level), -(-96 // 2**level))
    outputs = rows[-1].cells
    assert [cell.name.partition(":")[0] for cell in outputs.values()] == list(maps.outputs)
    assert all(
        torch.equal(cell.strength, maps.outputs[cell.name.partition(":")[0]][1])
        for cell in outputs.values()
    )


@torch.no_grad()
def test_rows_of_fpn() -> None:
    backbone = backbone_of("fpn")
    with record_maps(backbone) as maps:
        backbone(torch.rand(1, 3, 64, 96))
    before, after = map_rows(backbone, maps)[1:3]
    assert {level: cell.name for level, cell in before.cells.items()} == {
        level: f"fpn_lateral{level}" for level in (2, 3, 4, 5)
    }
    assert {level: cell.name for level, cell in after.cells.items()} == {
        level: f"fpn_merge{level}" for level in (2, 3, 4)
    }
    assert torch.equal(after.cells[3].strength, maps.fused["fpn_merge3"][0])
    assert not torch.equal(after.cells[3].strength, before.cells[3].strength)


@torch.no_grad()
def test_rows_of_many_fusions() -> None:
    backbone = backbone_of("nas_fpn x 7")
    with record_maps(backbone) as maps:
        backbone(torch.rand(1, 3, 64, 96))
    titles = [row.title for row in map_rows(backbone, maps)]
    assert titles[2:4] == ["after 1st fusion", "after last fusion"]
    before = map_rows(backbone, maps)[1].cells
    assert [cell.name for cell in before.values()] == [
        *(f"nas_fpn_lateral{level}" for level in (2, 3, 4, 5)),
        "nas_fpn_in6",
    ]
    last = map_rows(backbone, maps)[3].cells[3]
    assert "fusion 21" in last.name and last.name.startswith("r7_")


def test_strength() -> None:
    x = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    assert strength(x).tolist() == [[[pytest.approx(12.5**0.5)]]]


@torch.no_grad()
def test_detectron2s_backbones() -> None:
    bottom_up: Any = toy_backbone().bottom_up
    fpn = FPN(bottom_up, ["res2", "res3", "res4", "res5"], 8)
    with record_maps(fpn) as maps:
        fpn(torch.rand(1, 3, 64, 96))
    rows = map_rows(fpn, maps)
    assert [row.title for row in rows] == ["bottom-up map", "output"]
    assert [list(row.cells) for row in rows] == [[2, 3, 4, 5], [2, 3, 4, 5]]


class OneMap(Backbone):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"res4": x[:, :, ::16, ::16]}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res4": ShapeSpec(channels=3, stride=16)}


def test_one_map() -> None:
    with record_maps(backbone := OneMap()) as maps:
        backbone(torch.rand(1, 3, 64, 96))
    (row,) = map_rows(backbone, maps)
    assert row.title == "output" and list(row.cells) == [4]


@torch.no_grad()
def test_a_compiled_pyramid_is_recorded_too() -> None:
    backbone = backbone_of("fpn")
    backbone.compile_graph(backend="eager")
    x = torch.rand(1, 3, 64, 96)
    plain = backbone(x)
    with record_maps(backbone) as maps:
        backbone(x)
    assert set(maps.fused) == {"fpn_merge2", "fpn_merge3", "fpn_merge4"}
    assert all(torch.equal(maps.outputs[key], strength(plain[key])) for key in plain)
    with torch.no_grad():
        assert all(torch.equal(value, plain[key]) for key, value in backbone(x).items())
