"""Every lever that makes a model faster, alone and with the others, against the model without it."""

from __future__ import annotations

import copy
import itertools
from typing import Any, Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from helpers import CHANNELS, LEVELS, small_maps, zoo_config
from test_resume import assert_same
from tiny import VAL
from torch import Tensor, nn

from fpn_plugin.engine.step import build_optimizer
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.modeling.fold import cast_weights, fold_norms, fold_traced
from fpn_plugin.modeling.precision import Autocast
from fpn_plugin.modeling.speed import Speed, prepare_for_inference, prepare_for_training
from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.graph import op
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.topologies import Style

MakeConfig = Callable[..., CfgNode]
MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINA = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
SMALL = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
SMALL += ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 64]
SMALL += ["MODEL.BACKBONE.NAME", "build_pyramid_backbone", "MODEL.RPN.POST_NMS_TOPK_TEST", 20]
SMALL += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", -1.0, "MODEL.RETINANET.SCORE_THRESH_TEST", -1.0]
SMALL += ["TEST.DETECTIONS_PER_IMAGE", 10]


def livelier(model: nn.Module) -> nn.Module:
    """Random statistics and affine parameters, which keep the maps' size; in evaluation mode."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                module.weight.data.uniform_(0.3, 0.8)
                module.bias.data.normal_(std=0.2)
    return model.eval()


def detector(path: str = MASK, *keys: Any) -> tuple[nn.Module, CfgNode]:
    cfg = zoo_config(path, *SMALL, *keys)
    cfg.MODEL.PIXEL_STD = [58.0, 57.0, 57.0]
    return livelier(build_model(cfg)), cfg


def images() -> list[dict[str, Any]]:
    return [
        {"image": torch.randint(0, 255, (3, *size), dtype=torch.uint8), "height": 96, "width": 96}
        for size in ((96, 128), (64, 110))
    ]


def features(model: Any, batch: list[dict[str, Any]]) -> list[Tensor]:
    """The pyramid's maps, and what the first head makes of them."""
    model = getattr(model, "model", model)
    maps = model.backbone(model.preprocess_image(batch).tensor)
    head = model.head if hasattr(model, "head") else model.proposal_generator.rpn_head
    return [*maps.values(), *head(list(maps.values()))[0]]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, in units of each tensor's largest value."""
    pairs = zip(found, expected, strict=True)
    return max(((a.float() - b.float()).abs().max() / b.abs().max()).item() for a, b in pairs)


def norms(model: nn.Module) -> int:
    return sum(getattr(module, "running_mean", None) is not None for module in model.modules())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "path, channels_last, fold, half",
    [
        pytest.param(MASK, True, False, False, id="nhwc"),
        pytest.param(MASK, False, True, False, id="folded"),
        pytest.param(MASK, False, False, True, id="bf16"),
        pytest.param(MASK, True, True, True, id="all"),
        pytest.param(RETINA, True, True, True, id="retinanet"),
    ],
)
@torch.no_grad()
def test_inference_levers_together(path: str, channels_last: bool, fold: bool, half: bool) -> None:
    """float32 to 1e-5 of the largest value, bf16 to 5% (float32 itself is not nearer to it)."""
    levers = ("SOLVER.AMP.ENABLED", half, "TEST.FOLD_NORMS", fold)
    model, cfg = detector(path, "MODEL.CHANNELS_LAST", channels_last, *levers)
    cfg.MODEL.FAST_ROI_ALIGN = True
    before, batch = state(model), images()
    expected, detections = features(model, batch), model(batch)
    prepared = prepare_for_inference(model, cfg)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert worst(features(prepared, batch), expected) < (0.05 if half else 1e-5)
    assert norms(model) > 0 and norms(prepared) == (0 if fold else norms(model))
    faster = [output["instances"] for output in prepared(batch)]
    assert [len(instances) for instances in faster] == [10, 10]
    if not half:
        for instances, output in zip(faster, detections):
            boxes, scores = output["instances"].pred_boxes, output["instances"].scores
            close = {"rtol": 1e-3, "atol": 1e-2}
            assert torch.allclose(instances.pred_boxes.tensor, boxes.tensor, **close)
            assert torch.allclose(instances.scores, scores, **close)
    assert_same(state(model), before)
    assert (prepared is model) is not (fold or half)


