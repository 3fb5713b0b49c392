"""timm networks as bottom-up networks: names, channels, strides, freezing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from networks import SMALL_SWIN
from torch import nn

from fpn_plugin.bottom_up.timm import TimmBackbone


@pytest.mark.parametrize(
    "model, wanted, gone",
    [
        ("test_resnet", ["res3", "res4"], "layer4"),
        ("test_convnext", ["res2", "res4"], "stages_3"),
        ("test_efficientnet", ["res2", "res3"], "blocks.3"),  # timm itself leaves it in
        ("mobilenetv3_small_050", ["res3", "res4"], "blocks.4"),
        ("test_vit", ["res4"], "model.norm"),
    ],
)
def test_what_no_wanted_map_needs_does_not_run(model: str, wanted: list[str], gone: str) -> None:
    torch.manual_seed(0)
    part = TimmBackbone(model, wanted).eval()
    names = set(part.model.state_dict())
    assert not any(name.startswith(gone) for name in names)
    whole = TimmBackbone(model).eval()
    whole.model.load_state_dict(part.model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, everything = part(x), whole(x)
    assert list(maps) == list(part.output_shape()) == wanted
    assert all(torch.equal(y, everything[name]) for name, y in maps.items())
    sum(y.square().mean() for y in part.train()(x).values()).backward()
    assert all(p.grad is not None for p in part.parameters())


def test_parameters_that_no_map_depends_on_are_frozen() -> None:
    """HRNet computes all of its maps together; what nobody reads would stop distributed training."""
    backbone = TimmBackbone("hrnet_w18_small", ["res3", "res4"]).train()
    sum(y.square().mean() for y in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    without = {name for name, p in backbone.model.named_parameters() if p.grad is None}
    assert without == {n for n, p in backbone.model.named_parameters() if not p.requires_grad}
    assert all(name.startswith(("incre_modules", "stage4.0.fuse_layers")) for name in without)


def test_of_several_maps_of_one_stride_the_last_counts() -> None:
    backbone = TimmBackbone("test_vit").eval()
    assert {name: vars(shape) for name, shape in backbone.output_shape().items()} == {
        "res4": {"channels": 64, "stride": 16, "height": None, "width": None}
    }
    x = torch.randn(1, 3, 97, 131)  # padded to whole patches
    blocks = len(backbone.model.model.blocks)
    assert backbone(x)["res4"].shape == (1, 64, 7, 9)
    assert blocks == 6


def test_a_plain_vit_has_a_map_after_each_block() -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone("test_vit", ["res4_2", "res4", "res4_5"]).eval()
    assert list(backbone.output_shape()) == ["res4_2", "res4_5", "res4"]  # the network's order
    vit, x = backbone.model.model, torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        expected = vit.forward_intermediates(x, indices=[1, 4, 5], intermediates_only=True)
        maps = backbone(x)
    assert all(torch.equal(y, z) for y, z in zip(maps.values(), expected, strict=True))
    # what comes after the last wanted map is dropped, and everything else learns
    short = TimmBackbone("test_vit", ["res4_1", "res4_3"])
    assert len(short.model.model.blocks) == 3
    sum(y.square().mean() for y in short(x).values()).backward()
    assert all(p.grad is not None for p in short.parameters())
    frozen = TimmBackbone("test_vit", ["res4_1", "res4_3"], freeze_at=4)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("model", ["test_vit", "vit_small_patch16_dinov3"])
def test_maps_through_the_last_norm(model: str) -> None:
    args = {"depth": 4, "embed_dim": 48, "num_heads": 3, "norm_maps": True}
    backbone = TimmBackbone(model, ["res4_2", "res4_3"], args=args).eval()
    vit, x = backbone.model.model, torch.randn(1, 3, 33, 64)
    nn.init.normal_(vit.norm.weight)
    with torch.no_grad():
        plain = vit.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
        expected = [vit.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for y in plain]
        for y, z in zip(backbone(x).values(), expected, strict=True):
            assert y.shape == (1, 48, 3, 4) and torch.allclose(y, z, atol=1e-6)


def test_weights_of_other_patches_are_resampled(tmp_path: Path) -> None:
    """What the error for DINOv2's patches of 14 pixels advises."""
    source = timm.create_model("test_vit", patch_size=14, img_size=70)
    torch.save(source.state_dict(), tmp_path / "published.pth")
    args = {"patch_size": 16, "pretrained_cfg_overlay": {"file": str(tmp_path / "published.pth")}}
    backbone = TimmBackbone("test_vit", ["res4_2", "res4"], args=args, pretrained=True)
    vit = backbone.model.model
    assert torch.equal(vit.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    weight, old = vit.patch_embed.proj.weight, source.patch_embed.proj.weight
    assert weight.shape[2:] == (16, 16) and old.shape[2:] == (14, 14)
    expected = timm.layers.resample_patch_embed(old, [16, 16])
    assert torch.allclose(weight, expected, atol=1e-6)


# What FREEZE_AT 1, 2 and 3 freeze, each with what is before it
FREEZING = {
    "test_resnet": ["conv1 bn1", "layer1", "layer2"],
    "resnext26ts": ["stem_conv1 stem_conv2 stem_conv3", "stages_0", "stages_1"],
    "test_convnext": ["stem_0 stem_1", "stages_0", "stages_1"],
    "test_efficientnet": ["conv_stem bn1 blocks.0", "blocks.1", "blocks.2"],
    "mobilenetv3_small_050": ["conv_stem bn1", "blocks.0", "blocks.1"],
    "regnetx_002": ["stem", "s1", "s2"],
    "swin_tiny_patch4_window7_224": ["patch_embed", "layers_0", "layers_1"],
    # its stages, not what res2 depends on: nearly everything
    "hrnet_w18_small": ["conv1 bn1 conv2 bn2", "layer1 transition1", "stage2 transition2"],
    "densenet121": [
        "features_conv0 features_norm0",
        "features_denseblock1",
        "features_transition1 features_denseblock2",
    ],
    "ese_vovnet19b_slim_dw": ["stem_0 stem_1 stem_2", "stages_0", "stages_1"],
    "repvgg_a0": ["stem", "stages_0", "stages_1"],
    # res1 is the first convolution's result, before its norm
    "ghostnet_050": ["conv_stem bn1 blocks_0", "blocks_1", "blocks_2 blocks_3"],
    "test_vit": ["model.cls_token model.pos_embed model.patch_embed", "", ""],
    # there is no res1, and timm does not say where the stem ends
    "mvitv2_tiny": ["", "model.patch_embed model.stages.0", "model.stages.1"],
}
SMALL: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": SMALL_SWIN,
    "densenet121": {"block_config": [2, 2, 2, 2], "growth_rate": 8},
}


