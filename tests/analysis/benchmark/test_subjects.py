"""What is measured: the same weights and inputs for all, as much work as a trained model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo

from fpn_plugin.analysis.benchmark.clock import no_lap
from fpn_plugin.analysis.benchmark.contestants import gather, load
from fpn_plugin.analysis.benchmark.convolutions import convolutions_subject
from fpn_plugin.analysis.benchmark.counts import COUNTS, count
from fpn_plugin.analysis.benchmark.entrants import Entrant, build_all
from fpn_plugin.analysis.benchmark.inference import THRESHOLD, calibrate, inference_subject
from fpn_plugin.analysis.benchmark.inputs import OBJECTS, Inputs
from fpn_plugin.analysis.benchmark.memory import peak_bytes
from fpn_plugin.analysis.benchmark.neck import image_tensor, maps_below, neck_of
from fpn_plugin.analysis.benchmark.prepare import prepare
from fpn_plugin.analysis.benchmark.subjects import given_maps, neck_subject, train_subject
from fpn_plugin.analysis.visualize.complexity import measure

INPUTS = Inputs((128, 192), 2)


@pytest.fixture(scope="module")
def entrants(configs: dict[str, str]) -> dict[str, Entrant]:
    variants = ["bf16: MODEL.CHANNELS_LAST True SOLVER.AMP.ENABLED True"]
    files = [configs["fpn"], configs["bifpn"]]
    return build_all(gather(files, variants=variants, baseline=configs["base"]), INPUTS)


def test_weights_are_shared_wherever_they_agree(entrants: dict[str, Entrant]) -> None:
    base = entrants["baseline base"].model.state_dict()
    for name, entrant in entrants.items():
        state = entrant.model.state_dict()
        shared = [key for key in state if key in base and state[key].shape == base[key].shape]
        assert len(shared) > 100 and all(torch.equal(state[key], base[key]) for key in shared), name
    one, two = entrants["bifpn"], entrants["bifpn [bf16]"]
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[key]), key


def test_features_stay_in_range(entrants: dict[str, Entrant]) -> None:
    """Or half precision would overflow and differ for no reason of its own."""
    model = entrants["baseline base"].model
    with torch.no_grad():
        maps = model.backbone.bottom_up(image_tensor(model, INPUTS.images()))
    assert all(0.1 < x.std() < 10 for x in maps.values())


def test_weights_from_a_file(configs: dict[str, str], tmp_path: Path) -> None:
    contestants = gather([configs["fpn"]], baseline="none")
    (model,) = (one.model for one in build_all(contestants, INPUTS).values())
    state = {key: value + 1 for key, value in model.state_dict().items() if "fpn_" in key}
    path = tmp_path / "model.pth"
    torch.save({"model": state}, path)
    (made,) = build_all(contestants, INPUTS, str(path)).values()
    assert all(torch.equal(made.model.state_dict()[key], value) for key, value in state.items())
    assert made.facts["weights"] == f"{len(state)} tensors of {path}"
    torch.save({"other": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="--weights: nothing in .* matches any of the models"):
        build_all(contestants, INPUTS, str(path))


def test_inputs_are_the_same_for_all_and_in_the_configs_own_form(
    entrants: dict[str, Entrant],
) -> None:
    given = {}
    for name in ("fpn", "fpn [bf16]"):
        entrant = entrants[name]
        given[name] = given_maps(prepare(entrant.model, entrant.contestant.cfg, False), INPUTS)
    plain, fast = given["fpn"], given["fpn [bf16]"]
    assert list(plain) == ["res2", "res3", "res4", "res5"]
    for name, x in plain.items():
        assert x.dtype == torch.float32 and x.is_contiguous() and x.min() >= 0
        assert fast[name].dtype == torch.bfloat16
        assert fast[name].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(fast[name], x.bfloat16())


@pytest.mark.parametrize("name", ["baseline base", "fpn", "bifpn"])
def test_the_neck_alone_is_the_backbones_pyramid(entrants: dict[str, Entrant], name: str) -> None:
    model = entrants[name].model
    image = image_tensor(model, INPUTS.images())
    with torch.no_grad():
        expected = model.backbone(image)
        found = neck_of(model.backbone)(maps_below(model.backbone, image))
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], x) for key, x in expected.items())
    assert len(list(neck_of(model.backbone).parameters())) < len(list(model.backbone.parameters()))
    assert model.backbone.bottom_up is not neck_of(model.backbone).bottom_up


def test_no_neck() -> None:
    with pytest.raises(ValueError, match="MODEL.BACKBONE.NAME: a Linear has no network underneath"):
        neck_of(torch.nn.Linear(1, 1))


def test_random_weights_find_as_much_as_trained_ones(entrants: dict[str, Entrant]) -> None:
    entrant = entrants["baseline base"]
    asked = entrant.model.roi_heads.box_predictor.test_score_thresh
    without = inference_subject(entrant, INPUTS).facts
    entrant.facts[THRESHOLD] = calibrate(entrant, INPUTS)
    facts = inference_subject(entrant, INPUTS).facts
    assert facts["proposals"] == 50 and facts["detections"] == 10
    assert facts[THRESHOLD] == entrant.facts[THRESHOLD] and without[THRESHOLD] == asked
    heads = entrant.model.roi_heads  # as it was
    assert heads.mask_on and heads.box_predictor.test_score_thresh == asked
    assert calibrate(entrant, INPUTS) == entrant.facts[THRESHOLD]


def test_training_does_the_same_work_each_time(entrants: dict[str, Entrant]) -> None:
    subject = train_subject(entrants["fpn"], INPUTS)
    first = subject.outputs()
    phases: list[str] = []
    subject.work(phases.append)
    again = subject.outputs()
    assert phases == ["forward", "backward", "step"]
    losses = subject.work(no_lap)
    assert {"loss_cls", "loss_mask", "loss_rpn_cls"} < set(losses)
    assert sum(losses.values()).item() == pytest.approx(first["total loss"].item())
    assert all(torch.allclose(first[key], again[key], rtol=1e-5) for key in first)
    assert subject.reset is not None
    peaks = []
    for _ in range(2):
        subject.reset()
        peaks.append(peak_bytes(lambda: subject.work(no_lap)))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


@pytest.mark.parametrize(
    "name, keys",
    [
        (
            "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
            {"gt_boxes", "gt_classes", "gt_keypoints"},
        ),
        (
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
            {"gt_boxes", "gt_classes", "gt_masks"},
        ),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", {"gt_boxes", "gt_classes"}),
    ],
)
def test_annotations_fit_the_head(name: str, keys: set[str]) -> None:
    cfg = load(model_zoo.get_config_file(name), [], "cpu")
    one, two = INPUTS.annotated(cfg)
    assert set(one["instances"].get_fields()) == keys and len(two["instances"]) == OBJECTS
    boxes = one["instances"].gt_boxes
    assert boxes.nonempty(4).all() and boxes.inside_box(one["instances"].image_size).all()
    assert ("sem_seg" in one) == ("panoptic" in name)
    again = INPUTS.annotated(cfg)[0]
    assert torch.equal(again["image"], one["image"])
    assert torch.equal(again["instances"].gt_boxes.tensor, boxes.tensor)


def test_counts(entrants: dict[str, Entrant]) -> None:
    found = {name: count(entrants[name], INPUTS) for name in ("baseline base", "fpn", "bifpn")}
    assert all(tuple(one) == COUNTS for one in found.values())
    base, fpn = found["baseline base"], found["fpn"]
    assert {key: base[key] for key in COUNTS[:-1]} == {key: fpn[key] for key in COUNTS[:-1]}
    by_node = measure(entrants["fpn"].model.backbone, INPUTS.size)
    assert fpn["neck_parameters"] == by_node.pyramid.parameters
    assert fpn["neck_gflops"] == pytest.approx(by_node.pyramid.flops / 1e9)
    # four laterals and four outputs of 16 channels, by hand
    pixels = sum(128 * 192 // 4**level for level in (2, 3, 4, 5))
    assert fpn["neck_activations"] == 2 * 16 * pixels


def test_convolutions_alone(entrants: dict[str, Entrant]) -> None:
    subject = convolutions_subject(entrants["fpn"], INPUTS)
    assert subject.facts["convolutions"] == 8
    subject.work(no_lap)
    assert convolutions_subject(entrants["baseline base"], INPUTS).facts["convolutions"] == 8


def test_levers_reach_the_neck(
    entrants: dict[str, Entrant], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled pyramid is compiled in the neck alone too."""
    compiled: list[Any] = []

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    entrant = entrants["fpn"]
    cfg = entrant.contestant.cfg.clone()
    cfg.MODEL.COMPILE = "pyramid"
    ready = prepare(entrant.model, cfg, training=False)
    neck = ready.neck()
    assert compiled[-1].__self__ is neck
    neck(given_maps(ready, INPUTS))
    assert neck_subject(entrant, INPUTS).precision == "float32"
