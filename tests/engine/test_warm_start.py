"""A checkpoint's detector goes on as another one: the same function at first, and it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from test_resume import assert_same
from warm_models import (
    BIFPN,
    MASKS,
    RETINANET,
    TARGETS,
    a_config,
    a_model,
    image,
    largest_difference,
    seen,
    warm,
)

from fpn_plugin.config.warm_start import NO_PYRAMID
from fpn_plugin.engine.warm.start import WarmStart
from fpn_plugin.engine.warm.widths import shapes_at_width

STARTS = {name: (fpn, MASKS) for name, fpn in TARGETS.items()}
STARTS["retinanet"] = (BIFPN, RETINANET)
STARTS["rfp"] = ({"RFP_STEPS": 2, "TOPOLOGY": "pafpn"}, MASKS)


@pytest.mark.parametrize("name", STARTS)
def test_a_detector_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    fpn, heads = STARTS[name]
    before, after, start = warm(tmp_path, {}, fpn, **heads)
    inputs = [image()]
    (maps, found), (maps2, found2) = seen(before, inputs), seen(after, inputs)
    levels = (3, 4, 5, 6, 7) if heads is RETINANET else (2, 3, 4, 5, 6)
    assert list(maps) == list(maps2) == [f"p{level}" for level in levels]
    assert len(found["boxes"]) > 0 and ("pred_masks" in found) is (heads is MASKS)
    assert_same((maps, found), (maps2, found2))
    assert set(start.verdict().values()) == {"exactly"}


@pytest.mark.parametrize(
    "norm, topology, heads, read",
    [
        ("", "fpn", MASKS, "proposal_generator.rpn_head.conv.weight"),
        ("GN", "pafpn", RETINANET, "head.cls_subnet.0.weight"),
    ],
    ids=["mask-rcnn", "retinanet-pafpn"],
)
def test_a_wider_detector_goes_on(
    norm: str, topology: str, heads: dict[str, Any], read: str, tmp_path: Path
) -> None:
    old = {"OUT_CHANNELS": 32, "NORM": norm}
    new = {"OUT_CHANNELS": 64, "NORM": norm, "TOPOLOGY": topology}
    before, after, start = warm(tmp_path, old, new, **heads)
    inputs = [image()]
    (maps, found), (maps2, found2) = seen(before, inputs), seen(after, inputs)
    for copy in (0, 1):
        assert largest_difference(maps, {k: x[:, copy::2] for k, x in maps2.items()}) < 1e-5
    assert len(found["boxes"]) == len(found2["boxes"]) > 0
    assert torch.allclose(found["boxes"], found2["boxes"], atol=1e-2)
    assert torch.allclose(found["scores"], found2["scores"], atol=1e-5)
    assert set(start.verdict().values()) == {"up to rounding"}
    # who reads two copies gives them other weights, so that they do not learn the same
    weight = after.state_dict()[read]
    assert weight.shape[:2] == (64, 64)
    assert not torch.allclose(weight[:, ::2], weight[:, 1::2])


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ({"OUT_CHANNELS": 64}, {"OUT_CHANNELS": 32}, "32 of 64 channels were let go"),
        ({"OUT_CHANNELS": 64, "NORM": "GN"}, {"OUT_CHANNELS": 96, "NORM": "GN"}, "norms of groups"),
        ({"TOPOLOGY": "fpn+bfp"}, {"TOPOLOGY": "fpn", "OUT_CHANNELS": 64}, "non_local does not"),
        ({"BLOCK": "eca"}, {"BLOCK": "eca", "OUT_CHANNELS": 64}, "eca does not pass copied"),
        (
            {"BLOCK": "ema", "OUT_CHANNELS": 64},
            {"BLOCK": "ema", "OUT_CHANNELS": 96},
            "ema sees 96 channels otherwise than 64",
        ),
        # res2 has 64 channels, so at that width its edges need no projection
        (BIFPN, {**BIFPN, "OUT_CHANNELS": 64}, r"backbone.bifpn_out2_edge0.project"),
    ],
)
def test_what_cannot_be_preserved_is_said(
    old: dict[str, Any], new: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    before, after, start = warm(tmp_path, old, new)
    assert set(start.verdict().values()) == {"no"}
    assert f"not preserved: {reason}" in start.report()
    inputs = [image()]
    maps, maps2 = seen(before, inputs)[0], seen(after, inputs)[0]
    names = torch.arange(len(maps2["p3"][0])) * len(maps["p3"][0]) // len(maps2["p3"][0])
    assert largest_difference({k: x[:, names] for k, x in maps.items()}, maps2) > 1e-4


@pytest.mark.parametrize(
    "block, down",
    [("se", "adown"), ("cbam", "spd"), ("coord", "haar"), ("ema", "carafe_down")],
)
def test_attention_and_downsamplers_grow(block: str, down: str, tmp_path: Path) -> None:
    old = {"OUT_CHANNELS": 32, "BLOCK": f"{block}(kernel=3)", "TOPOLOGY": "bifpn", "NORM": "BN"}
    old["DOWNSAMPLE"] = down
    before, after, start = warm(tmp_path, old, {**old, "OUT_CHANNELS": 96})
    assert set(start.verdict().values()) == {"up to rounding"}
    x = torch.rand(1, 3, 96, 64)
    maps, maps2 = before.backbone(x), after.backbone(x)
    assert largest_difference(maps, {k: y[:, ::3] for k, y in maps2.items()}) < 1e-5


def test_a_head_is_never_grown_by_accident(tmp_path: Path) -> None:
    """RetinaNet's classifier for two classes has twice the channels of that for one: as the
    pyramid."""
    narrow = {"OUT_CHANNELS": 32}, {"OUT_CHANNELS": 64}
    heads = [{**RETINANET, "MODEL__RETINANET__NUM_CLASSES": count} for count in (1, 2)]
    source = a_config(tmp_path, narrow[0], **heads[0])
    target = a_config(tmp_path, narrow[1], source, **heads[1])
    before, after = build_model(source), build_model(target)
    start = WarmStart(after, "old.pth", shapes_at_width(target, 32))
    state = start(before.state_dict())
    name = "head.cls_score.weight"
    assert before.state_dict()[name].shape == (3, 32, 3, 3) and state[name].shape[0] == 6
    assert torch.equal(state[name], after.state_dict()[name])
    report = start.report()
    assert "(the checkpoint's is (3, 32, 3, 3), not (6, 32, 3, 3)" in report
    assert "not preserved: the heads begin anew in part: head.cls_score.weight" in report
    verdict = start.verdict()
    assert verdict.pop("the detector") == "no" and set(verdict.values()) == {"up to rounding"}


def test_other_classes_leave_the_pyramid_what_it_is(tmp_path: Path) -> None:
    source = a_config(tmp_path, {})
    target = a_config(tmp_path, TARGETS["pafpn"], source, MODEL__ROI_HEADS__NUM_CLASSES=5)
    start = WarmStart(build_model(target), "old.pth")
    start(build_model(source).state_dict())
    assert start.verdict()["p3"] == "exactly" and start.verdict()["the detector"] == "no"
    assert "roi_heads.box_predictor      fresh (the checkpoint's is (3, 32), not (6, 32)" in (
        start.report()
    )


@pytest.mark.parametrize(
    "old, new",
    [
        ({}, TARGETS["pafpn"]),
        ({}, BIFPN),
        ({}, {"NORM": "GN"}),
        ({"OUT_CHANNELS": 32}, {"OUT_CHANNELS": 64, "TOPOLOGY": "pafpn"}),
    ],
    ids=["pafpn", "bifpn", "same names", "wider"],
)
def test_both_pyramids_of_a_warm_started_checkpoint_go_on(
    old: dict[str, Any], new: dict[str, Any], tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """Fine-tuned on other classes, say: what the new pyramid and the gates learned is kept."""
    source = a_config(tmp_path, old)
    given = a_model(a_config(tmp_path, new, source)).state_dict()
    gates = [name for name in given if "warm_gate" in name]
    assert gates and all(given[name].all() for name in gates)
    target = a_config(tmp_path, new, source, MODEL__ROI_HEADS__NUM_CLASSES=5)
    model = build_model(target)
    start = WarmStart(model, "a.pth", shapes_at_width(target, source.MODEL.FPN.OUT_CHANNELS))
    state = start(given)
    kept = {name for name, x in given.items() if state[name] is x}
    assert given.keys() - kept == {
        f"roi_heads.box_predictor.{name}.{part}"
        for name in ("cls_score", "bbox_pred")
        for part in ("weight", "bias")
    }
    assert state["roi_heads.box_predictor.cls_score.weight"].shape[0] == 6
    assert "nothing to do; the heads begin anew in part: roi_heads.box_predictor" in log.text


def test_two_other_pyramids_are_refused(tmp_path: Path) -> None:
    given = warm(tmp_path, {}, TARGETS["pafpn"]).after.state_dict()
    model = build_model(a_config(tmp_path, BIFPN, a_config(tmp_path, {})))
    with pytest.raises(ValueError, match=r"a.pth .*holds two pyramids \(backbone.warm_gate"):
        WarmStart(model, "a.pth")(given)


def test_a_recursive_pyramid_goes_on_as_one_alone(tmp_path: Path) -> None:
    """At another width too: the further network and what is fed back are the checkpoint's."""
    rfp = {"RFP_STEPS": 2}
    before, after, start = warm(tmp_path, rfp, {**rfp, "TOPOLOGY": "pafpn", "OUT_CHANNELS": 64})
    inputs = [image()]
    maps, maps2 = seen(before, inputs)[0], seen(after, inputs)[0]
    assert largest_difference(maps, {name: x[:, ::2] for name, x in maps2.items()}) < 1e-5
    assert set(start.verdict().values()) == {"up to rounding"}
    with pytest.raises(ValueError, match=r"MODEL.FPN.WARM_START_FROM: .* 2 times .*take 2"):
        build_model(a_config(tmp_path, {}, a_config(tmp_path, rfp)))