@pytest.mark.parametrize("freeze_at", [1, 3])  # test_networks.py has 2
@pytest.mark.parametrize("model", FREEZING)
def test_the_stem_and_the_stages_freeze(model: str, freeze_at: int) -> None:
    if not FREEZING[model][0] and freeze_at == 1:
        with pytest.raises(ValueError, match="FREEZE_AT: 1: where the stem.*from 0, 2, 3, 4, 5"):
            TimmBackbone(model, freeze_at=1)
        return
    network = TimmBackbone(model, freeze_at=freeze_at, args=SMALL.get(model)).model
    learned = {  # also as buffers of a FrozenBN
        name: value
        for name, value in network.state_dict(keep_vars=True).items()
        if not name.rpartition(".")[2].startswith(
            ("running_", "num_batches", "relative_position_i")
        )
        and not name.endswith("attn_mask")
    }
    parts = tuple(f"{part}." for part in " ".join(FREEZING[model][:freeze_at]).split())
    expected = {name for name in learned if f"{name}.".startswith(parts)}
    assert {name for name, value in learned.items() if not value.requires_grad} == expected


def test_without_a_stem_what_res1_depends_on_freezes() -> None:
    """VGG has no stem, and timm names the activations at its stages' ends."""
    network = TimmBackbone("vgg11", ["res2"], freeze_at=1, args={"mlp_ratio": 0.01}).model
    frozen = {name.split(".")[0] for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {"features_0", "features_3"}


@pytest.mark.parametrize("freeze_at", [0, 5])
def test_nothing_or_everything_freezes(freeze_at: int) -> None:
    backbone = TimmBackbone("test_resnet", freeze_at=freeze_at)
    assert {p.requires_grad for p in backbone.parameters()} == {freeze_at == 0}


def test_swin_gives_the_same_for_any_size_and_for_its_own() -> None:
    """What lets it take any size changes nothing for the size that it is made for."""
    model = "swin_tiny_patch4_window7_224"
    backbone = TimmBackbone(model, args=SMALL_SWIN).eval()
    own = timm.create_model(model, features_only=True, **SMALL_SWIN).eval()
    own.load_state_dict(backbone.model.state_dict(), strict=False)
    x = torch.randn(1, 3, 224, 224)
    for y, expected in zip(backbone(x).values(), own(x), strict=True):
        assert torch.allclose(y, expected.permute(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize(
    "model, args, divisibility",
    [
        ("swin_tiny_patch4_window7_224", SMALL_SWIN, 4),
        ("swinv2_cr_tiny_ns_224", {"embed_dim": 12, "depths": [1, 1, 1, 1]}, 0),
        ("dla46_c", {}, 32),
        ("hrnet_w18_small", {}, 32),
        ("inception_v3", {}, 0),  # loses the border: its maps are resampled
        ("mobilevitv2_050", {}, 64),  # pads its maps to an even size, and stretches them
        ("test_vit", {"dynamic_img_pad": False}, 16),  # what the user says counts
        ("pit_ti_224", {"img_size": [64, 96]}, 0),
    ],
)
def test_what_sizes_must_be_divisible_by_is_tried_out(
    model: str, args: dict[str, Any], divisibility: int
) -> None:
    backbone = TimmBackbone(model, args=args).eval()
    assert backbone.size_divisibility == divisibility
    height, width = args.get("img_size", (3 * max(divisibility, 32), 192))
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, height, width))
    for y, shape in zip(maps.values(), backbone.output_shape().values(), strict=True):
        assert y.shape[1] == shape.channels
        for rows, side in zip(y.shape[2:], (height, width)):
            assert rows in (side // shape.stride, -(-side // shape.stride))


def test_arguments_reach_the_network() -> None:
    backbone = TimmBackbone("test_convnext", args={"drop_path_rate": 0.5}).train()
    x = torch.randn(4, 3, 64, 64)
    one, two = backbone(x)["res5"], backbone(x)["res5"]
    assert not torch.equal(one, two)


@pytest.mark.parametrize("freeze_at", [0, 2])
@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_efficientnet"])
def test_checkpointing_keeps_the_gradients(model: str, freeze_at: int) -> None:
    one = TimmBackbone(model, freeze_at=freeze_at)
    two = TimmBackbone(model, freeze_at=freeze_at, args={"grad_checkpointing": True})
    two.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 64, 64)
    saved = []
    for backbone in (one, two):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t.numel()), t)[1], lambda t: t
        ):
            loss = sum(y.square().mean() for y in backbone(x).values())
        loss.backward()
        saved.append(sum(kept))
    assert saved[1] < saved[0]
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), name
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-5), name


