"""ROIAlign as a gather against Detectron2's pooler: values, gradients, and what is left to it."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from helpers import zoo_config
from torch import Tensor

from fpn_plugin.modeling.pooling import GatherPooler, gather_poolers

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def maps(layout: str = "nhwc", scales: list[float] = SCALES, images: int = 2) -> list[Tensor]:
    """Of images of 192 by 256 pixels."""
    return [
        torch.randn(images, 6, int(192 * s), int(256 * s)).to(memory_format=LAYOUTS[layout])
        for s in scales
    ]


def usual(count: int = 40) -> Boxes:
    corner, side = torch.rand(count, 2) * 150, torch.rand(count, 2) ** 2 * 200 + 2
    return Boxes(torch.cat([corner, corner + side], dim=1))


# empty, a line, a point on a pixel, outside on each side, all of the image and beyond, very long
ODD = Boxes(
    torch.tensor(
        [
            [10.0, 10.0, 10.0, 10.0],
            [5.0, 7.0, 90.0, 7.0],
            [16.0, 16.0, 16.5, 16.5],
            [-60.0, -50.0, -20.0, -10.0],
            [250.0, 180.0, 400.0, 300.0],
            [300.0, 300.0, 340.0, 390.0],
            [-10.0, -10.0, 270.0, 200.0],
            [0.0, 0.0, 256.0, 192.0],
            [3.0, 90.0, 255.0, 93.0],
            [100.0, 0.0, 101.0, 192.0],
            [20.0, 30.0, 15.0, 25.0],
        ]
    )
)


def pooler(
    size: object = 7, kind: str = "ROIAlignV2", scales: list[float] = SCALES, ratio: int = 0
):
    return ROIPooler(size, scales, ratio, kind)


def close(one: Tensor, two: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["ROIAlignV2", "ROIAlign"])
@pytest.mark.parametrize("size", [7, 14, 1])
@pytest.mark.parametrize("odd", [False, True], ids=["usual", "odd"])
def test_values_and_gradients(layout: str, kind: str, size: int, odd: bool) -> None:
    theirs = pooler(size, kind)
    mine = GatherPooler(theirs)
    boxes = [ODD, usual(5)] if odd else [usual(), usual(25)]
    inputs = [x.requires_grad_() for x in maps(layout)]
    others = [x.detach().clone().requires_grad_() for x in inputs]
    found, expected = mine(inputs, boxes), theirs(others, boxes)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last) or size == 1
    grad = torch.randn_like(expected)
    found.backward(grad)
    expected.backward(grad)
    for one, two in zip(inputs, others):
        assert one.grad is not None and two.grad is not None and close(one.grad, two.grad, 1e-4)


@pytest.mark.parametrize("images", [1, 3])
def test_one_level_and_several_images(images: int) -> None:
    theirs = pooler(scales=SCALES[1:2])
    x, boxes = maps(scales=SCALES[1:2], images=images), [usual(4) for _ in range(images)]
    assert close(GatherPooler(theirs)(x, boxes), theirs(x, boxes))


def test_an_image_without_boxes() -> None:
    theirs, none, x = pooler(), Boxes(torch.zeros(0, 4)), maps()
    for boxes in ([usual(3), none], [none, usual(3)], [none, none]):
        assert close(GatherPooler(theirs)(x, boxes), theirs(x, boxes))


def test_half_precision_is_nearer_to_float32_than_detectron2s() -> None:
    theirs = pooler()
    # coordinates of several hundred pixels, which bfloat16 rounds to even numbers
    x = [torch.randn(1, 6, int(800 * s), int(1024 * s)) for s in SCALES]
    boxes = [Boxes(usual(200).tensor * 4)]
    exact = theirs(x, boxes)
    halves = [item.bfloat16() for item in x]
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = theirs(halves, boxes), GatherPooler(theirs)(halves, boxes)
    assert plain.dtype == found.dtype == torch.bfloat16
    errors = [(item.float() - exact).abs().mean().item() for item in (found, plain)]
    assert errors[0] < 0.005 and errors[0] < errors[1] / 5
    leaves = [item.requires_grad_() for item in halves]
    GatherPooler(theirs)(leaves, boxes).float().square().sum().backward()
    floats = [item.requires_grad_() for item in x]
    theirs(floats, boxes).square().sum().backward()
    for one, two in zip(leaves, floats):
        assert (one.grad.float() - two.grad).abs().max() < 0.03 * two.grad.abs().max()


@pytest.mark.parametrize("case", ["ratio", "float64"])
def test_what_is_left_to_the_pooler(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pooler(ratio=2 if case == "ratio" else 0)
    x = [item.double() if case == "float64" else item for item in maps()]
    monkeypatch.setattr("fpn_plugin.modeling.pooling._plan", lambda *_: pytest.fail("gathered"))
    boxes = [usual(3), usual(3)]
    assert torch.equal(GatherPooler(theirs)(x, boxes), theirs(x, boxes))


def test_every_pooler_of_a_model_is_replaced_once() -> None:
    cfg = zoo_config(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        *["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64],
        *["MODEL.ROI_BOX_HEAD.FC_DIM", 32],
    )
    model = build_model(cfg).eval()
    keys = list(model.state_dict())
    changed = copy.deepcopy(model)
    assert gather_poolers(changed) == 2 and gather_poolers(changed) == 0
    assert list(changed.state_dict()) == keys
    assert isinstance(changed.roi_heads.mask_pooler, GatherPooler)
    image = [{"image": torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8)}]
    for head in (model.roi_heads.box_predictor, changed.roi_heads.box_predictor):
        head.test_score_thresh = -1.0
    with torch.no_grad():
        one, two = (item(image)[0]["instances"] for item in (model, changed))
    assert close(one.pred_boxes.tensor, two.pred_boxes.tensor, 1e-3)
    assert close(one.scores, two.scores)
    rotated = torch.nn.Sequential(pooler(kind="ROIPool"), pooler(kind="ROIAlignRotated"))
    assert gather_poolers(rotated) == 0
