"""`fpn predict`: pictures, videos and COCO's results of a tiny Mask R-CNN."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from PIL import Image

from fpn_plugin.checkpoint.record import plain_config
from fpn_plugin.cli.main import main
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize import predict as module
from fpn_plugin.visualize import video
from fpn_plugin.visualize.detector import load_detector, read_config
from fpn_plugin.visualize.predict import RESULTS, Settings, predict


def run(folder: Path, output: Path, *inputs: Any, **changes: Any) -> tuple[int, list[str], str]:
    """The exit code, the lines that were shown, and what the bar said."""
    shown: list[str] = []
    said = io.StringIO()
    values = {"inputs": [str(path) for path in inputs], "json": True, "score": 0.2, **changes}
    settings = Settings(str(folder / "model.pth"), output=output, **values)
    return predict(settings, Bar(stream=said), shown.append), shown, said.getvalue()


def results_in(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / RESULTS).read_text())


def write_video(path: Path, photo: Path, frames: int, codec: str = "mp4v") -> Path:
    with Image.open(photo) as picture:
        pixels = np.asarray(picture.convert("RGB").resize((96, 80)))[:, :, ::-1]
    fourcc = cv2.VideoWriter_fourcc(*codec)  # type: ignore[attr-defined]
    writer = cv2.VideoWriter(str(path), fourcc, 10.0, (96, 80))
    for number in range(frames):
        writer.write(np.roll(pixels, 3 * number, 1))
    writer.release()
    return path


def frames_of(path: Path) -> list[np.ndarray]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (frame := capture.read())[0]:
        frames.append(frame[1])
    return frames


def test_the_results_are_those_of_an_evaluation(folder: Path, tmp_path: Path) -> None:
    """By the config beside the weights, in bfloat16 and with folded norms."""
    opts = ["SOLVER.AMP.ENABLED", "True", "TEST.FOLD_NORMS", "True"]
    code, shown, _ = run(folder, tmp_path / "out", dataset="heads_val", opts=opts, json_only=True)
    assert code == 0 and shown == [str(tmp_path / "out" / RESULTS)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RESULTS]
    cfg = read_config("", str(folder / "model.pth"), opts)
    cfg.OUTPUT_DIR = str(tmp_path)
    Trainer.test(cfg, load_detector(cfg).model)
    expected = json.loads((tmp_path / "inference" / RESULTS).read_text())
    assert len(expected) > 10 and "segmentation" in expected[0]
    assert results_in(tmp_path / "out") == expected


def test_pictures_of_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    photo = Image.open(folder / "val0.png").convert("RGB")
    turned = Image.Exif()
    turned[0x112] = 6
    photo.save(tmp_path / "in" / "turned.jpg", exif=turned)
    photo.convert("L").save(tmp_path / "in" / "turned.png")
    (tmp_path / "in" / "broken.jpg").write_text("no picture")
    output = tmp_path / "out"
    code, shown, said = run(folder, output, tmp_path / "in")
    assert code == 1 and "broken.jpg (cannot identify" in shown[-1]
    names = ["turned.jpg", "turned_2.jpg", RESULTS]
    assert [Path(line.split(":")[0]).name for line in shown[:-1]] == names
    assert {path.name for path in output.iterdir()} == set(names)
    with Image.open(output / names[0]) as first, Image.open(output / names[1]) as second:
        assert first.size == (667, 800) and second.size == (800, 667)
    config = read_config("", str(folder / "model.pth"), [])
    predictor, results = DefaultPredictor(config), results_in(output)
    pixels = np.asarray(Image.open(tmp_path / "in" / "turned.jpg").transpose(Image.ROTATE_270))
    expected = predictor(pixels[:, :, ::-1])["instances"]
    found = [each for each in results if each["file_name"].endswith("turned.jpg")]
    assert len(expected) and np.allclose([each["score"] for each in found], expected.scores)
    assert {each["image_id"] for each in results} == {1, 2}
    assert "objects with score ≥ 0.2 in 2 images: " in said
    with pytest.raises(FileExistsError, match="turned.jpg, turned_2.jpg, coco.*--overwrite"):
        run(folder, output, tmp_path / "in")
    with pytest.raises(ValueError, match="--output .*would replace the input .*broken.jpg"):
        run(folder, tmp_path / "in", tmp_path / "in", overwrite=True)


def test_the_highest_score_where_nothing_reaches_the_threshold(
    folder: Path, tmp_path: Path
) -> None:
    code, shown, said = run(folder, tmp_path, folder / "val0.png", score=1.0, json=False)
    assert code == 0 and shown == [f"{tmp_path / 'val0.jpg'}: 0 found"]
    assert "No detection has a score ≥ 1: the highest is 0." in said
    opts = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.999"]
    _, _, said = run(folder, tmp_path, folder / "val0.png", overwrite=True, opts=opts)
    assert "The model drops all below MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.999" in said
    assert "nothing is detected at all above MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.999" in said
    assert results_in(tmp_path) == []


def test_a_video(folder: Path, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", folder / "val0.png", 4)
    cut = write_video(tmp_path / "cut.avi", folder / "val0.png", 12, "MJPG")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (tmp_path / "none.mov").write_bytes(clip.read_bytes()[:400])
    code, shown, _ = run(folder, tmp_path / "out", tmp_path)
    assert code == 1 and "none.mov (OpenCV reads no video" in shown[-1]
    assert "of its 12 frames can be read" in shown[-1]
    drawn, plain = frames_of(tmp_path / "out" / "clip.mp4"), frames_of(clip)
    assert len(drawn) == len(plain) == 4 and drawn[0].shape == plain[0].shape
    assert 3 < len(frames_of(tmp_path / "out" / "cut.mp4")) < 9
    results = [each for each in results_in(tmp_path / "out") if "clip" in each["file_name"]]
    assert {each["frame"] for each in results} == set(range(4))
    predictor = DefaultPredictor(read_config("", str(folder / "model.pth"), []))
    expected = predictor(plain[3])["instances"].scores
    scores = [each["score"] for each in results if each["frame"] == 3]
    assert len(scores) and np.allclose(scores, expected, atol=1e-5)


class Camera:
    """OpenCV's capture of a camera, which ends by ctrl-C after some frames."""

    def __init__(self, source: Any) -> None:
        self.number, self.left = source, 4

    def isOpened(self) -> bool:
        return self.number == 1

    def get(self, property: int) -> float:
        return 10.0 if property == cv2.CAP_PROP_FPS else -1.0

    def read(self) -> tuple[bool, np.ndarray]:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return True, np.full((80, 96, 3), 90, np.uint8)

    def release(self) -> None:
        pass