def test_the_log_names_every_node(tmp_path: Path) -> None:
    start = warm(tmp_path, {}, TARGETS["bifpn"]).start
    words = [line.split() for line in start.report().splitlines()[1:]]
    lines = {first: " ".join(rest) for first, *rest in words}
    assert set(lines) > {step.node.name.removeprefix("warm.") for step in start.backbone.steps}
    assert lines["bottom_up"] == "copied"
    assert lines["fpn_lateral3"] == "(old) copied"
    assert lines["bifpn_td4"].startswith(
        "copied 1 of 14 (from backbone.fpn_lateral4.weight), fresh"
    )
    assert lines["warm_gate3"] == "fresh (zero)"
    assert lines["p3"].endswith("function: exactly (warm_gate3 lets the new pyramid in)")


@pytest.mark.parametrize("name", TARGETS)
def test_every_new_parameter_learns_within_two_steps(name: str, tmp_path: Path) -> None:
    after: Any = warm(tmp_path, {}, TARGETS[name]).after.train()
    backbone = after.backbone
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.01)
    x, learned = [image()["image"][None] / 255, image()["image"][None] / 99], []
    for step in range(2):
        optimizer.zero_grad()
        maps = backbone(torch.cat(x)[step:])
        sum((y - 1).square().mean() for y in maps.values()).backward()
        items = backbone.named_parameters()
        learned.append({n for n, p in items if p.grad is not None and p.grad.any()})
        optimizer.step()
    names = {name for name, _ in backbone.named_parameters()}
    gates = {name for name in names if "warm_gate" in name}
    assert gates and gates <= learned[0]
    # the bias of the keys in a softmax over places has no gradient, in whatever model
    assert {n for n in names - learned[1] if not n.endswith("phi.bias")} == set()


