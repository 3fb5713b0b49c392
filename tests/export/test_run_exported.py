"""docs/examples/run_exported.py finds what Detectron2's DefaultPredictor finds, on photos of any size."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from models import write_detector
from PIL import Image

from fpn_plugin.export.export import Settings, export
from fpn_plugin.export.formats import FORMATS
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.detector import read_config

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "run_exported.py"
SPEC = importlib.util.spec_from_file_location("run_exported", EXAMPLE)
assert SPEC is not None and SPEC.loader is not None
run_exported: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run_exported)
# the tests of the models below take (160, at most 220)
PHOTOS = {"smaller": (101, 77), "larger": (300, 231), "portrait": (150, 333), "same": (160, 160)}
SIZES = {"INPUT__MIN_SIZE_TEST": 160, "INPUT__MAX_SIZE_TEST": 220}


def write_photo(folder: Path, width: int, height: int) -> Path:
    """Edges at several scales, as in a photo; not the same after any other way to resize."""
    picture = Image.new("RGB", (width, height))
    random = np.random.default_rng(0)
    for side in (3, 7, 20):
        noise = Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8))
        picture = Image.blend(picture, noise.resize(picture.size, Image.NEAREST), 0.5)
    picture.save(folder / f"{width}x{height}.png")
    return folder / f"{width}x{height}.png"


def exported(folder: Path, detector: str, format: str, **keys: Any) -> tuple[Any, Any, dict]:
    """Detectron2's predictor, a runner of the exported file, and its JSON."""
    config, weights = write_detector(folder, detector, **{**SIZES, **keys})
    output = folder / f"model{FORMATS[format].suffix}"
    sizes = "160x192,160x160,192x160"
    export(Settings(config, format, output, weights, "detector", sizes), Bar(quiet=True))
    info = json.loads(Path(f"{output}.json").read_text())
    load = run_exported.load_onnx if format == "onnx" else run_exported.load_torch
    run = load(output) if format == "onnx" else load(output, info)
    return DefaultPredictor(read_config(config, weights, [])), run, info


def overlap(one: np.ndarray, two: np.ndarray) -> float:
    return float((one & two).sum() / max((one | two).sum(), 1))


@pytest.mark.parametrize(
    "detector, format, keys",
    [
        ("mask_rcnn", "onnx", {"INPUT__FORMAT": "RGB"}),
        ("mask_rcnn", "torchscript", {"INPUT__MIN_SIZE_TEST": 0}),
        ("retinanet", "torchscript", {}),
    ],
)
def test_what_default_predictor_finds(detector, format, keys, tmp_path: Path) -> None:
    predictor, run, info = exported(tmp_path, detector, format, **keys)
    counts = []
    for width, height in PHOTOS.values():
        photo = write_photo(tmp_path, width, height)
        expected = predictor(read_image(str(photo), "BGR"))["instances"]
        outputs = run_exported.detect(run, photo, info)[0]
        counts.append(len(expected))
        assert len(outputs["scores"]) == len(expected)
        assert np.allclose(outputs["scores"], expected.scores, rtol=0, atol=1e-5)
        assert np.allclose(outputs["pred_boxes"], expected.pred_boxes.tensor, rtol=0, atol=1e-2)
        assert outputs["pred_classes"].tolist() == expected.pred_classes.tolist()
        if detector == "mask_rcnn":
            masks = expected.pred_masks.numpy()
            assert outputs["pred_masks"].shape == masks.shape == (len(expected), height, width)
            assert min(map(overlap, outputs["pred_masks"], masks)) > 0.99
    assert min(counts) > 0


def test_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    _, _, info = exported(tmp_path, "mask_rcnn", "torchscript")
    assert (info["min_size_test"], info["max_size_test"]) == (160, 220)
    assert (info["score_threshold"], info["mask_threshold"]) == (0.01, 0.5)
    assert len(info["classes"]) == 80, "COCO's, as the config evaluates on COCO"
    photo, picture = write_photo(tmp_path, 120, 90), tmp_path / "seen.png"
    path = tmp_path / "model.ts.json"
    path.write_text(json.dumps({**info, "classes": ["cat", "dog"]}))
    command = ["run", str(tmp_path / "model.ts"), str(photo), "--output", str(picture)]
    monkeypatch.setattr(sys, "argv", [*command, "--score", "0.02"])
    run_exported.main()
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert "with score >= 0.02" in first and last == str(picture)
    assert lines and all(line.split()[0] in ("cat", "dog") for line in lines)
    with Image.open(picture) as drawn, Image.open(photo) as plain:
        assert drawn.size == plain.size and drawn.tobytes() != plain.tobytes()
    with pytest.raises(SystemExit, match="seen.png exists; give --overwrite"):
        run_exported.main()
    # a JSON that an older version wrote
    path.write_text(json.dumps({k: v for k, v in info.items() if k != "min_size_test"}))
    monkeypatch.setattr(sys, "argv", [*command, "--score", "1", "--overwrite"])
    run_exported.main()
    printed = capsys.readouterr()
    assert "no min_size_test (an older export): not resized" in printed.err
    assert "0 with score >= 1; the highest is 0." in printed.out


@pytest.mark.parametrize("fixed, padded", [((256, 320), (160, 213)), ((128, 160), (120, 160))])
def test_a_file_of_one_size(fixed: Any, padded: Any, capsys: Any, tmp_path: Path) -> None:
    """The photo is resized as in tests, or so that it fits, never stretched; zeros around."""
    info = {"mean": [0.0] * 3, "std": [1.0] * 3, "normalised": True, "format": "RGB", "batch": 1}
    info |= {"min_size_test": 160, "max_size_test": 220, "fixed_size": fixed, "outputs": []}
    info |= {"size_divisibility": 32, "step": 1, "smallest_side": 130, "square_size": 0}
    Image.new("RGB", (400, 300), "white").save(tmp_path / "white.png")
    image = run_exported.detect(lambda image: [], tmp_path / "white.png", info)[1]
    assert image.shape == (1, 3, *fixed)
    assert (image[0, 0] > 0).any(1).sum() == padded[0] and (image[0, 0] > 0).any(0).sum() == padded[
        1
    ]
    assert ("resized to 160x120, not to 213x160" in capsys.readouterr().err) == (padded[1] == 160)
