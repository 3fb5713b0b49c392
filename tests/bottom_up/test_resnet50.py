"""torchvision's, timm's and Detectron2's ResNet-50 are one network: one file of weights gives the
same maps, whoever's names it has.

Up to two conventions. Channel order: the numbers are the same for the same input, so a network
trained on RGB images wants RGB; flipping the input channels of its first convolution makes it one
for BGR. Stride placement: torchvision and timm halve the map in a block's 3x3 convolution, MSRA's
original (Detectron2's default, MODEL.RESNETS.STRIDE_IN_1X1) in its first 1x1; the weights fit both,
the maps are others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from helpers import zoo_config
from torch import Tensor
from torchvision.models import resnet50

from fpn_plugin.modeling.bottom_up import build_bottom_up

IMAGE = (1, 3, 64, 96)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same random weights, statistics of the norms included, by the library that wrote them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    state = resnet50().state_dict()
    for name, tensor in state.items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight", "downsample.1.weight")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("bn3.weight"):
            tensor.uniform_(0.1, 0.3)  # or the numbers grow from block to block
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(std=0.1)
    paths = {name: str(folder / f"{name}.pth") for name in ("torchvision", "detectron2", "flipped")}
    torch.save(state, paths["torchvision"])
    bottom_up = built("build_resnet_backbone", paths["torchvision"])
    detector = {f"backbone.bottom_up.{name}": t for name, t in bottom_up.state_dict().items()}
    detector["proposal_generator.rpn_head.conv.weight"] = torch.zeros(1)
    torch.save({"model": detector, "iteration": 9}, paths["detectron2"])
    torch.save({**state, "conv1.weight": state["conv1.weight"].flip(1)}, paths["flipped"])
    return paths


def built(name: str, weights: str, *overrides: Any) -> Backbone:
    cfg = zoo_config(
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        *("MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.BOTTOM_UP.WEIGHTS", weights),
        *("MODEL.BOTTOM_UP.NAME", name, *overrides),
    )
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    return build_bottom_up(cfg, ShapeSpec(channels=3)).eval()


@torch.no_grad()
def maps(network: Backbone, image: Tensor) -> dict[str, Tensor]:
    return dict(network(image))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other) == ["res2", "res3", "res4", "res5"]
    for name in one:
        size = one[name].abs().max().item()
        assert 1e-3 < size < 1e3, name  # else the comparison would say nothing
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5 * size)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(IMAGE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def reference(files: dict[str, str], image: Tensor) -> dict[str, Tensor]:
    """By torchvision itself, without this plugin."""
    network = resnet50().eval()
    network.load_state_dict(torch.load(files["torchvision"]))
    y, by_name = network.maxpool(network.relu(network.bn1(network.conv1(image)))), {}
    with torch.no_grad():
        for level in range(2, 6):
            y = by_name[f"res{level}"] = getattr(network, f"layer{level - 1}")(y)
    return by_name


@pytest.mark.parametrize(
    "name, source",
    [
        ("build_resnet_backbone", "torchvision"),
        ("build_resnet_backbone", "detectron2"),
        ("timm/resnet50", "torchvision"),
        ("timm/resnet50", "detectron2"),
        ("torchvision/resnet50", "detectron2"),
    ],
)
def test_every_library_gives_torchvisions_numbers(
    name: str, source: str, files: dict[str, str], reference: dict[str, Tensor], image: Tensor
) -> None:
    assert_same(maps(built(name, files[source]), image), reference)


def test_a_flipped_stem_takes_flipped_images(
    files: dict[str, str], reference: dict[str, Tensor], image: Tensor
) -> None:
    network = built("build_resnet_backbone", files["flipped"])
    assert_same(maps(network, image.flip(1)), reference)
    unflipped = maps(network, image)["res5"]
    assert not torch.allclose(unflipped, reference["res5"], rtol=0.1)


def test_msras_stride_placement_gives_other_numbers(
    files: dict[str, str], reference: dict[str, Tensor], image: Tensor
) -> None:
    msra = built("build_resnet_backbone", files["torchvision"], "MODEL.RESNETS.STRIDE_IN_1X1", True)
    others = maps(msra, image)
    torch.testing.assert_close(others["res2"], reference["res2"], rtol=1e-5, atol=1e-5)  # stride 1
    for name in ("res3", "res4", "res5"):
        assert others[name].shape == reference[name].shape
        assert not torch.allclose(others[name], reference[name], rtol=0.1)
