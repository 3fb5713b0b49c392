"""AP of models on data: what is measured, of which models, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
import torch
from comparing import SIDE, detect, write_truth
from helpers import own_datasets
from PIL import Image

from fpn_plugin.benchmark import accuracy
from fpn_plugin.benchmark.accuracy import measure_ap, read_test_data
from fpn_plugin.benchmark.models import BenchmarkModel
from fpn_plugin.benchmark.report import write_report
from fpn_plugin.benchmark.tables import ap_summary
from fpn_plugin.cli.main import main
from fpn_plugin.data.coco_format import register_coco_format
from fpn_plugin.report.progress import Bar

NAME, IMAGES = "accuracy_val", 12


@pytest.fixture
def truth(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A registered dataset of twelve images with objects of two of its four classes."""
    content = write_truth(tmp_path / "truth.json", IMAGES)
    content["categories"] += [{"id": 7, "name": "cog"}, {"id": 9, "name": "cam"}]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3)).astype("uint8")
    for image in content["images"]:
        Image.fromarray(pixels).save(tmp_path / image["file_name"])
    with own_datasets():
        register_coco_format(NAME, str(tmp_path / "truth.json"), str(tmp_path))
        yield content


def test_ap_and_its_differences(
    truth: dict[str, Any],
    models: dict[str, BenchmarkModel],
    report: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With made-up detections: those of fpn are better than the baseline's, in any precision."""
    data = read_test_data(NAME, 10, [models["fpn"].config.cfg], "weights.pth")
    assert [record["image_id"] for record in data.records] == [1, 2, 4, 5, 6, 7, 8, 10, 11, 12]
    errors = {"baseline base": 0.5, "fpn": 0.1, "fpn [bf16]": 0.1}
    kept = {record["image_id"] for record in data.records}

    def detections(model: BenchmarkModel, *_: Any) -> list[dict[str, Any]]:
        results = detect(truth, errors[model.name])
        return [result for result in results if result["image_id"] in kept]

    monkeypatch.setattr(accuracy, "_detect", detections)
    monkeypatch.setattr(accuracy, "RESAMPLES", 100)
    trained = {name: replace(model, trained=name in errors) for name, model in models.items()}
    ap = measure_ap(trained, data, Bar(quiet=True))
    assert (ap["images"], ap["total"], ap["objects"]) == (10, 12, 79)  # and a crowd
    assert ap["models"]["bifpn"] == {
        **{"metrics": {}, "note": "the checkpoint is not the whole of its weights"},
        "size": [800, 1333],
    }
    rows = {(row["contestant"], row["reference"]): row for row in ap["pairs"]}
    assert list(rows) == [("fpn", "baseline base"), ("fpn [bf16]", "baseline base")] + [
        ("fpn [bf16]", "fpn")
    ]
    assert rows["fpn", "baseline base"]["verdict"] == "better"
    assert rows["fpn", "baseline base"]["images"] == 10
    assert rows["fpn [bf16]", "fpn"]["verdict"] == "tie"
    content = {**report, "ap": ap, "failures": []}
    page = write_report(content, str(tmp_path / "out"))
    first, second = (
        f"{ap['models'][n]['metrics']['bbox/AP']:.1f}" for n in ("fpn", "baseline base")
    )
    text = f"On 10 of the 12 images of {NAME} with 79 objects, fpn has box AP {first} and"
    assert ap_summary(content).startswith(f"{text} baseline base {second} (better, difference +")
    for file in (page, page.with_suffix(".md")):
        assert text in file.read_text() and "tie as shown" in file.read_text()


def test_the_tool_measures_ap(
    truth: dict[str, Any],
    models: dict[str, BenchmarkModel],
    configs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(accuracy, "RESAMPLES", 20)
    weights = tmp_path / "model.pth"
    torch.save({"model": models["fpn"].model.state_dict()}, weights)
    call = ["benchmark", "--config-file", configs["fpn"], "--baseline", configs["base"], "--quiet"]
    call += ["--weights", str(weights), "--dataset", NAME, "--num", "2", "--what", "counts"]
    call += ["--variant", "bf16: SOLVER.AMP.ENABLED True", "--image-size", "64", "64"]
    call += ["--baseline-opts", "INPUT.MIN_SIZE_TEST 128 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.01"]
    call += ["--report", str(tmp_path / "out"), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"]
    call += ["INPUT.MIN_SIZE_TEST", "128"]
    assert main(call) == 0
    ap = json.loads((tmp_path / "out" / "report.json").read_text())["ap"]
    assert ap["images"] == 2 and set(ap["models"]) == {"baseline base", "fpn", "fpn [bf16]"}
    assert ap["models"]["fpn"]["size"] == [128, 1333]
    assert len(ap["pairs"]) == 6  # boxes and masks
    for row in ap["pairs"]:
        assert row["verdict"] == "too few images" and row["low"] is None
    assert "too few images (" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, num, weights, error, text",
    [
        (NAME, 5, "", ValueError, "--dataset accuracy_val: AP of random weights says nothing"),
        ("acuracy_val", 5, "w.pth", KeyError, "--dataset.*'acuracy_val'.*accuracy_val"),
        (NAME, 0, "w.pth", ValueError, "--num 0"),
    ],
)
def test_mistakes(
    truth: dict[str, Any],
    models: dict[str, BenchmarkModel],
    name: str,
    num: int,
    weights: str,
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error, match=text):
        read_test_data(name, num, [models["fpn"].config.cfg], weights)


def test_a_class_that_the_dataset_does_not_have(
    truth: dict[str, Any], models: dict[str, BenchmarkModel]
) -> None:
    data = read_test_data(NAME, 1, [models["fpn"].config.cfg], "w.pth")
    model = replace(models["fpn"], trained=True, score_threshold=None)
    model.model = copy.deepcopy(model.model)
    for part in model.model.modules():
        if hasattr(part, "test_score_thresh"):
            part.test_score_thresh = 0.0
    with pytest.raises(ValueError, match=f"--dataset {NAME} has 1 classes, but fpn predicts class"):
        measure_ap({"fpn": model}, replace(data, classes=[3]), Bar(quiet=True))