def test_a_camera_until_ctrl_c(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The model takes 0.3 s for a frame, and the video still lasts as long as what was seen."""
    monkeypatch.setattr(video.cv2, "VideoCapture", Camera)
    times = iter([0.0, 0.0, 0.3, 0.6])
    monkeypatch.setattr(module, "wall_clock", lambda: next(times))
    code, shown, _ = run(folder, tmp_path, "camera:1")
    assert code == 0 and shown[0].startswith(str(tmp_path / "camera_1.mp4"))
    monkeypatch.undo()
    assert len(frames_of(tmp_path / "camera_1.mp4")) == 7
    assert {path.name for path in tmp_path.iterdir()} == {"camera_1.mp4", RESULTS}
    assert {each["frame"] for each in results_in(tmp_path)} <= {0, 1, 2}


def test_cameras(tmp_path: Path, monkeypatch: Any) -> None:
    names = ("camera", "camera:2", "3", "camera.jpg", "a/0")
    assert [video.camera_of(name) for name in names] == [0, 2, 3, None, None]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0").mkdir()
    assert video.camera_of("0") is None
    with pytest.raises(ValueError, match="there is no camera 98"):
        video.Video(98)


def test_the_config_in_the_checkpoint_comes_before_the_file(folder: Path, tmp_path: Path) -> None:
    cfg = read_config("", str(folder / "model.pth"), ["INPUT.MIN_SIZE_TEST", "77"])
    content = torch.load(folder / "model.pth")
    record = {"config": plain_config(cfg), "optimizer": "", "parameters": []}
    torch.save({**content, "fpn_plugin": record}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text("INPUT: {MIN_SIZE_TEST: 55}")
    assert read_config("", str(tmp_path / "model.pth"), []).INPUT.MIN_SIZE_TEST == 77
    given = str(tmp_path / "config.yaml")
    assert read_config(given, str(tmp_path / "model.pth"), []).INPUT.MIN_SIZE_TEST == 55
    torch.save(content, tmp_path / "other.pth")
    assert read_config("", str(tmp_path / "other.pth"), []).INPUT.MIN_SIZE_TEST == 55
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(
        FileNotFoundError, match="--config-file: give .*other.pth nor .*config.yaml"
    ):
        read_config("", str(tmp_path / "other.pth"), [])


@pytest.mark.parametrize("name", ["PanopticFPN", "SemanticSegmentor", "ProposalNetwork"])
def test_other_outputs_are_drawn(name: str, folder: Path, tmp_path: Path) -> None:
    opts = ["MODEL.META_ARCHITECTURE", name, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2"]
    opts += ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.SEM_SEG_HEAD.NORM", ""]
    changes = {"opts": opts, "allow_partial": True, "json": name == "PanopticFPN"}
    assert run(folder, tmp_path, folder / "val0.png", **changes)[0] == 0
    assert (tmp_path / "val0.jpg").is_file()
    if name != "PanopticFPN":
        with pytest.raises(ValueError, match=f"--json: a {name} finds no objects of classes"):
            run(folder, tmp_path, folder / "val0.png", **{**changes, "json": True})


def test_the_tool(folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["predict", "--weights", str(folder / "model.pth"), "--input"]
    assert main([*command, str(folder / "val0.png")]) == 0
    assert capsys.readouterr().out.startswith("predictions/val0.jpg: ")
    for words, error in (
        (["no.jpg"], FileNotFoundError),
        (["camera", "camera:1"], ValueError),
        ([str(folder / "val0.png"), "--score", "50"], ValueError),
    ):
        with pytest.raises(error, match=f"--{'score' if '--score' in words else 'input'}"):
            main([*command, *words])
