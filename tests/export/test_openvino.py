"""`fpn export --format openvino`: precisions, quantisation, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from models import eager_model, tiny_subject, write_detector
from PIL import Image
from test_run_exported import run_exported, write_photo

from fpn_plugin.export import openvino_ir
from fpn_plugin.export.accuracy import Evaluation, FileBackbone, Judge, predict_by
from fpn_plugin.export.calibration import calibration_records, prepare_record
from fpn_plugin.export.export import (
    Settings,
    _check_drop,
    _exported_part,
    _judge,
    _load,
    export,
)
from fpn_plugin.export.formats import FORMATS, Options, Shape
from fpn_plugin.export.openvino_ir import Quantisation
from fpn_plugin.export.tensorrt import unsupported
from fpn_plugin.export.verify import COARSE, make_inputs, verify
from fpn_plugin.report.progress import Bar

SIZES = [(160, 192), (131, 161), (130, 163)]


def has(*packages: str) -> Any:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def faster_rcnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("detector")
    return write_detector(folder, "faster_rcnn", INPUT__MIN_SIZE_TEST=160)


def settings(
    detector: tuple[str, str], folder: Path, format: str = "openvino", **more: Any
) -> Settings:
    output = folder / f"model{FORMATS[format].suffix}"
    return Settings(detector[0], format, output, detector[1], **more)


@has("openvino", "nncf")
@pytest.mark.parametrize("norm", ["", "GN"])
def test_every_map_survives_a_coarser_type(norm: str, tmp_path: Path) -> None:
    """P6 too, and maps that a group norm reads: their convolutions have no bias, and OpenVINO takes
    the scale of their weights twice where two read them.

    A file says what it is computed in, which run_exported.py follows.
    """
    import openvino

    subject = tiny_subject(norm=norm, **({"out_channels": 64} if norm else {}))
    onnx_file, (tests,) = tmp_path / "model.onnx", make_inputs(subject, SIZES[1:2], 2, ())
    FORMATS["onnx"].write(subject, Shape(None, 0, (160, 192)), onnx_file)
    images = [subject.example((160, 192), 1).numpy() for _ in range(4)]
    quantisation = Quantisation(images, lambda image: image)
    known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for precision, hint in {"int8": "f32", "bf16": "bf16"}.items():
        if precision == "bf16" and "BF16" not in known:
            with pytest.raises(ValueError, match="--precision bf16: this CPU has no bfloat16"):
                openvino_ir.check_precision(precision)
            continue
        path = tmp_path / f"{precision}.xml"
        used = quantisation if precision == "int8" else None
        how = openvino_ir.write(onnx_file, path, precision, used)
        assert ("quantised by NNCF on 4 images" in how) == (precision == "int8")
        assert ("FakeQuantize" in path.read_text()) == (precision == "int8")
        model = openvino.Core().read_model(str(path))
        assert model.get_rt_info(openvino_ir.HINT_PATH).astype(str) == hint
        run = openvino_ir.load(path)
        (difference,) = verify(subject, run, [tests], precision)
        assert difference.rms is not None and difference.rms < 0.2 < COARSE["int8"]
        theirs = run_exported.load(path, {})(tests.numpy())
        assert all(np.array_equal(x, y) for x, y in zip(run(tests), theirs))


@has("openvino", "nncf")
def test_an_eight_bit_detector_by_the_command(
    faster_rcnn, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fpn_plugin.cli.main import main

    photos = tmp_path / "photos"
    photos.mkdir()
    for width in (160, 200, 240):
        write_photo(photos, width, 170)
    words = ["--config-file", faster_rcnn[0], "--weights", faster_rcnn[1], "--what", "detector"]
    words += ["--format", "openvino", "--precision", "int8", "--calibrate", str(photos)]
    output = tmp_path / "model.xml"
    monkeypatch.setattr("fpn_plugin.export.verify.SAME", {"int8": 0.0})  # random weights
    assert main(["export", "--quiet", *words, "--output", str(output)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and printed[0].endswith("are the same") and printed[-1] == str(output)
    info = json.loads((tmp_path / "model.xml.json").read_text())
    assert info["versions"].keys() >= {"openvino", "nncf"}
    run = run_exported.load(output, info)
    found = run_exported.detect(run, photos / "200x170.png", info)[0]
    assert set(found) == {"pred_boxes", "pred_classes", "scores"} and len(found["scores"])
    monkeypatch.setitem(sys.modules, "torch", None)  # by numpy alone
    assert len(run_exported.load(output, info)(np.zeros((3, 160, 160), np.float32))) == 3


@has("openvino")
def test_boxes_are_not_of_bfloat16(tmp_path: Path) -> None:
    """Of 640 pixels it tells every second or fourth apart, and by itself OpenVINO leaves only what
    follows the last convolution, here that of masks, in float32."""
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    mask_rcnn = write_detector(tmp_path, "mask_rcnn", INPUT__MIN_SIZE_TEST=160)
    given = settings(mask_rcnn, tmp_path, what="detector", precision="bf16")
    model, shape = eager_model(given), Shape(None, 0, (160, 192))
    FORMATS["openvino"].write(model, shape, given.output, Options(precision="bf16"))
    compiled = openvino.Core().compile_model(
        given.output, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"}
    )
    info = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    types = {(i["layerType"].astype(str), i["outputPrecisions"].astype(str)) for i in info}
    assert ("Convolution", "bf16") in types and ("ROIAlign", "bf16") in types
    assert ("Gather", "f32") in types and ("Gather", "bf16") not in types  # of boxes


def test_boxes_are_not_quantised() -> None:
    def node(name: str, kind: str) -> Any:
        return SimpleNamespace(get_friendly_name=lambda: name, get_type_name=lambda: kind)

    nodes = [node("/backbone/res2/Add", "Add"), node("/roi_heads/Mul", "Multiply")]
    nodes += [node("/roi_heads/fc1", "MatMul"), node("/rpn/conv", "Convolution")]
    model = SimpleNamespace(get_ops=lambda: nodes)
    assert openvino_ir.unquantised(model) == ["/roi_heads/Mul"] == openvino_ir.precise(model)
    backbone = SimpleNamespace(get_ops=lambda: [node("node_add", "Add")])
    assert openvino_ir.unquantised(backbone) == []


@pytest.mark.parametrize(
    "more, error, message",
    [
        ({"precision": "int4"}, KeyError, "--precision: unknown name 'int4'.*int8"),
        ({"precision": "bf16", "format": "onnx"}, ValueError, "--precision bf16: --format onnx"),
        ({"precision": "int8"}, ValueError, "--precision int8: name training images .*--calibrate"),
        ({"calibrate": ["x"]}, ValueError, "--calibrate is for --precision int8, not float32"),
        ({"accuracy_aware": True}, ValueError, "--accuracy-aware needs --precision int8 and --eva"),
        ({"max_drop": -1.0}, ValueError, "--max-drop: -1.0 is not"),
        ({"max_drop": float("nan")}, ValueError, "--max-drop: nan is not"),
        ({"opset": 18}, ValueError, "--opset 18: --format openvino has none"),
        ({"opset": 16, "format": "onnx"}, ValueError, "--opset: 16 is not one of 18, 19, 20"),
    ],
)
def test_bad_arguments(more, error, message, faster_rcnn, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        export(settings(faster_rcnn, tmp_path, **more), Bar(True))
    assert list(tmp_path.iterdir()) == []


@has("openvino", "nncf")
@pytest.mark.parametrize(
    "more, message",
    [
        ({"precision": "int8", "calibrate": ["nowhere"]}, "--calibrate 'nowhere': no registered"),
        ({"precision": "int8", "calibrate": ["x"], "calibrate_num": 0}, "--calibrate-num: 0"),
        ({"evaluate": "x_val", "fixed_size": "160x160"}, "--evaluate x_val: a test set has images"),
        ({"evaluate": "x_val"}, "--evaluate.*'x_val'"),
    ],
)
def test_bad_data(more, message, faster_rcnn, tmp_path: Path) -> None:
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=message):
        export(settings(faster_rcnn, tmp_path, **more), Bar(True))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra() -> None:
    format = replace(FORMATS["openvino"], packages=("openvino", "no_such_package"))
    with pytest.raises(ImportError, match=r"no_such_other: pip install 'fpn_plugin\[deploy"):
        format.require("openvino", "no_such_other")


def test_calibration_images_are_what_inference_gives(faster_rcnn, tmp_path: Path) -> None:
    """Resized, normalised and padded as run_exported.py does."""
    photo = write_photo(tmp_path, 300, 231)
    (record,) = calibration_records([str(tmp_path)], 5, SimpleNamespace())
    given = Settings(faster_rcnn[0], "onnx", tmp_path / "m.onnx", faster_rcnn[1])
    model = eager_model(given)
    detector = _load(given, Bar(True))
    image = prepare_record(record, detector.mapper, model, None, 0)
    seen: list[np.ndarray] = []
    info = {**model.info, "step": model.step, "smallest_side": model.least, "fixed_size": None}
    info |= {"batch": 0, "outputs": []}
    run_exported.detect(lambda x: seen.append(x) or [], photo, info)
    assert image.shape == seen[0].shape and np.abs(image - seen[0]).max() < 1e-5
    fixed = prepare_record(record, detector.mapper, model, (160, 192), 2)
    assert fixed.shape == (2, 3, 160, 192)


def test_a_file_in_the_place_of_the_backbone(faster_rcnn, tmp_path: Path) -> None:
    given = Settings(faster_rcnn[0], "onnx", tmp_path / "m.onnx", faster_rcnn[1], evaluate="x")
    detector = _load(given, Bar(True))
    sample = {"image": torch.randint(0, 256, (3, 160, 192)), "height": 80, "width": 96}
    expected = detector.model([sample])[0]["instances"]
    for what in ("backbone", "detector"):
        model = _exported_part(replace(given, what=what), detector)
        found = predict_by(model.run, model, detector.model)(sample)["instances"]
        assert len(found) == len(expected) > 0
        assert torch.allclose(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3)
        assert found.image_size == (80, 96)
    assert not isinstance(detector.model.backbone, FileBackbone), "the model stays as it was"


def test_a_drop_in_ap_is_refused(tmp_path: Path) -> None:
    given = Settings("", "openvino", tmp_path / "m.xml", precision="int8", evaluate="x")
    evaluation = Evaluation("x_val", 3, {"bbox": 30.0, "segm": 20.0}, {"bbox": 29.6, "segm": 19.5})
    _check_drop(given, evaluation)
    assert str(evaluation).startswith("x_val, 3 images: box AP 30.00 of the model, 29.60 of the f")
    worse = replace(evaluation, file={"bbox": 31.0})  # no masks at all
    with pytest.raises(ValueError, match=r"--max-drop 0.5: .* lower by 20.00 .*Nothing was writ"):
        _check_drop(given, worse)


def test_ap_of_a_file(faster_rcnn, tmp_path: Path) -> None:
    """A file that finds the truth has AP 100, one that finds nothing 0."""
    Image.new("RGB", (192, 160)).save(tmp_path / "a.png")
    truth = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [20, 30, 60, 50], "iscrowd": 0}
    truth["area"] = 3000
    image = {"id": 1, "file_name": "a.png", "height": 160, "width": 192}
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    text = json.dumps({"images": [image], "annotations": [truth], "categories": categories})
    (tmp_path / "a.json").write_text(text)
    name = "deploy_val"
    register_coco_instances(name, {}, str(tmp_path / "a.json"), str(tmp_path))
    try:
        given = Settings(
            *(faster_rcnn[0], "onnx", tmp_path / "m.onnx", faster_rcnn[1], "detector"),
            evaluate=name,
        )
        detector = _load(given, Bar(True))
        model = replace(eager_model(given), outputs=("pred_boxes", "pred_classes", "scores"))
        judge = _judge(given, Shape(None, 0, (160, 192)), detector, model, Bar(True))
        assert isinstance(judge, Judge) and set(judge.reference) == {"bbox"}

        def find(image: torch.Tensor) -> list[torch.Tensor]:
            assert image.dtype == torch.float32 and image.shape == (3, 160, 192)
            box = torch.tensor([[20.0, 30, 80, 80]])
            return [box, torch.zeros(1, dtype=torch.int64), torch.ones(1)]

        evaluation = judge.compare(find)
        assert evaluation.file == {"bbox": pytest.approx(100)} and evaluation.images == 1
        assert judge.score(find, judge.data.records) == pytest.approx(1)
        nothing = judge.compare(lambda image: [y[:0] for y in find(image)])
        assert nothing.file == {"bbox": 0.0}
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_opset_18_and_what_tensorrt_knows(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    subject, path = tiny_subject(), tmp_path / "model.onnx"
    FORMATS["onnx"].write(subject, Shape(None, 0, (160, 192)), path, Options(opset=18))
    model = onnx.load(str(path))
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    images = make_inputs(subject, SIZES[:1], 0, ())
    assert verify(subject, FORMATS["onnx"].load(path), images)[0].relative < 1e-4
    assert unsupported(path) == []
    model.graph.node[0].op_type = "Unique"
    model.opset_import[0].version = 21
    onnx.save(model, str(path))
    assert unsupported(path) == ["Unique", "opset 21"]
