"""1x1 convolutions of one map that run as one: equal to the separate ones, wherever a pyramid runs."""

from __future__ import annotations

import copy
from typing import Any, Callable

import pytest
import torch
from detectron2.modeling import build_backbone
from helpers import CHANNELS, LEVELS, randomize, small_maps, small_pyramid, zoo_config
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fpn_plugin.engine.fold import fold_norms
from fpn_plugin.engine.speed import Speed, prepare_for_inference
from fpn_plugin.pyramid import merge
from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.graph import op, parse_graph
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.topologies import TOPOLOGIES, Style

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SIZES = [(64, 96), (97, 131)]
# how many convolutions become how many
MERGED = {
    "asff": (12, 3),
    "bfp": (6, 3),
    "bifpn": (4, 2),
    "fpg": (40, 5),
    "qufpn": (11, 3),
}


def convolutions(pyramid: Pyramid, maps: dict[str, Tensor]) -> int:
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as found:
        pyramid(maps)
    return {item.key: item.count for item in found.key_averages()}["aten::conv2d"]


def maps_in(layout: str, size: tuple[int, int], batch: int = 2) -> dict[str, Tensor]:
    return {
        name: x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        for name, x in small_maps(*size, batch=batch).items()
    }


def run(pyramid: Pyramid, maps: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs, and the gradients of every parameter and input, and the statistics of the norms."""
    outputs = pyramid(maps)
    sum(x.float().square().mean() for x in outputs.values()).backward()
    found = [p.grad for p in pyramid.parameters()]
    found += [x.grad for x in maps.values() if x.grad is not None]
    found += [x.float() for x in pyramid.buffers()]
    for x in maps.values():
        x.grad = None
    return outputs, found


def assert_near(one: Any, two: Any, tolerance: float) -> None:
    """In units of the largest value."""
    for a, b in zip(one, two, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(b.abs().max().item(), 1e-3)
        assert (a.float() - b.float()).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("topology", TOPOLOGIES.names())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_equal_outputs_and_gradients(topology: str, layout: str, size: tuple[int, int]) -> None:
    plain = small_pyramid(topology, norm="BN", fuse=op("sum"))
    merged = copy.deepcopy(plain)
    merged.merge_projections = True
    maps = maps_in(layout, size)
    (expected, gradients), (found, others) = run(plain, maps), run(merged, maps)
    assert list(found) == list(expected)
    assert_near(found.values(), expected.values(), 1e-6)
    assert_near(others, gradients, 1e-5)
    for name, x in found.items():
        assert x.stride() == expected[name].stride()


@pytest.mark.parametrize("topology", TOPOLOGIES.names())
def test_how_many_convolutions_are_left(topology: str) -> None:
    pyramid, maps = small_pyramid(topology), small_maps()
    before = convolutions(pyramid, maps)
    pyramid.merge_projections = True
    many, few = MERGED.get(topology, (0, 0))
    assert len(pyramid.mergeable) == many
    assert convolutions(pyramid, maps) == before - many + few


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_fusions_still_take_one_pass(layout: str) -> None:
    """Also where no norm stands between the merged convolution and the fusion, and with two images."""
    pyramid = small_pyramid("bifpn", fuse=op("fast_normalized")).eval()
    pyramid.merge_projections = True
    maps = {name: x.detach() for name, x in maps_in(layout, (128, 128)).items()}
    with profile(activities=[ProfilerActivity.CPU]) as found:
        pyramid(maps)
    assert "aten::upsample_nearest2d" not in {item.key for item in found.key_averages()}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm", ["", "GN", "FrozenBN"])
def test_autocast_and_norms(half: bool, training: bool, norm: str) -> None:
    plain = small_pyramid("bifpn", norm=norm, fuse=op("softmax")).train(training)
    merged = copy.deepcopy(plain)
    merged.merge_projections = True
    maps = maps_in("nchw", (97, 131))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        (expected, gradients), (found, others) = run(plain, maps), run(merged, maps)
    assert_near(found.values(), expected.values(), 2**-6 if half else 1e-6)
    assert_near(others, gradients, 0.05 if half else 1e-5)


def test_with_maps_made_again() -> None:
    """`MODEL.FPN.RECOMPUTE` changes no bit of it."""
    results = []
    for again in (False, True):
        torch.manual_seed(1)
        pyramid = small_pyramid("bifpn", norm="BN", fuse=op("softmax"), activation="silu")
        pyramid.merge_projections, pyramid.recompute = True, again
        outputs, gradients = run(pyramid, maps_in("nchw", (97, 131)))
        results.append([*outputs.values(), *gradients])
    assert_near(*results, 0.0)


def inline(*nodes: dict[str, Any], **defaults: Any) -> Pyramid:
    graph = parse_graph({"res4": 4, "res5": 5}, nodes)
    return randomize(Pyramid(graph, CHANNELS, Defaults(32, **defaults)))


def test_a_lateral_and_a_projection_are_one_and_other_geometries_are_not() -> None:
    """By source, stride, bias and what comes before; a lateral's activation stays its own."""
    swish = {"name": "conv1x1", "order": "act-conv-norm", "activation": "silu"}
    pyramid = inline(
        {"name": "lateral", "level": 4, "inputs": ["res4"], "block": "conv1x1"},
        {"name": "a", "level": 4, "inputs": ["res4", "res5"], "fuse": "max", "output": True},
        {
            "name": "b",
            "level": 5,
            "inputs": [
                {"source": "res4", "block": "conv3x3"},
                {"source": "res5", "project": swish},
                {"source": "res5", "project": {"name": "conv1x1", "bias": False}},
                {"source": "res5", "project": swish},
                {"source": "lateral", "resample": "conv"},
            ],
            "output": True,
        },
        activation="relu",
    )
    found = set(pyramid.mergeable.values())
    assert found == {
        ("lateral", "a_edge0.project"),
        ("b_edge1.project", "b_edge3.project"),
    }
    maps = maps_in("nchw", (64, 96))
    expected, gradients = run(pyramid, maps)
    merged = copy.deepcopy(pyramid)
    merged.zero_grad()
    merged.merge_projections = True
    outputs, others = run(merged, maps)
    assert_near(outputs.values(), expected.values(), 1e-6)
    assert_near(others, gradients, 1e-5)


def bifpn(norm: str = "BN", repeats: int = 1) -> Pyramid:
    levels = {name: level for name, level in LEVELS.items() if name != "res2"}
    graph = build_graph("bifpn", levels, Style(block=op("separable")), repeats)
    return randomize(
        Pyramid(graph, CHANNELS, Defaults(48, fuse=op("fast_normalized"), norm=norm))
    ).eval()


@pytest.mark.parametrize("how", ["script", "trace", "compile", "export"])
@torch.no_grad()
def test_compilers_see_the_separate_convolutions(how: str) -> None:
    pyramid = bifpn()
    maps = {name: x for name, x in small_maps().items() if name in pyramid.graph.inputs}
    expected = pyramid(maps)
    pyramid.merge_projections = True
    if how == "script":
        made: Callable[..., Any] = torch.jit.script(pyramid)
    elif how == "trace":
        made = torch.jit.trace(pyramid, (maps,), strict=False)
    elif how == "compile":
        torch._dynamo.reset()
        made = torch.compile(pyramid, fullgraph=True, backend="eager", dynamic=True)
    else:
        made = torch.export.export(pyramid, (maps,)).module()
    assert_near(made(maps).values(), expected.values(), 1e-5)


@torch.no_grad()
def test_what_hooks_see_runs_alone() -> None:
    pyramid = bifpn()
    pyramid.merge_projections = True
    maps = small_maps()
    path, other = next(iter(pyramid.mergeable.values()))[:2]
    seen: list[str] = []
    handle = pyramid.get_submodule(other).register_forward_hook(lambda *_: seen.append(other))
    before = convolutions(pyramid, maps)
    # of the groups of three and two, the first, which has the hook, runs apart
    assert seen and before == convolutions(small(pyramid, False), maps) - 1
    handle.remove()
    assert convolutions(pyramid, maps) == before - 2 and path in pyramid.mergeable


def small(pyramid: Pyramid, merged: bool) -> Pyramid:
    pyramid = copy.deepcopy(pyramid)
    pyramid.merge_projections = merged
    for module in pyramid.modules():
        module._forward_hooks.clear()
    return pyramid


class Detector(nn.Module):
    """What `prepare_for_inference` looks for a pyramid in."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.backbone(maps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@torch.no_grad()
def test_prepared_weights_lie_side_by_side_and_are_not_stale(layout: str, half: bool) -> None:
    """No concatenation on a run, the model's own keys, and what changes a weight later counts."""
    model = Detector(bifpn())
    model.backbone.merge_projections = True
    maps = {name: x.detach() for name, x in maps_in(layout, (97, 131), 1).items()}
    expected, keys = model(maps), list(model.state_dict())
    dtype = torch.bfloat16 if half else None
    speed = Speed(dtype=dtype, fold_norms=True, channels_last=layout == "nhwc")
    prepared = prepare_for_inference(model, speed)
    inner = getattr(prepared, "model", prepared)
    assert_near(
        [x.float() for x in prepared(maps).values()], expected.values(), 0.05 if half else 1e-5
    )
    assert list(model.state_dict()) == keys
    with profile(activities=[ProfilerActivity.CPU]) as found:
        prepared(maps)
    assert "aten::cat" not in {item.key for item in found.key_averages()}
    for change in (in_place, by_data, replaced, by_loading):
        change(inner.backbone)
        plain = small(inner.backbone, False)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            wanted = plain({name: x for name, x in maps.items() if name in plain.graph.inputs})
        assert_near(prepared(maps).values(), wanted.values(), 2**-6 if half else 1e-5)


def weight_of(pyramid: Pyramid) -> nn.Parameter:
    return pyramid.get_submodule(next(iter(pyramid.mergeable))).weight


def in_place(pyramid: Pyramid) -> None:
    weight_of(pyramid).mul_(2)


def by_data(pyramid: Pyramid) -> None:
    weight_of(pyramid).data.mul_(0.3)


def replaced(pyramid: Pyramid) -> None:
    weight = weight_of(pyramid)
    weight.data = torch.randn_like(weight) / 5


def by_loading(pyramid: Pyramid) -> None:
    pyramid.load_state_dict({k: v * 0.7 for k, v in pyramid.state_dict().items()})


@torch.no_grad()
def test_a_copy_and_a_saved_state_are_whole(tmp_path: Any) -> None:
    pyramid = bifpn(norm="")
    pyramid.merge_projections = True
    before = {key: value.clone() for key, value in pyramid.state_dict().items()}
    maps = small_maps()
    expected = pyramid(maps)
    merge.lay_side_by_side(pyramid, pyramid.mergeable)
    torch.save(pyramid.state_dict(), tmp_path / "state.pth")
    loaded = torch.load(tmp_path / "state.pth", weights_only=True)
    for state in (pyramid.state_dict(), copy.deepcopy(pyramid).state_dict(), loaded):
        assert list(state) == list(before)
        assert all(torch.equal(state[key], value) for key, value in before.items())
    for one in (pyramid, copy.deepcopy(pyramid)):
        assert_near(one(maps).values(), expected.values(), 1e-6)


def test_side_by_side_weights_can_be_learned_again() -> None:
    """Where gradients are wanted, the weights are concatenated, so that each gets its own."""
    plain = bifpn(norm="").train()
    merged = copy.deepcopy(plain)
    merged.merge_projections = True
    merge.lay_side_by_side(merged, merged.mergeable)
    maps = maps_in("nchw", (64, 96))
    (_, gradients), (_, others) = run(plain, maps), run(merged, maps)
    assert_near(others, gradients, 1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_the_key(merged: bool) -> None:
    cfg = zoo_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "MODEL.RESNETS.DEPTH", 18)
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.BACKBONE.NAME = "build_pyramid_backbone"
    assert not cfg.MODEL.FPN.MERGE_PROJECTIONS
    cfg.MODEL.FPN.MERGE_PROJECTIONS = merged
    assert build_backbone(cfg).merge_projections is merged


@torch.no_grad()
def test_folding_comes_before() -> None:
    """Norms that differ between the convolutions of a group are folded into each one's share."""
    pyramid = bifpn().eval()
    for module in pyramid.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    maps = small_maps(97, 131)
    expected = pyramid(maps)
    assert fold_norms(pyramid) > 0
    pyramid.merge_projections = True
    assert_near(pyramid(maps).values(), expected.values(), 1e-5)
