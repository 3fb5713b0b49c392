"""Costs against numbers worked out by hand, and the table that shows them."""

from __future__ import annotations

from typing import Any

import pytest
from backbones import LEVELS, bifpn, toy_backbone
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem

from fpn_plugin import PyramidBackbone
from fpn_plugin.visualize.complexity import (
    HEADER,
    Complexity,
    Cost,
    count_parameters,
    measure,
    node_table,
    padded_size,
    settings_text,
    totals,
    totals_text,
)

CHANNELS = {2: 256, 3: 512, 4: 1024, 5: 2048}
SIZE = (160, 224)  # a thirtieth of the 800 x 1344 pixels that the papers count for
SIZES = {level: (SIZE[0] // 2**level, SIZE[1] // 2**level) for level in LEVELS}


@pytest.fixture(scope="module")
def r50() -> PyramidBackbone:
    """Of ResNet-50's channels; the network underneath does not matter to the pyramid."""
    return toy_backbone(channels=CHANNELS, out_channels=256, extra_levels="maxpool")


@pytest.fixture(scope="module")
def r50_cost(r50: PyramidBackbone) -> Complexity:
    return measure(r50, SIZE)


def test_r50_fpn_by_hand(r50_cost: Complexity) -> None:
    assert r50_cost.pyramid.parameters == 3_344_384
    for level, (height, width) in SIZES.items():
        pixels = height * width
        assert r50_cost.nodes[f"fpn_lateral{level}"].flops == pixels * CHANNELS[level] * 256
        assert r50_cost.nodes[f"fpn_output{level}"].flops == pixels * 256 * 256 * 9
        if level < 5:  # fvcore counts one operation per value that an interpolation gives
            assert r50_cost.nodes[f"fpn_merge{level}"].flops == pixels * 256
    assert r50_cost.nodes["top_block.p6"].flops == 0
    assert r50_cost.pyramid.flops == pytest.approx(60.922e9 / 30, rel=1e-4)


def test_shapes_and_order(r50: PyramidBackbone, r50_cost: Complexity) -> None:
    assert r50_cost.size == SIZE
    assert list(r50_cost.nodes) == [item.name for item in r50.graph.nodes]
    assert r50_cost.shapes == {
        "p2": (256, 40, 56),
        "p3": (256, 20, 28),
        "p4": (256, 10, 14),
        "p5": (256, 5, 7),
        "p6": (256, 3, 4),
    }
    assert not r50_cost.uncounted


def test_bottom_up_by_hand() -> None:
    backbone = toy_backbone(channels={2: 4, 3: 8}, out_channels=8)
    cost = measure(backbone, (64, 96)).bottom_up
    assert cost.parameters == (3 * 4 * 9 + 4) + (4 * 8 * 9 + 8)
    assert cost.flops == 16 * 24 * 3 * 4 * 9 + 8 * 12 * 4 * 8 * 9


def test_attention_is_counted() -> None:
    backbone = toy_backbone(channels={4: 8, 5: 8}, topology="hybrid", out_channels=16)
    complexity = measure(backbone, (64, 160))
    pixels, c = 2 * 5, 16
    linear = 4 * c * c + 2 * c * (4 * c)  # query, key, value, out; then the two layers
    norms = 2 * 5 * c  # fvcore's count of a layer norm, per pixel
    assert complexity.nodes["hybrid_aifi5"].flops == pixels * (linear + norms + 2 * pixels * c)
    assert not complexity.uncounted


def test_norms_separable_blocks_and_projections_are_counted() -> None:
    backbone = toy_backbone(graph=bifpn(1), out_channels=32, norm="GN")
    cost = measure(backbone, (256, 256))
    bottom_up = count_parameters(backbone, ["bottom_up", "bottom_up.res3"])  # shared ones once
    assert cost.pyramid.parameters == count_parameters(backbone) - bottom_up
    # level 3: a projection of res3, depthwise and pointwise convolutions, weights of two maps
    projection = 16 * 32 + 64
    assert cost.nodes["c1_p3"].parameters == projection + 32 * 9 + 32 * 32 + 64 + 2
    convolutions = 32 * 32 * (16 * 32 + 32 * 9 + 32 * 32)
    assert cost.nodes["c1_p3"].flops >= convolutions


def test_a_recursive_pyramid_runs_twice_and_its_network_is_counted() -> None:
    stages = [[BasicBlock(8, 8)], [BasicBlock(8, 16, stride=2)]]
    networks = [ResNet(BasicStem(3, 8), stages, out_features=["res2", "res3"]) for _ in range(2)]
    names = ["res2", "res3"]
    single = measure(PyramidBackbone(networks[0], names, 8), (64, 96))
    backbone = PyramidBackbone(networks[1], names, 8, rfp_steps=2)
    cost = measure(backbone, (64, 96))
    assert cost.bottom_up == single.bottom_up and not single.recursion.parameters
    assert cost.pyramid == Cost(single.pyramid.parameters, 2 * single.pyramid.flops)
    whole = cost.pyramid + cost.bottom_up + cost.recursion
    assert whole == Cost(
        count_parameters(backbone), totals(backbone, "bottom_up", (64, 96))["backbone"].flops
    )
    fed_back, gated = 8 * 12, 8 * 12 + 16 * 24  # pixels
    branches = 8 * 2 * 19 * fed_back + 8 * 2  # 1x1, two 3x3 on the map, a 1x1 on its mean
    extra = cost.recursion.flops - cost.bottom_up.flops - branches - 8 * 16 * fed_back - 8 * gated
    assert 0 <= extra < 10 * fed_back * 8  # the mean, what fvcore counts beside convolutions
    text = totals_text(cost, {})
    assert "recursion" in text and "recursion" not in totals_text(single, {})
    assert "runs               2" in settings_text(backbone, {})


def test_images_are_padded_as_detectron2_does() -> None:
    backbone = toy_backbone()
    assert padded_size(backbone, (33, 64)) == (64, 64)
    assert measure(backbone, (33, 64)).shapes["p2"][1:] == (16, 16)


@pytest.mark.parametrize("size", [(0, 4), (5,), (1.5, 2), (True, 4)])
def test_bad_size(size: Any) -> None:
    with pytest.raises(ValueError, match="size: .* is not a height and a width in pixels"):
        measure(toy_backbone(), size)


def test_measuring_changes_nothing() -> None:
    backbone = toy_backbone(norm="BN").train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    measure(backbone, (64, 64))
    assert backbone.training and all(module.training for module in backbone.modules())
    assert all((value == before[key]).all() for key, value in backbone.state_dict().items())
    assert not any(module._forward_hooks for module in backbone.modules())


def test_table_has_every_node_and_how_its_inputs_get_there(
    r50: PyramidBackbone, r50_cost: Complexity
) -> None:
    table = node_table(r50, r50_cost)
    for item in r50.graph.nodes:
        assert item.name in table
    assert "fpn_lateral5 ↑nearest×2" in table
    assert "fpn_output5 ↓subsample×2" in table
    assert "590,080" in table and "1.321" in table
    header, rule, *rows = table.splitlines()
    assert [column for column in HEADER if column not in header.split()] == []
    start = header.index("inputs")
    assert all(row[start - 2 : start] == "  " != row[start : start + 2] for row in rows)


def test_table_of_projections_and_blocks_with_arguments() -> None:
    backbone = toy_backbone(graph=bifpn(1), out_channels=32)
    table = node_table(backbone, measure(backbone, (128, 128)))
    assert "res5 →conv1x1 ↓maxpool×2" in table
    assert "res4 →conv1x1(activation='')" in table
    assert "fast_normalized" in table and "separable" in table


def test_settings_and_totals(r50: PyramidBackbone, r50_cost: Complexity) -> None:
    settings = settings_text(r50, {"topology": "fpn"})
    assert settings.startswith("topology")
    assert "res5 (2048 ch, stride 32)" in settings and "32 pixels" in settings
    totals = totals_text(r50_cost, {"MODEL.RPN.IN_FEATURES": ["p2", "p3"], "OTHER": ["p3"]})
    assert "3,344,384 parameters" in totals
    lines = {line[:2]: line for line in totals.splitlines()}
    assert lines["p3"].endswith("MODEL.RPN.IN_FEATURES, OTHER")
    assert lines["p6"].endswith("nothing reads it")
    assert "256 x 40 x 56" in lines["p2"]
