"""What is measured: the same weights and inputs for all, as much work as a trained model has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo

from fpn_plugin.benchmark.configs import gather_configs, load
from fpn_plugin.benchmark.counts import peak_bytes
from fpn_plugin.benchmark.inputs import OBJECTS, Inputs
from fpn_plugin.benchmark.models import (
    BenchmarkModel,
    build_models,
    image_tensor,
    maps_below,
    neck_of,
    prepare,
)
from fpn_plugin.benchmark.timing import no_lap
from fpn_plugin.benchmark.workloads import (
    THRESHOLD,
    calibrate,
    inference_workload,
    neck_inputs,
    neck_workload,
    train_workload,
)


def test_weights_are_shared_wherever_they_agree(
    models: dict[str, BenchmarkModel], inputs: Inputs
) -> None:
    base = models["baseline base"].model.state_dict()
    for name, model in models.items():
        state = model.model.state_dict()
        shared = [key for key in state if key in base and state[key].shape == base[key].shape]
        assert len(shared) > 100 and all(torch.equal(state[key], base[key]) for key in shared), name
    variant = models["bifpn [bf16]"].model.state_dict()
    for key, value in models["bifpn"].model.state_dict().items():
        assert torch.equal(value, variant[key]), key


def test_features_stay_in_range(models: dict[str, BenchmarkModel], inputs: Inputs) -> None:
    """Or half precision would overflow and differ for no reason of its own."""
    model = models["baseline base"].model
    with torch.no_grad():
        maps = model.backbone.bottom_up(image_tensor(model, inputs.images()))
    assert all(0.1 < x.std() < 10 for x in maps.values())


def test_weights_from_a_file(configs: dict[str, str], inputs: Inputs, tmp_path: Path) -> None:
    fpn = gather_configs([configs["fpn"]], baseline="none")
    (model,) = build_models(fpn, inputs).values()
    state = {key: value + 1 for key, value in model.model.state_dict().items() if "fpn_" in key}
    path = tmp_path / "model.pth"
    torch.save({"model": state}, path)
    with pytest.raises(ValueError, match=r"--weights .*\(fpn\) does not fit.*--allow-partial"):
        build_models(fpn, inputs, str(path))
    (model,) = build_models(fpn, inputs, str(path), allow_partial=True).values()
    assert all(torch.equal(model.model.state_dict()[key], value) for key, value in state.items())
    assert model.weights == f"{len(state)} tensors of {path}"
    torch.save({"other": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="--weights: nothing in .*model.pth"):
        build_models(fpn, inputs, str(path), allow_partial=True)


def test_inputs_are_the_same_for_all_and_in_the_configs_own_form(
    models: dict[str, BenchmarkModel],
    inputs: Inputs,
) -> None:
    given = {}
    for name in ("fpn", "fpn [bf16]"):
        model = models[name]
        given[name] = neck_inputs(prepare(model.model, model.config.cfg, False), inputs)
    plain, fast = given["fpn"], given["fpn [bf16]"]
    assert list(plain) == ["res2", "res3", "res4", "res5"]
    for name, x in plain.items():
        assert x.dtype == torch.float32 and x.is_contiguous() and x.min() >= 0
        assert fast[name].dtype == torch.bfloat16
        assert fast[name].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(fast[name], x.bfloat16())


@pytest.mark.parametrize("name", ["baseline base", "fpn", "bifpn"])
def test_the_neck_alone_is_the_backbones_pyramid(
    models: dict[str, BenchmarkModel], inputs: Inputs, name: str
) -> None:
    model = models[name].model
    image = image_tensor(model, inputs.images())
    with torch.no_grad():
        expected = model.backbone(image)
        maps = neck_of(model.backbone)(maps_below(model.backbone, image))
    assert list(maps) == list(expected)
    assert all(torch.equal(maps[key], x) for key, x in expected.items())
    assert len(list(neck_of(model.backbone).parameters())) < len(list(model.backbone.parameters()))
    assert model.backbone.bottom_up is not neck_of(model.backbone).bottom_up


def test_no_neck() -> None:
    with pytest.raises(ValueError, match="MODEL.BACKBONE.NAME: a Linear"):
        neck_of(torch.nn.Linear(1, 1))


def test_random_weights_find_as_much_as_trained_ones(
    models: dict[str, BenchmarkModel], inputs: Inputs
) -> None:
    model = models["baseline base"]
    configured = model.model.roi_heads.box_predictor.test_score_thresh
    assert inference_workload(model, inputs).facts[THRESHOLD] == configured
    calibrated = replace(model, score_threshold=calibrate(model, inputs))
    facts = inference_workload(calibrated, inputs).facts
    assert facts["proposals"] == 50 and facts["detections"] == 10
    assert facts[THRESHOLD] == calibrated.score_threshold
    heads = model.model.roi_heads  # as it was
    assert heads.mask_on and heads.box_predictor.test_score_thresh == configured
    assert calibrate(model, inputs) == calibrated.score_threshold


def test_training_does_the_same_work_each_time(
    models: dict[str, BenchmarkModel], inputs: Inputs
) -> None:
    workload = train_workload(models["fpn"], inputs)
    first = workload.outputs()
    phases: list[str] = []
    workload.work(phases.append)
    again = workload.outputs()
    assert phases == ["forward", "backward", "step"]
    losses = workload.work(no_lap)
    assert {"loss_cls", "loss_mask", "loss_rpn_cls"} < set(losses)
    assert sum(losses.values()).item() == pytest.approx(first["total loss"].item())
    assert all(torch.allclose(first[key], again[key], rtol=1e-5) for key in first)
    assert workload.reset is not None
    peaks = []
    for _ in range(2):
        workload.reset()
        peaks.append(peak_bytes(lambda: workload.work(no_lap)))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


@pytest.mark.parametrize(
    "name, extra",
    [
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", {"gt_keypoints"}),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", {"gt_masks"}),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", set()),
    ],
)
def test_annotations_fit_the_head(inputs: Inputs, name: str, extra: set[str]) -> None:
    cfg = load(model_zoo.get_config_file(name), [], "cpu")
    first, second = inputs.annotated(cfg)
    assert set(first["instances"].get_fields()) == {"gt_boxes", "gt_classes"} | extra
    assert len(second["instances"]) == OBJECTS
    boxes = first["instances"].gt_boxes
    assert boxes.nonempty(3).all() and boxes.inside_box(first["instances"].image_size).all()
    assert ("sem_seg" in first) == ("panoptic" in name)
    again = inputs.annotated(cfg)[0]
    assert torch.equal(again["image"], first["image"])
    assert torch.equal(again["instances"].gt_boxes.tensor, boxes.tensor)


def test_images_have_the_channels_of_the_model(inputs: Inputs) -> None:
    cfg = load(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"), [], "cpu")
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = [110.0], [50.0], "L"
    images = [inputs.images(1)[0], inputs.annotated(cfg)[0], inputs.images()[0]]
    assert [len(image["image"]) for image in images] == [1, 1, 3]


def test_levers_reach_the_neck(
    models: dict[str, BenchmarkModel], inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled pyramid is compiled in the neck alone too."""
    compiled: list[Any] = []

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    model = models["fpn"]
    cfg = model.config.cfg.clone()
    cfg.MODEL.COMPILE = "pyramid"
    ready = prepare(model.model, cfg, training=False)
    neck = ready.neck()
    assert compiled[-1].__self__ is neck
    neck(neck_inputs(ready, inputs))
    assert neck_workload(model, inputs).precision == "float32"