@torch.no_grad()
def test_weights_cast_once_are_those_of_autocast() -> None:
    """Bit for bit what autocast computes when it casts on each forward; only weights change type."""
    model, cfg = detector(MASK, "SOLVER.AMP.ENABLED", True)
    prepared, batch = prepare_for_inference(model, cfg), images()
    plain = Autocast(model, "cpu", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for one, two in zip(features(plain, batch), features(prepared, batch)):
            assert torch.equal(one, two)
    for one, two in zip(plain(batch), prepared(batch)):
        assert torch.equal(one["instances"].pred_boxes.tensor, two["instances"].pred_boxes.tensor)
        assert torch.equal(one["instances"].pred_masks, two["instances"].pred_masks)
    assert {x.dtype for x in prepared.parameters()} == {torch.bfloat16}
    assert {x.dtype for x in prepared.buffers()} == {torch.float32}
    assert {x.dtype for x in model.parameters()} == {torch.float32}


CONVS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(6, 8, 3, padding=1, bias=False),
    "bias": lambda: nn.Conv2d(6, 8, 3, stride=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False),
    "grouped": lambda: nn.Conv2d(6, 8, 1, groups=2),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", CONVS)
@torch.no_grad()
def test_a_sequence_is_folded(kind: str, frozen: bool, layout: torch.memory_format) -> None:
    conv = CONVS[kind]()
    norm = FrozenBatchNorm2d(conv.out_channels) if frozen else nn.BatchNorm2d(conv.out_channels)
    model = livelier(nn.Sequential(conv, norm, nn.ReLU())).to(memory_format=layout)
    x = torch.randn(2, 6, 9, 7)
    expected = model(x)
    assert fold_norms(model) == 1 and norms(model) == 0
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    assert model[0].weight.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "block", ["conv3x3", "separable", "bottleneck", "csp", "rep", "csp_rep", "csp_elan5"]
)
@pytest.mark.parametrize("topology", ["fpn", "bifpn", "pafpn"])
@torch.no_grad()
def test_the_pyramids_blocks_are_folded(block: str, topology: str) -> None:
    graph = build_graph(topology, LEVELS, Style(block=op(block)))
    pyramid = livelier(Pyramid(graph, CHANNELS, Defaults(32, norm="BN", fuse=op("softmax"))))
    maps = small_maps(97, 131)
    expected = pyramid(maps)
    assert fold_norms(pyramid) > 0 and norms(pyramid) == 0
    assert worst(list(pyramid(maps).values()), list(expected.values())) < 1e-5


class Odd(nn.Module):
    """Convolutions whose norms cannot be folded, for every reason, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Conv2d(4, 4, 1)
        self.first = nn.Sequential(shared, nn.BatchNorm2d(4))
        self.second = nn.Sequential(shared, nn.BatchNorm2d(4))
        self.training_norm = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.without_statistics = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        )
        self.group = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
        self.between = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
        self.activated = nn.Sequential(Conv2d(4, 4, 1, activation=torch.relu), nn.BatchNorm2d(4))
        self.tied = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.tied_too = nn.Conv2d(4, 4, 1)
        self.tied_too.weight = self.tied[0].weight
        self.standardized = nn.Sequential(Standardized(4, 4, 1), nn.BatchNorm2d(4))
        self.fine = Conv2d(4, 4, 1, norm=nn.BatchNorm2d(4), activation=torch.relu)

    def forward(self, x: Tensor) -> Tensor:
        return sum((module(x) for module in self.children()), torch.zeros(()))


class Standardized(nn.Conv2d):
    """As in timm's networks without norms."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@torch.no_grad()