def test_published_weights_are_taken(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), tmp_path / "published.pth")
    published = {"pretrained_cfg_overlay": {"file": str(tmp_path / "published.pth")}}
    backbone = TimmBackbone("test_resnet", ["res3", "res4"], 2, args=published, pretrained=True)
    given, state = source.state_dict(), backbone.model.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in state.items())


def test_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "gone.pth")}}
    text = "MODEL.BOTTOM_UP.WEIGHTS: 'timm': .*timm/test_resnet could not be had.*FileNotFound.*"
    with pytest.raises(ValueError, match=text):
        TimmBackbone("test_resnet", args=overlay, pretrained=True)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    # at once, where the client of the hub would try again for most of a minute
    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("fpn_plugin.bottom_up.timm.getproxies", dict)
    text = r"could not be had: OSError: no route to host\nDownload https://\S+ elsewhere and give"
    with pytest.raises(ValueError, match=text):
        TimmBackbone("test_vit", pretrained=True)
    with pytest.raises(ValueError, match="timm/ghostnet_050 do not exist: timm publishes none"):
        TimmBackbone("ghostnet_050", pretrained=True)


def test_a_model_without_maps_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("features_only not implemented for this")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match="timm/test_resnet gives no maps.*not implemented"):
        TimmBackbone("test_resnet")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "crossvit_tiny_240"}, "crossvit_tiny_240.*not a power of two"),
        ({"model": "pit_ti_224"}, "pit_ti_224 takes no images but.*BOTTOM_UP.ARGS: {img_size:"),
        ({"model": "vitamin_small_224"}, r"maps of \[504.*\] channels where timm promises \[384"),
        ({"model": "test_resnet.nope"}, "MODEL.BOTTOM_UP.NAME: timm/test_resnet.nope: .*nope"),
        (
            {"model": "test_resnet", "args": {"drop_pth": 0.1}},
            "MODEL.BOTTOM_UP.ARGS: {'drop_pth': 0.1} do not fit timm/test_resnet: .*'drop_pth'",
        ),
        (
            {"model": "test_resnet", "args": {"out_indices": [1]}},
            r"MODEL.BOTTOM_UP.ARGS: \['out_indices'\] are decided by other keys",
        ),
        (
            {"model": "hrnet_w18_small", "args": {"grad_checkpointing": True}},
            "ARGS.grad_checkpointing: timm/hrnet_w18_small has no gradient checkpointing",
        ),
        ({"model": "test_vit", "norm": "BN"}, "NORM: 'BN': timm/test_vit has no batch norms"),
        (
            {"model": "tf_efficientnet_lite9"},
            "MODEL.BOTTOM_UP.NAME: unknown name.*tf_efficientnet_lite",
        ),
        (
            {"model": "test_resnet", "out_features": ["res6"]},
            "'res6'.*res1, res2, res3, res4, res5",
        ),
        ({"model": "test_resnet", "norm": "XN"}, "MODEL.BOTTOM_UP.NORM: unknown name 'XN'"),
        (
            {"model": "test_vit", "args": {"patch_size": 14}},
            r"test_vit gives a map of stride 14 pixels.*MODEL.BOTTOM_UP.ARGS: {patch_size: 16}",
        ),
        (
            {"model": "test_vit", "out_features": ["res4_7"]},
            "'res4_7'.*did you mean 'res4_6'.*res4_1, res4_2, res4_3",
        ),
        (
            {"model": "test_vit", "out_features": ["res4_6", "res4"]},
            r"IN_FEATURES: \['res4_6', 'res4'\]: two of them are one map of timm/test_vit",
        ),
        (
            {"model": "test_resnet", "args": {"norm_maps": True}},
            "MODEL.BOTTOM_UP.ARGS.norm_maps: timm/test_resnet is no plain ViT",
        ),
    ],
)
def test_mistakes_are_named(arguments: dict, message: str) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        TimmBackbone(**arguments)


def test_an_image_that_is_not_padded_enough_has_its_maps_resampled() -> None:
    backbone = TimmBackbone("mobilevitv2_050").eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 160, 128))  # no multiples of 64
    assert maps["res5"].shape[2:] == (5, 4)
