"""tools/export.py: from a config and a checkpoint to a file, and what runs it without Detectron2."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from models import EVERY_FORMAT, eager_model, write_detector
from PIL import Image

from fpn_plugin.data.deep_images import read_image
from fpn_plugin.export.export import Settings, export
from fpn_plugin.export.formats import FORMATS
from fpn_plugin.export.verify import TOLERANCE
from fpn_plugin.pyramid.blocks_rep import Rep
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.detector import load_detector, read_config

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "run_exported.py"
# neither Detectron2 nor the plugin can be imported
BLOCKED = """
import runpy, sys
sys.modules.update({"detectron2": None, "fpn_plugin": None, "fvcore": None})
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detectors")


@pytest.fixture(scope="module")
def faster_rcnn(folder: Path) -> tuple[str, str]:
    return write_detector(folder, "faster_rcnn", INPUT__MIN_SIZE_TEST=160)


def settings(detector: tuple[str, str], name: str, folder: Path, **more: Any) -> Settings:
    output = folder / f"model{FORMATS[name].suffix}"
    return Settings(detector[0], name, output, detector[1], **more)


def run_example(model: Path, *arguments: str) -> dict[str, np.ndarray]:
    saved = model.with_name("saved.npz")
    command = [sys.executable, "-c", BLOCKED, str(EXAMPLE), str(model), *arguments]
    done = subprocess.run([*command, "--save", str(saved)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(saved))


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_a_backbone_runs_from_its_file_alone(name, faster_rcnn, tmp_path: Path) -> None:
    given = settings(faster_rcnn, name, tmp_path)
    assert [difference.shape[0] for difference in export(given, Bar(True))] == [1, 2, 3]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert set(files) == {
        *(given.output.with_suffix(suffix).name for suffix in FORMATS[name].more),
        given.output.name,
        given.output.name + ".json",
    }
    info = json.loads((tmp_path / files[-1]).read_text())
    assert info["strides"] == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert (info["format"], info["mean"]) == ("BGR", [103.53, 116.28, 123.675])
    pixels = np.random.default_rng(0).integers(0, 256, (150, 170, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    maps = run_example(given.output, str(tmp_path / "photo.png"))
    image = torch.from_numpy(maps.pop("image"))
    resize = ResizeShortestEdge(info["min_size_test"], info["max_size_test"])
    resized = resize.get_transform(pixels).apply_image(pixels)
    assert resized.shape == (160, 181, 3)
    bgr = torch.from_numpy(resized[:, :, ::-1].transpose(2, 0, 1).copy())
    detector = load_detector(read_config(*faster_rcnn, [])).model
    prepared = detector.preprocess_image([{"image": bgr}]).tensor
    assert torch.allclose(image, prepared, rtol=0, atol=1e-5)
    assert list(maps) == info["outputs"]
    for y, expected in zip(maps.values(), eager_model(given).run(image)):
        assert np.allclose(y, expected.numpy(), rtol=0, atol=1e-4 * float(expected.abs().max()))


HYBRID: dict[str, Any] = {
    "MODEL__FPN__TOPOLOGY": "hybrid",
    "MODEL__FPN__FUSE_TYPE": "stack",
    "MODEL__FPN__BLOCK": "csp_rep(depth=1)",
    "MODEL__FPN__DOWNSAMPLE": 'conv(activation="silu")',
    "MODEL__FPN__NORM": "BN",
    "MODEL__FPN__IN_FEATURES": ["res4", "res5"],
    "MODEL__RPN__IN_FEATURES": ["auto"],
    "MODEL__ROI_HEADS__IN_FEATURES": ["auto"],
    "MODEL__ANCHOR_GENERATOR__SIZES": ["auto"],
}


def test_norms_and_parallel_convolutions_are_folded(tmp_path: Path) -> None:
    """RT-DETR's encoder: each `rep` of the file is one convolution, and the maps are the model's."""
    detector = write_detector(tmp_path, "faster_rcnn", **HYBRID)
    given = settings(detector, "torchscript", tmp_path)
    plain = eager_model(given)
    given = replace(given, opts=("TEST.FOLD_NORMS", "True"))
    export(given, Bar(True))
    image = torch.randn(2, 3, 192, 257)
    file = torch.jit.load(str(given.output))
    for y, expected in zip(file(image).values(), plain.run(image)):
        assert torch.allclose(y, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    folded = str(file.inlined_graph)
    assert "batch_norm" not in folded
    convs = sum(isinstance(m, torch.nn.Conv2d) for m in plain.module.modules())
    branches = sum(isinstance(m, Rep) for m in plain.module.modules())
    assert branches == 2 and folded.count("aten::conv2d") == convs - branches


# test_run_exported.py has others; both formats of all on trained models are in docs/export.md
@pytest.mark.parametrize("detector, name", [("faster_rcnn", "onnx")])
def test_a_detector_runs_from_its_file_alone(detector, name, folder, tmp_path: Path) -> None:
    sizes = "128x160,160x128,141x133"
    given = settings(write_detector(folder, detector), name, tmp_path, what="detector", sizes=sizes)
    differences = export(given, Bar(True))
    assert len({difference.shape for difference in differences}) == 3
    assert any(difference.found for difference in differences)
    outputs = run_example(given.output)
    assert set(outputs) == {"image", "pred_boxes", "pred_classes", "scores"}
    boxes = eager_model(given).run(torch.from_numpy(outputs["image"]))[0].numpy()
    assert len(boxes) and np.allclose(outputs["pred_boxes"], boxes, rtol=0, atol=0.05)


def test_a_detector_is_no_torch_export_program(faster_rcnn, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--what detector --format torch_export: .*torchscript"):
        export(settings(faster_rcnn, "torch_export", tmp_path, what="detector"), Bar(True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["backbone", "detector"])
def test_a_gray_model_takes_gray_and_deep_photos(what: str, tmp_path: Path) -> None:
    gray: dict[str, Any] = {
        "MODEL__PIXEL_MEAN": [110.0],
        "MODEL__PIXEL_STD": [400.0],
        "INPUT__FORMAT": "L",
    }
    gray["INPUT__MIN_SIZE_TEST"] = 0  # as they are
    config, weights = write_detector(tmp_path, "faster_rcnn", **gray)
    photo, broken = tmp_path / "deep.png", tmp_path / "broken.png"
    Image.fromarray((np.random.default_rng(0).random((90, 120)) * 4000).astype(np.uint16)).save(
        photo
    )
    broken.write_text("no picture")
    size = "160x192" if what == "backbone" else "64x96"
    asked = Settings(
        config, "torchscript", tmp_path / "gray.ts", weights, what, size, inputs=[photo]
    )
    assert [d.shape[-3] for d in export(asked, Bar(quiet=True))] == [1]
    if what == "backbone":
        image = run_example(tmp_path / "gray.ts", str(photo))["image"]
        expected = read_image(str(photo), "L", "percentile").astype(np.float32)
        assert np.abs(image[0, 0, :90, :120] * 400 + 110 - expected[..., 0]).max() < 0.01
    with pytest.raises(ValueError, match="--input .*broken.png.*cannot be read"):
        export(replace(asked, inputs=[broken], overwrite=True), Bar(quiet=True))


def test_an_operator_of_a_detector_is_refused_by_its_node(tmp_path: Path) -> None:
    given = write_detector(tmp_path, "faster_rcnn", MODEL__FPN__TOPOLOGY="fapn")
    before = sorted(tmp_path.iterdir())
    message = r"--format onnx: node 'model.backbone.fapn_.*: torchvision::deform_conv2d"
    with pytest.raises(ValueError, match=message):
        export(settings(given, "onnx", tmp_path, what="detector"), Bar(True))
    assert sorted(tmp_path.iterdir()) == before


def test_what_differs_is_not_written(faster_rcnn, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(TOLERANCE, "backbone", -1.0)
    with pytest.raises(ValueError, match="the exported model differs.*Nothing was written"):
        export(settings(faster_rcnn, "torchscript", tmp_path), Bar(True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more, error, message",
    [
        ({"format": "tflite"}, KeyError, "--format: unknown name 'tflite'.*onnx"),
        ({"what": "head"}, KeyError, "--what: unknown name 'head'"),
        ({"output": Path("model.onnx")}, ValueError, "--output 'model.onnx': .* end in .ts"),
        ({"sizes": "320"}, ValueError, "--sizes: '320' is not HxW"),
        ({"sizes": "320x320,32x320"}, ValueError, "--sizes: 32x320: sides below 130 pixels"),
        ({"sizes": "320x320", "fixed_size": "320x320"}, ValueError, "--sizes: with --fixed-size"),
        ({"what": "detector", "fixed_size": "320x320"}, ValueError, "--fixed-size: a detector"),
        ({"what": "detector", "batch": 4}, ValueError, "--batch: a detector"),
        ({"batch": -1}, ValueError, "--batch: -1"),
        ({"inputs": [Path("no.jpg")]}, FileNotFoundError, "--input 'no.jpg'"),
        ({"weights": "no.pth"}, FileNotFoundError, "'no.pth': there is no such file"),
    ],
)
def test_bad_arguments(more, error, message, faster_rcnn, tmp_path: Path) -> None:
    fields = {**vars(settings(faster_rcnn, "torchscript", tmp_path)), **more}
    with pytest.raises(error, match=message):
        export(Settings(**fields), Bar(True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "what, key, value, message",
    [
        ("backbone", "MODEL.FPN.TOPOLOGY", "pafpn", "pafpn_output3.* is not in the checkpoint"),
        ("backbone", "MODEL.FPN.OUT_CHANNELS", "8", r"fpn_lateral2.weight is \(16, 64, 1, 1\) in"),
        ("detector", "MODEL.ROI_HEADS.NUM_CLASSES", "5", "cls_score.weight is .* config.yaml of"),
    ],
)
def test_weights_that_do_not_fit(what, key, value, message, faster_rcnn, tmp_path: Path) -> None:
    given = settings(faster_rcnn, "torchscript", tmp_path, what=what, opts=(key, value))
    with pytest.raises(ValueError, match=f"does not fit the config: .*{message}"):
        export(given, Bar(True))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(faster_rcnn, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "onnxscript")
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install 'fpn_plugin\[export"):
        export(settings(faster_rcnn, "onnx", tmp_path), Bar(True))


def test_the_tool_and_a_file_that_is_there(faster_rcnn, tmp_path: Path) -> None:
    output = tmp_path / "model.ts"
    command = [sys.executable, str(ROOT / "tools" / "export.py"), "--quiet"]
    command += ["--config-file", faster_rcnn[0], "--weights", faster_rcnn[1]]
    command += ["--format", "torchscript", "--output", str(output), "--fixed-size", "128x160"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 4 and lines[0].startswith("1x3x128x160: largest difference")
    assert lines[-1] == str(output)
    written = output.stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="model.ts.json exists; give --overwrite"):
        export(settings(faster_rcnn, "torchscript", tmp_path), Bar(True))
    assert output.stat().st_mtime_ns == written