def state_of_c4(tmp_path: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As Detectron2's C4 detectors name things: the last stage in the heads."""
    found = {}
    for name, x in model.state_dict().items():
        if "bottom_up" in name:
            name = name.replace("backbone.bottom_up.", "backbone.")
            found[name.replace("backbone.res5", "roi_heads.res5")] = x
    return found


def test_a_checkpoint_without_a_pyramid_gives_its_network(tmp_path: Path) -> None:
    cfg = a_config(tmp_path, TARGETS["pafpn"])
    cfg.MODEL.FPN.WARM_START = True
    cfg.MODEL.FPN.WARM_START_FROM.update(NO_PYRAMID)
    other, model = a_model(cfg), build_model(cfg)
    assert "backbone.warm_gate3_fuse.weights" not in model.state_dict()
    start = WarmStart(model, "c4.pth")
    state = start(state_of_c4(tmp_path, other))
    for name, x in other.state_dict().items():
        taken = state[name] is x or torch.equal(state[name], x)
        assert taken == ("bottom_up" in name or not x.any()), name
    assert set(start.verdict().values()) == {"no"}
    assert "not preserved: the checkpoint has no pyramid" in start.report()
    with pytest.raises(ValueError, match="c4.pth: nothing of it fits the network .*NAME.*a.b"):
        WarmStart(model, "c4.pth")({"backbone.a.b": torch.zeros(1)})


def test_a_checkpoint_of_another_network_or_pyramid_is_refused(tmp_path: Path) -> None:
    start = warm(tmp_path, {}, TARGETS["pafpn"]).start
    state = build_model(a_config(tmp_path, {})).state_dict()
    state["backbone.fpn_lateral2.weight"] = torch.zeros(32, 32, 1, 1)
    with pytest.raises(ValueError, match=r"lateral2.weight has the shape \(32, 32, 1, 1\) .*NAME"):
        start(state)
    with pytest.raises(ValueError, match="WARM_START_FROM says: it has no backbone.fpn_lateral2"):
        start(build_model(a_config(tmp_path, BIFPN)).state_dict())
    source = a_config(tmp_path, {"OUT_CHANNELS": 64})
    model = build_model(a_config(tmp_path, {}, source))
    with pytest.raises(ValueError, match="a.pth has a pyramid of 64 channels, not 32"):
        WarmStart(model, "a.pth")


def test_a_finer_level_that_heads_lose_is_said(tmp_path: Path) -> None:
    levels = {"IN_FEATURES": ["res3", "res4", "res5"]}
    heads = {"MODEL__RPN__IN_FEATURES": ["p3", "p4", "p5", "p6"]}
    heads |= {"MODEL__ROI_HEADS__IN_FEATURES": ["p3", "p4", "p5"]}
    target = a_config(
        tmp_path,
        {**TARGETS["pafpn"], **levels},
        a_config(tmp_path, {}),
        **heads,
        MODEL__ANCHOR_GENERATOR__SIZES=[[32], [64], [128], [256]],
    )
    start = WarmStart(build_model(target), "old.pth")
    start(build_model(a_config(tmp_path, {})).state_dict())
    verdict = start.verdict()
    assert verdict.pop("the detector") == "no" and set(verdict.values()) == {"exactly"}
    assert "not preserved: the heads get no p2 any more" in start.report()


def test_images_are_padded_as_the_checkpoints_were(tmp_path: Path) -> None:
    before, after, _ = warm(tmp_path, {}, BIFPN)
    alone = build_model(a_config(tmp_path, BIFPN))
    sizes = [model.backbone.size_divisibility for model in (before, after, alone)]
    assert sizes == [32, 32, 64]