def test_what_cannot_be_folded_is_left() -> None:
    model = livelier(Odd())
    model.training_norm.train()
    expected = copy.deepcopy(model)(torch.ones(1, 4, 3, 5).cumsum(2))
    assert fold_norms(model) == 1
    assert model.fine.bias is not None and isinstance(model.fine.norm, nn.Identity)
    assert torch.allclose(model(torch.ones(1, 4, 3, 5).cumsum(2)), expected, atol=1e-5)


NETWORKS = {
    "resnet18": 20,
    "resnetv2_50": 32,
    "efficientnet_b0": 48,
    "tf_efficientnet_lite0": 48,
    "mobilenetv3_small_100": 34,
    "hrnet_w18_small": 87,
    "ghostnet_050": 62,
    "nf_resnet26": 0,
    "convnext_atto": 0,
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_timm_networks_are_folded(name: str) -> None:
    """By what really reads what: activations inside norms stay, and so does what is an output."""
    timm = pytest.importorskip("timm")
    network = livelier(timm.create_model(name, features_only=True, pretrained=False))
    x = torch.rand(1, 3, 96, 64)
    expected = network(x)
    assert fold_norms(network) + fold_traced(network) == NETWORKS[name]
    assert worst(network(x), expected) < 1e-4


@torch.no_grad()
def test_a_timm_bottom_up_network_in_a_detector() -> None:
    pytest.importorskip("timm")
    keys = ["MODEL.BOTTOM_UP.NAME", "timm/mobilenetv3_small_050", "TEST.FOLD_NORMS", True]
    model, cfg = detector(MASK, *keys)
    batch = images()
    prepared = prepare_for_inference(model, cfg)
    assert norms(model) == 34 and norms(prepared) == 0
    assert worst(features(prepared, batch), features(model, batch)) < 1e-4


def test_casting_leaves_what_is_not_known() -> None:
    model = nn.Sequential(Standardized(3, 3, 1), nn.MultiheadAttention(4, 2), nn.Linear(2, 2))
    cast_weights(model, torch.bfloat16)
    halves = {name for name, x in model.named_parameters() if x.dtype == torch.bfloat16}
    assert halves == {"2.weight", "2.bias"}


@torch.no_grad()
def test_channels_last_goes_through_the_whole_network() -> None:
    """From the first convolution to the heads; what a pooler gives is for the fully connected
    layers, which want channels first."""
    model, cfg = detector(MASK, "MODEL.CHANNELS_LAST", True)
    model = prepare_for_training(model, cfg)
    lost: set[str] = set()

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            items = output.values() if isinstance(output, dict) else output
            for x in items if isinstance(items, (list, tuple)) else [output]:
                if isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] > 1:
                    if not x.is_contiguous(memory_format=torch.channels_last):
                        lost.add(name)

        return hook

    for name, module in model.named_modules():
        if name.startswith(("backbone", "proposal_generator.rpn_head")):
            module.register_forward_hook(look(name))
    model(images()[:1])
    assert lost == set()


