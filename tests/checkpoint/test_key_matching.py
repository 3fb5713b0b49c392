"""Which tensor of a file is which of a network."""

from __future__ import annotations

import pytest

from fpn_plugin.checkpoint.key_matching import holder_prefixes, match_keys, surplus_blocks

OWN = ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.running_mean"]


@pytest.mark.parametrize("file_prefix", ["", "module.", "backbone.bottom_up.model.", "encoder."])
@pytest.mark.parametrize("network_prefix", ["", "model.", "backbone.body."])
def test_prefixes_of_both_sides_are_taken_away(file_prefix: str, network_prefix: str) -> None:
    match = match_keys([network_prefix + n for n in OWN], [file_prefix + n for n in OWN])
    assert match.pairs == {network_prefix + n: file_prefix + n for n in OWN}


def test_the_backbone_of_a_whole_detector_is_found() -> None:
    own = ["stem.conv1.weight", "res2.0.conv1.norm.weight"]
    given = [f"backbone.bottom_up.{name}" for name in own]
    others = ["backbone.fpn_lateral2.weight", "proposal_generator.rpn_head.conv.weight"]
    match = match_keys(own, [*others, *given])
    assert match.pairs == dict(zip(own, given))
    assert match.prefix == "backbone.bottom_up."


def test_the_prefix_by_which_most_match_counts() -> None:
    given = ["conv1.weight", *(f"module.{name}" for name in OWN)]
    assert match_keys(OWN, given).pairs == {name: f"module.{name}" for name in OWN}


def test_a_prefix_of_ones_own_is_tried() -> None:
    given = [f"my.thing.{name}" for name in OWN]
    assert not match_keys(OWN, given).pairs
    assert match_keys(OWN, given, "my.thing.").pairs == dict(zip(OWN, given))
    assert match_keys(OWN, OWN, "my.thing.").pairs == dict(zip(OWN, OWN))


def test_numbers_within_a_prefix() -> None:
    assert "backbone.0.body." in holder_prefixes(["backbone.0.body.conv1.weight"])  # DETR's
    assert holder_prefixes(["0.weight", "stem.conv.weight"]) == [""]


@pytest.mark.parametrize(
    "network, file",
    [
        # Detectron2's and torchvision's names of a ResNet
        ("stem.conv1.weight", "conv1.weight"),
        ("stem.conv1.norm.running_mean", "bn1.running_mean"),
        ("res2.0.conv1.weight", "layer1.0.conv1.weight"),
        ("res5.2.conv3.norm.bias", "layer4.2.bn3.bias"),
        ("res3.0.shortcut.weight", "layer2.0.downsample.0.weight"),
        ("res3.0.shortcut.norm.weight", "layer2.0.downsample.1.weight"),
        ("linear.bias", "fc.bias"),
        # a DenseNet as torchvision builds and as it publishes it
        (
            "features.denseblock1.denselayer2.norm1.weight",
            "features.denseblock1.denselayer2.norm.1.weight",
        ),
        # timm's feature network and its whole model
        ("stages_0.blocks.0.conv_dw.weight", "stages.0.blocks.0.conv_dw.weight"),
    ],
)
def test_names_of_the_same_tensor_match(network: str, file: str) -> None:
    assert match_keys([network], [file]).pairs == {network: file}
    assert match_keys([file], [network]).pairs == {file: network}


def test_an_ambiguous_spelling_matches_only_itself() -> None:
    assert match_keys(["a.0_1"], ["a.0.1", "a_0.1"]).pairs == {}
    assert match_keys(["a.0.1", "a_0.1"], ["a.0_1"]).pairs == {}
    assert match_keys(["a.0.1", "a_0.1"], ["a.0.1"]).pairs == {"a.0.1": "a.0.1"}


def test_nothing_matches() -> None:
    assert match_keys(OWN, ["x.weight"]).pairs == {}


@pytest.mark.parametrize(
    "matched, given, lost",
    [
        ("layer1.1.conv1.weight", "layer1.2.conv1.weight", ["layer1.2"]),
        ("res4.5.conv1.norm.bias", "res4.6.conv1.norm.bias", ["res4.6"]),
        ("blocks.2.1.conv_pw.weight", "blocks.2.2.conv_pw.weight", ["blocks.2.2"]),
        ("stages.1.blocks.0.x.bias", "stages.1.blocks.1.x.bias", ["stages.1.blocks.1"]),
        ("stages_1.blocks.0.x.bias", "stages_1.blocks.1.x.bias", ["stages_1.blocks.1"]),
        ("features.3.0.block.0.bias", "features.3.4.block.0.bias", ["features.3.4"]),
        (
            "features.denseblock1.denselayer2.conv1.weight",
            "features.denseblock1.denselayer3.conv1.weight",
            ["features.denseblock1.denselayer3"],
        ),
        ("s1.b1.conv1.conv.weight", "s1.b2.conv1.conv.weight", ["s1.b2"]),
        ("trunk_output.block1.block1-0.f.a", "trunk_output.block1.block1-1.f.a", None),
        # whole later stages, heads, and what a module of the network has more
        ("layer3.0.conv1.weight", "layer4.0.conv1.weight", []),
        ("features.5.3.block.0.weight", "features.7.0.block.0.weight", []),
        ("blocks.5.0.conv.weight", "blocks.6.0.conv.weight", []),
        ("bn1.weight", "bn2.weight", []),
        ("conv_stem.weight", "conv_head.weight", []),
        ("layers.0.blocks.0.attn.q.weight", "layers.0.blocks.0.attn.relative_index", []),
    ],
)
def test_blocks_that_the_network_lacks(matched: str, given: str, lost: list[str] | None) -> None:
    expected = ["trunk_output.block1.block1-1"] if lost is None else lost
    assert surplus_blocks([given, given], [matched]) == expected


@pytest.mark.parametrize("prefix", ["backbone.body.", "backbone.", "features.", "module.features."])
def test_torchvisions_detectors_hold_features_under_other_names(prefix: str) -> None:
    """fasterrcnn_mobilenet_v3_large_fpn, lraspp_ and deeplabv3_mobilenet_v3_large, the classifier."""
    names = ("0.0.weight", "0.1.bias", "1.block.0.0.weight", "16.1.weight")
    matching = match_keys([f"model.features.{name}" for name in names], [prefix + n for n in names])
    assert matching.pairs == {f"model.features.{name}": prefix + name for name in names}
