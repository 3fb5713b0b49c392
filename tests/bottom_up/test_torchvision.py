"""torchvision's networks as bottom-up networks: which maps, freezing, arguments, weights."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from fpn_plugin.bottom_up.torchvision import TorchvisionBackbone

# channels by level, and how odd sides are rounded: by their convolutions' paddings
FAMILIES: dict[str, tuple[dict[int, int], str]] = {
    "resnet18": ({1: 64, 2: 64, 3: 128, 4: 256, 5: 512}, "up"),
    "densenet121": ({1: 64, 2: 256, 3: 512, 4: 1024, 5: 1024}, "any"),
    "mobilenet_v3_small": ({1: 16, 2: 16, 3: 24, 4: 48, 5: 576}, "up"),
    "efficientnet_b0": ({1: 16, 2: 24, 3: 40, 4: 112, 5: 1280}, "up"),
    "regnet_x_400mf": ({1: 32, 2: 32, 3: 64, 4: 160, 5: 400}, "up"),
    "convnext_tiny": ({2: 96, 3: 192, 4: 384, 5: 768}, "down"),
    "swin_t": ({2: 96, 3: 192, 4: 384, 5: 768}, "any"),
    "shufflenet_v2_x0_5": ({1: 24, 2: 24, 3: 48, 4: 96, 5: 1024}, "up"),
    "vgg11_bn": ({0: 64, 1: 128, 2: 256, 3: 512, 4: 512, 5: 512}, "down"),
    "squeezenet1_1": ({1: 64, 2: 128, 3: 256, 4: 512}, "any"),
    "googlenet": ({1: 64, 2: 192, 3: 480, 4: 832, 5: 1024}, "any"),
}
FAMILY = pytest.mark.parametrize("name", list(FAMILIES))
# FREEZE_AT, and the first parameter that learns
FREEZING = {
    "resnet18": (2, "layer2.0."),
    "densenet121": (2, "features.transition1."),
    "mobilenet_v3_small": (3, "features.4."),
    "convnext_tiny": (1, "features.1.0."),  # it begins with patches
    "swin_t": (3, "features.4."),
    "shufflenet_v2_x0_5": (2, "stage2."),  # its res2 is the pooled stem
}
DILATED = {"replace_stride_with_dilation": [False, False, True]}


@lru_cache
def network(name: str) -> TorchvisionBackbone:
    """Of one family, frozen as FREEZING says, in evaluation mode; only for reading."""
    args = {"init_weights": False} if name in ("vgg11_bn", "googlenet") else {}
    return TorchvisionBackbone(name, freeze_at=FREEZING.get(name, (0, ""))[0], args=args).eval()


def assert_frozen_until(backbone: TorchvisionBackbone, first: str) -> None:
    """That `first` begins the name of the first parameter that learns; "": none does."""
    trained = [name for name, p in backbone.model.named_parameters() if p.requires_grad]
    assert trained[0].startswith(first) if first else not trained
    assert not any(
        isinstance(module, nn.BatchNorm2d) and not any(p.requires_grad for p in module.parameters())
        for module in backbone.modules()
    )


@FAMILY
def test_maps_have_the_channels_and_shapes_that_were_promised(name: str) -> None:
    channels, rounding = FAMILIES[name]
    shapes = network(name).output_shape()
    assert {key: shape.channels for key, shape in shapes.items()} == {
        f"res{level}": count for level, count in channels.items()
    }
    assert [shape.stride for shape in shapes.values()] == [2**level for level in channels]
    with torch.no_grad():
        even = network(name)(torch.randn(2, 3, 64, 96))
        odd = network(name)(torch.randn(1, 3, 97, 131))
    for key, shape in shapes.items():
        height, width = (side // shape.stride for side in (64, 96))
        assert tuple(even[key].shape) == (2, shape.channels, height, width)
        down = [side // shape.stride for side in (97, 131)]
        up = [-(-side // shape.stride) for side in (97, 131)]
        size = list(odd[key].shape[2:])
        if rounding == "any":
            assert all(a <= side <= b for a, side, b in zip(down, size, up))
        else:
            assert size == {"up": up, "down": down}[rounding]
        assert even[key].isfinite().all() and odd[key].isfinite().all()


@FAMILY
def test_the_names_of_its_tensors_are_torchvision_s(name: str) -> None:
    with torch.device("cpu" if "regnet" in name else "meta"):  # regnet reads a number of its own
        own = models.get_model(name, weights=None).state_dict()
    ours = network(name).model.state_dict()
    assert {key: ours[key].shape for key in ours} == {key: own[key].shape for key in ours}
    lost = {k.split(".")[0] for k in set(own) - set(ours) if not k.endswith("_tracked")}
    assert lost <= {"fc", "classifier", "head", "aux1", "aux2"} and lost


def layers(whole: Any, x: Tensor) -> list[Tensor]:
    """What a torchvision ResNet computes, by hand."""
    x = whole.relu(whole.bn1(whole.conv1(x)))
    maps = [x.clone()]
    x = whole.maxpool(x)
    for layer in (whole.layer1, whole.layer2, whole.layer3, whole.layer4):
        x = layer(x)
        maps.append(x.clone())
    return maps


def test_the_maps_are_those_of_a_network_run_by_hand() -> None:
    backbone, whole = TorchvisionBackbone("resnet18"), models.resnet18()
    whole.load_state_dict(backbone.model.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 96)
    for training in (False, True):
        with torch.no_grad():
            maps = list(backbone.train(training)(x).values())
            by_hand = layers(whole.train(training), x)
        assert all(torch.equal(a, b) for a, b in zip(maps, by_hand, strict=True))


# modules whose results the maps are; ReLU and others that work in place must not reach them
MODULES = {
    "densenet121": {"res2": "features.denseblock1", "res4": "features.denseblock3"},
    "mobilenet_v3_small": {"res2": "features.1", "res3": "features.3", "res5": "features.12"},
    "efficientnet_b0": {"res1": "features.1", "res4": "features.5", "res5": "features.8"},
    "regnet_x_400mf": {"res1": "stem", "res2": "trunk_output.block1", "res5": "trunk_output"},
    "convnext_tiny": {"res2": "features.1", "res4": "features.5", "res5": "features.7"},
    "swin_t": {"res2": "features.1", "res4": "features.5", "res5": "permute"},
    "shufflenet_v2_x0_5": {"res2": "maxpool", "res3": "stage2", "res5": "conv5"},
    "googlenet": {"res2": "conv3", "res3": "inception3b", "res5": "inception5b"},
}


@pytest.mark.parametrize("name", list(MODULES))
def test_a_map_is_what_its_stage_gives(name: str) -> None:
    more = {"transform_input": True, "init_weights": False} if name == "googlenet" else {}
    whole = models.get_model(name, weights=None, **more).eval()
    whole.load_state_dict(network(name).model.state_dict(), strict=False)
    given: dict[str, Tensor] = {}
    for key, module in MODULES[name].items():
        whole.get_submodule(module).register_forward_hook(
            lambda _, __, out, key=key: given.setdefault(key, out.clone())
        )
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        whole(x)
        maps = network(name)(x)
    for key, wanted in given.items():
        nhwc = name == "swin_t" and key != "res5"
        assert torch.equal(maps[key], wanted.permute(0, 3, 1, 2) if nhwc else wanted), key


def test_what_comes_after_the_last_wanted_map_is_cut_off() -> None:
    backbone = TorchvisionBackbone("resnet18", out_features=["res4", "res2"])
    assert list(backbone.output_shape()) == ["res2", "res4"]
    assert list(backbone(torch.randn(1, 3, 64, 64))) == ["res2", "res4"]
    assert {name.split(".")[0] for name, _ in backbone.model.named_parameters()} == {
        *("conv1", "bn1", "layer1", "layer2", "layer3")
    }


@pytest.mark.parametrize("name", FREEZING)
def test_freezing_stops_at_the_level(name: str) -> None:
    assert_frozen_until(network(name), FREEZING[name][1])


@pytest.mark.parametrize("freeze_at, first", [(0, "conv1."), (1, "layer1.0."), (5, "")])
def test_every_level_can_be_frozen(freeze_at: int, first: str) -> None:
    with torch.device("meta"):
        assert_frozen_until(TorchvisionBackbone("resnet18", freeze_at=freeze_at), first)


def test_a_copy_gives_the_same_maps() -> None:
    backbone, x = network("mobilenet_v3_small"), torch.randn(1, 3, 64, 64)
    assert torch.equal(backbone(x)["res5"], copy.deepcopy(backbone).eval()(x)["res5"])


def test_stochastic_depth_and_the_like_work_in_training_alone() -> None:
    backbone = TorchvisionBackbone("convnext_tiny", args={"stochastic_depth_prob": 0.9})
    for name, p in backbone.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.ones_(p)  # at its start the dropped paths are too weak to be seen
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(backbone.train()(x)["res5"], backbone(x)["res5"])
        assert torch.equal(backbone.eval()(x)["res5"], backbone(x)["res5"])


def test_arguments_reach_the_network() -> None:
    """With dilation the last stage keeps its stride, so it is the last of that stride."""
    with torch.device("meta"):
        shapes = TorchvisionBackbone("resnet50", args=DILATED).output_shape()
    channels = {key: shape.channels for key, shape in shapes.items()}
    assert channels == {"res1": 64, "res2": 256, "res3": 512, "res4": 2048}


def test_googlenet_takes_the_pixels_that_all_others_take() -> None:
    """Its weights were trained on others; the network makes them, with or without weights."""
    x = torch.randn(1, 3, 64, 64)
    plain = TorchvisionBackbone("googlenet", args={"transform_input": False}).eval()
    plain.load_state_dict(network("googlenet").state_dict())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = x * std[:, None, None] + mean[:, None, None]
    with torch.no_grad():
        ours, theirs = network("googlenet")(x), plain((pixels - 0.5) / 0.5)
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)


def test_pretrained_weights_are_torchvision_s_best(monkeypatch: pytest.MonkeyPatch) -> None:
    state = models.resnet18().state_dict()
    asked = []

    def get_state_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        asked.append(self)
        return state

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", get_state_dict)
    backbone = TorchvisionBackbone("resnet18", pretrained=True)
    assert asked == [models.ResNet18_Weights.DEFAULT]
    assert torch.equal(backbone.model.state_dict()["conv1.weight"], state["conv1.weight"])


def test_weights_that_cannot_be_had_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", refuse)
    message = "MODEL.BOTTOM_UP.WEIGHTS: 'torchvision': .*resnet18.*no route to host\nDownload https.*/resnet18-f.*\nor put"
    with pytest.raises(ValueError, match=message):
        TorchvisionBackbone("resnet18", pretrained=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"model": "resnet19"},
            "MODEL.BOTTOM_UP.NAME: .*'torchvision/resnet19'.*mean 'torchvision/resnet18'",
        ),
        (
            {"model": "vit_b_16"},
            "NAME: torchvision/vit_b_16 gives no maps.*height.*timm/vit_.*TOPOLOGY: simple",
        ),
        (
            {"model": "resnet18", "out_features": ["res6"]},
            "IN_FEATURES.*torchvision/resnet18.*'res6'.*res1, res2, res3, res4, res5",
        ),
        ({"model": "resnet18", "norm": "XN"}, "MODEL.BOTTOM_UP.NORM: unknown name 'XN'"),
        ({"model": "googlenet", "in_channels": 4}, "torchvision/googlenet.*3 channels, not 4"),
        (
            {"model": "resnet18", "args": {"drop_path_rate": 0.1}},
            "MODEL.BOTTOM_UP.ARGS: .*torchvision/resnet18.*'drop_path_rate'",
        ),
        (
            {"model": "resnet18", "args": {"weights": "DEFAULT"}},
            "MODEL.BOTTOM_UP.ARGS: .*torchvision/resnet18.*'weights'",
        ),
        *(
            (
                {"model": "resnet18", "args": DILATED, "pretrained": pretrained},
                "MODEL.BOTTOM_UP.ARGS: .*torchvision/resnet18.*Dilation",
            )
            for pretrained in (False, True)
        ),
    ],
)
def test_mistakes_are_named(arguments: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises((KeyError, ValueError), match=message):
        TorchvisionBackbone(**arguments)