@pytest.mark.parametrize("part", ["pyramid", "backbone"])
def test_compiling_keeps_keys_and_numbers(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and inference, two sizes of a pyramid, and a copy; one graph without a break, run as it is."""
    torch._dynamo.reset()
    compiler = torch.compile
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph

    def compile_eagerly(function: Any = None, **options: Any) -> Any:
        return compiler(function, **{**options, "backend": backend, "fullgraph": part == "pyramid"})

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    model, cfg = detector(MASK, "MODEL.FPN.FUSE_TYPE", "fast_normalized")
    plain = copy.deepcopy(model)
    cfg.MODEL.COMPILE = part
    assert prepare_for_training(model, cfg) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    sizes = (images()[:1], images()) if part == "pyramid" else (images(),)
    for batch in sizes:
        assert worst(features(model, batch), features(plain, batch)) < 1e-5
    assert graphs
    cfg.TEST.FOLD_NORMS = True
    prepared = prepare_for_inference(model, cfg)
    assert worst(features(prepared, batch), features(plain, batch)) < 1e-5
    assert list(prepared.backbone.state_dict())[0].startswith("fpn_")
    copied = copy.deepcopy(model)
    assert copied.backbone._compiled is None and copied.backbone._compiled_call_impl is None
    torch.save(model.state_dict(), "/dev/null")


@pytest.mark.parametrize(
    "part, backbone, message",
    [
        ("neck", "build_pyramid_backbone", "MODEL.COMPILE.*'neck'.*backbone, pyramid"),
        ("pyramid", "build_resnet_fpn_backbone", "MODEL.COMPILE: 'pyramid' needs.*is FPN"),
    ],
)
def test_compile_errors(part: str, backbone: str, message: str) -> None:
    model, cfg = detector(MASK, "MODEL.BACKBONE.NAME", backbone)
    cfg.MODEL.COMPILE = part
    with pytest.raises((KeyError, ValueError), match=message):
        prepare_for_training(model, cfg)
    with pytest.raises(ValueError, match="train.compile: 'backbone' needs a model with a backbone"):
        prepare_for_training(nn.Linear(1, 1), Speed(compile="backbone", where="train.compile"))


def test_training_with_every_lever(make_config: MakeConfig) -> None:
    """A run of the tiny detector: losses and weights near those without, keys the same."""

    def run(name: str, **overrides: Any) -> tuple[dict[str, Tensor], float]:
        cfg = make_config(
            name,
            MODEL__BACKBONE__NAME="build_pyramid_backbone",
            MODEL__FPN__FUSE_TYPE="fast_normalized",
            MODEL__FPN__NORM="BN",
            SOLVER__BASE_LR=0.001,
            SOLVER__MAX_ITER=1,
            TEST__EVAL_PERIOD=0,
            **overrides,
        )
        torch.manual_seed(5)
        trainer = Trainer(cfg)
        assert trainer.model.backbone.recompute is overrides.get("MODEL__FPN__RECOMPUTE", False)
        trainer.train()
        return trainer.model.state_dict(), trainer.storage.history("total_loss").latest()

    plain, loss = run("plain")
    levers = {
        "MODEL__CHANNELS_LAST": True,
        "MODEL__FPN__RECOMPUTE": True,
        "MODEL__FAST_ROI_ALIGN": True,
        "SOLVER__FUSED": True,
        "TEST__FOLD_NORMS": True,
        "DATASETS__TEST": (VAL,),
        "DATALOADER__NUM_WORKERS": 1,
        "DATALOADER__PERSISTENT_WORKERS": True,
        "DATALOADER__PREFETCH_FACTOR": 1,
    }
    fast, fast_loss = run("fast", **levers)
    assert list(fast) == list(plain)
    assert fast_loss == pytest.approx(loss, rel=1e-3)
    for key, value in plain.items():
        assert torch.allclose(fast[key].float(), value.float(), rtol=1e-2, atol=1e-3), key


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("clip, nesterov", itertools.product([False, True], [False, True]))
def test_fused_optimizers(name: str, clip: bool, nesterov: bool, make_config: MakeConfig) -> None:
    """Equal to 1e-6 after several steps, with Detectron2's parameter groups and clipping."""
    results = []
    for fused in (False, True):
        cfg = make_config(
            SOLVER__OPTIMIZER=name,
            SOLVER__FUSED=fused,
            SOLVER__NESTEROV=nesterov,
            SOLVER__CLIP_GRADIENTS__ENABLED=clip,
            SOLVER__CLIP_GRADIENTS__CLIP_VALUE=0.01,
            SOLVER__WEIGHT_DECAY_NORM=0.01,
        )
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
        optimizer = build_optimizer(cfg, model)
        assert bool(optimizer.param_groups[0].get("fused")) is fused
        scales = getattr(optimizer, "_step_supports_amp_scaling", False)
        assert scales is (fused and not clip)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 6, 6)).square().mean().backward()
            optimizer.step()
        results.append([*model.parameters(), *optimizer.state_dict()["state"][0].values()])
    for one, two in zip(*results):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(two), rtol=1e-6, atol=1e-6)
