"""DetectoRS' recursive pyramid: what it begins as, on which networks, and from which checkpoints.

That it computes what MMDetection's computes is in tests/parity.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import Toy
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import ResNet, build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from helpers import assert_same, randomize, zoo_config
from torch import Tensor, nn

from fpn_plugin import PyramidBackbone, build_pyramid_backbone
from fpn_plugin.checkpoint.checkpointer import Checkpointer
from fpn_plugin.compat import EXPORT, require_torch
from fpn_plugin.modeling.bottom_up import build_bottom_up
from fpn_plugin.modeling.deformable import DeformBottleneck
from fpn_plugin.modeling.recursion import FeedbackResNet
from fpn_plugin.modeling.speed import Speed, prepare_for_inference

NAMES = ("res2", "res3", "res4", "res5")
FASTER, RETINA = (
    f"COCO-Detection/{name}_R_50_FPN_1x.yaml" for name in ("faster_rcnn", "retinanet")
)


def resnet(kind: Any = BasicBlock, norm: str = "BN", blocks: int = 2, **arguments: Any) -> ResNet:
    """Widths 8, 16, 24, 32."""
    stages, width = [], 8
    if kind is not BasicBlock:
        arguments["bottleneck_channels"] = 8
    for number in range(4):
        out, strides = 8 * (number + 1), [1 if number == 0 else 2, 1][:blocks]
        given = {"stride_per_block": strides, "norm": norm, **arguments}
        stages.append(ResNet.make_stage(kind, blocks, in_channels=width, out_channels=out, **given))
        width = out
    return ResNet(BasicStem(3, 8, norm), stages, out_features=list(NAMES))


def recursive(network: Any = None, in_features: Any = NAMES, **arguments: Any) -> PyramidBackbone:
    given = {"rfp_steps": 2, "extra_levels": "maxpool", **arguments}
    return PyramidBackbone(network or resnet(), in_features, 16, **given)


def once(backbone: PyramidBackbone) -> PyramidBackbone:
    """The same pyramid on the same network, without the recursion."""
    single = copy.deepcopy(backbone)
    single.rfp = None
    return single


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("topology, extra", [("fpn", "maxpool"), ("bifpn", "conv_p5")])
def test_it_begins_as_its_first_run_bit_for_bit(topology: str, extra: str, steps: int) -> None:
    backbone = recursive(topology=topology, extra_levels=extra, norm="BN", rfp_steps=steps)
    x = torch.randn(2, 3, 64, 96)
    for training in (True, False):
        backbone.train(training)
        assert_same(backbone(x), once(backbone)(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(backbone(x), once(backbone)(x))
    nn.init.normal_(backbone.rfp.networks[0].feedback["res3"].weight)
    moved, plain = backbone(x), once(backbone)(x)
    assert list(moved) == list(plain)
    assert not any(torch.equal(moved[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    "network",
    [
        resnet(),
        resnet(BottleneckBlock, "FrozenBN", stride_in_1x1=True),
        resnet(DeformBottleneck),
        resnet(DeformBottleneck, deform_modulated=True, deform_num_groups=2),
    ],
    ids=["basic", "bottleneck", "deformable", "modulated"],
)
def test_a_copy_of_any_resnet_computes_what_the_network_does(network: ResNet) -> None:
    randomize(network.eval())
    fed_back = {"p3": torch.randn(1, 4, 5, 7), "p5": torch.randn(1, 4, 2, 2)}
    twin = FeedbackResNet(network, NAMES[:3], {"res3": "p3"}, 4).eval()
    x = torch.randn(1, 3, 37, 53)  # rounded up
    maps = network(x)
    assert_same(twin(x, fed_back), {name: maps[name] for name in NAMES[:3]})
    assert not any(name.startswith("stages.4") for name, _ in twin.named_parameters())  # no res5
    nn.init.ones_(twin.feedback["res3"].bias)
    assert not torch.equal(twin(x, fed_back)["res3"], maps["res3"])
    assert torch.equal(twin(x, fed_back)["res2"], maps["res2"])


def test_what_is_frozen_is_frozen_in_both_and_all_else_learns() -> None:
    backbone = recursive(resnet().freeze(2))
    own = {name for name, p in backbone.bottom_up.named_parameters() if p.requires_grad}
    for parameter in backbone.rfp.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    sum(y.square().mean() for y in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    learning = {n for n, p in backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {n for n, p in backbone.named_parameters() if p.requires_grad}
    stages = backbone.rfp.networks[0].stages
    assert not any(p.requires_grad for stage in stages[:2] for p in stage.parameters())
    count = sum(p.requires_grad for stage in stages for p in stage.parameters())
    assert count == len(own) > 0
    assert stages[2][0].conv1.weight is not backbone.bottom_up.res3[0].conv1.weight


def test_it_scripts_traces_exports_and_folds_for_any_size() -> None:
    backbone = randomize(recursive(resnet(blocks=1), NAMES[1:], norm="BN")).eval()
    x, other = torch.randn(2, 3, 64, 96), torch.randn(1, 3, 128, 64)
    with torch.no_grad():
        expected, expected_other = backbone(x), backbone(other)
        traced = torch.jit.trace(backbone, x, strict=False)
        assert_same(traced(other), expected_other)
        folded = prepare_for_inference(backbone, Speed(fold_norms=True, channels_last=True))
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        scale = max(float(y.abs().max()) for y in expected.values())
        assert_same(folded(x), expected, 1e-5 * scale)
        assert_same(torch.jit.script(backbone)(other), expected_other)
        require_torch(EXPORT, "torch.export", "")
        sides = {2: 32 * torch.export.Dim("h", max=64), 3: 32 * torch.export.Dim("w", max=64)}
        exported = torch.export.export(backbone, (x,), dynamic_shapes=(sides,)).module()
        assert_same(exported(x), expected)


@pytest.mark.parametrize("config", [FASTER, RETINA])
def test_a_pyramid_of_fewer_levels_feeds_back_what_it_has(config: str) -> None:
    cfg = zoo_config(config, "MODEL.BACKBONE.NAME", "build_pyramid_backbone")
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.FPN.RFP_STEPS, cfg.MODEL.FPN.OUT_CHANNELS = 2, 16
    backbone = build_pyramid_backbone(cfg, ShapeSpec(channels=3))
    assert backbone.rfp.sources == {"res3": "p3", "res4": "p4", "res5": "p5"}
    only = recursive(resnet(), ("res4",), extra_levels="none")
    assert only.rfp.sources == {"res4": "p4"} and len(only.rfp.networks[0].stages) == 4


def caffe2_file(model: Any, path: Path) -> dict[str, Tensor]:
    """The network's weights as ImageNet's have them: its names alone, frozen norms as affine."""
    network = model.backbone.bottom_up.state_dict()
    leaves = ("running_mean", "running_var")
    given = {name: torch.randn_like(x) for name, x in network.items() if not name.endswith(leaves)}
    torch.save({"model": given, "matching_heuristics": True}, path)
    return given


@pytest.mark.parametrize("checkpointer", [Checkpointer, DetectionCheckpointer])
def test_both_networks_start_from_imagenets_weights(
    checkpointer: type[DetectionCheckpointer], tmp_path: Path
) -> None:
    model: Any = nn.Module()
    model.backbone = recursive(resnet(norm="FrozenBN"))
    given = caffe2_file(model, tmp_path / "R.pth")
    checkpointer(model).load(str(tmp_path / "R.pth"))
    stages, names = model.backbone.rfp.networks[0].stages, ("stem", *NAMES)
    for name, x in given.items():
        stage, _, rest = name.partition(".")
        assert torch.equal(model.backbone.bottom_up.state_dict()[name], x)
        assert torch.equal(stages[names.index(stage)].state_dict()[rest], x), name
    x = torch.randn(1, 3, 64, 64)
    assert_same(model.backbone(x), once(model.backbone)(x))


def test_a_checkpoint_of_a_plain_pyramid_goes_on_and_its_own_stays(tmp_path: Path) -> None:
    plain, model = recursive(rfp_steps=1), recursive()
    x = torch.randn(1, 3, 64, 64)
    model.load_state_dict(randomize(plain).state_dict(), strict=False)
    assert_same(model.eval()(x), plain.eval()(x))
    trained = randomize(recursive()).eval()
    model.load_state_dict(trained.state_dict())
    assert_same(model(x), trained(x))


def test_networks_and_settings_that_take_no_feedback_are_refused() -> None:
    with pytest.raises(ValueError, match="rfp_steps: 2 feeds .* is a Toy, whose blocks .* or 1$"):
        recursive(Toy({2: 8, 3: 16, 4: 24, 5: 48}))
    own = resnet()
    own.res4[0] = type("Mine", (BasicBlock,), {"forward": lambda self, x: x})(16, 24, stride=2)
    with pytest.raises(ValueError, match="the network is a ResNet of Mine, whose blocks"):
        recursive(own)
    with pytest.raises(ValueError, match="rfp_steps: 2 feeds the maps of level 3 and coarser"):
        recursive(resnet(), ("res2",), extra_levels="none")
    for steps in (0, 9, True, 2.0, "2"):
        with pytest.raises(ValueError, match=f"rfp_steps: {steps!r} is not a whole number from 1"):
            recursive(rfp_steps=steps)
    with pytest.raises(ValueError, match="rfp_steps: 2 .* `out_channels` 18 is not divisible by 4"):
        PyramidBackbone(resnet(), NAMES, 18, rfp_steps=2)
    with pytest.raises(ValueError, match=r"warm_from: .* runs 2 times \(RFP_STEPS\).* take 2"):
        recursive(rfp_steps=1, warm_from=recursive())


def test_the_keys_are_in_the_errors_of_a_config() -> None:
    cfg = zoo_config(FASTER, "MODEL.BACKBONE.NAME", "build_pyramid_backbone")
    cfg.MODEL.FPN.RFP_STEPS, cfg.MODEL.BOTTOM_UP.NAME = 2, "build_regnet_backbone"
    with pytest.raises(ValueError, match="MODEL.FPN.RFP_STEPS: 2 .* is a RegNet, .*BOTTOM_UP.NAME"):
        build_model(cfg)
    cfg.MODEL.BOTTOM_UP.NAME, cfg.MODEL.FPN.OUT_CHANNELS = "build_resnet_backbone", 30
    with pytest.raises(
        ValueError, match="FPN.RFP_STEPS: 2 .* MODEL.FPN.OUT_CHANNELS 30 is not div"
    ):
        build_model(cfg)
    assert isinstance(build_bottom_up(cfg, ShapeSpec(channels=3)), ResNet)
