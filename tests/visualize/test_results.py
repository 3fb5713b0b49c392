"""Pictures of an evaluation's results, on a dataset of four generated photos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from helpers import own_datasets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image
from pycocotools import mask as rle

from fpn_plugin.cli.main import main
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.images import spread
from fpn_plugin.visualize.objects import ImageObject, draw_objects
from fpn_plugin.visualize.results import draw_pair, draw_results, load_results
from fpn_plugin.visualize.run import Settings, visualize

NAME = "pictures_test"
SQUARE = [[10.0, 10.0, 40.0, 10.0, 40.0, 40.0, 10.0, 40.0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Images 10, 20, 30 and 40 (40 has no objects), categories 3 and 7, and results.json."""
    root = tmp_path_factory.mktemp("results")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in (10, 20, 30, 40):
        photo = rng.integers(60, 120, (60, 90, 3), dtype=np.uint8)
        Image.fromarray(photo).save(root / f"photo{number}.png")
        images.append({"id": number, "file_name": f"photo{number}.png", "height": 60, "width": 90})
    for index, number in enumerate((10, 10, 20, 30), 1):
        box = {"bbox": [10, 10, 30, 30], "area": 900, "segmentation": SQUARE, "iscrowd": 0}
        annotation = {"id": index, "image_id": number, "category_id": (3, 7)[index % 2]}
        annotations.append(annotation | box)
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (root / "data.json").write_text(json.dumps(data))
    write_results(root, [result(10), result(10, score=0.2), result(20, 7)])
    with own_datasets():
        register_coco_instances(NAME, {}, str(root / "data.json"), str(root))
        yield root


def result(image_id: int, category_id: int = 3, score: float = 0.9, **more: Any) -> dict[str, Any]:
    box = [12.0, 8.0, 30.0, 30.0]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score, **more}


def write_results(folder: Path, results: Any) -> Path:
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "results.json"


def test_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jpg").write_text("mine")
    paths = draw_results(folder / "results.json", NAME, tmp_path, num=2)
    names = ["detections_1_photo10.jpg", "detections_2_photo30.jpg"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "mine.jpg"]
    first = paths[0].read_bytes()
    draw_results(folder / "results.json", NAME, tmp_path, num=2)
    assert paths[0].read_bytes() == first
    with Image.open(paths[0]) as picture:
        assert picture.width > 2 * 800 and picture.width > picture.height


def test_the_tool_on_own_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    own = f"{{VAL_JSON: {folder / 'data.json'}, VAL_IMAGES: {folder}}}"
    (tmp_path / "config.yaml").write_text(f"DATASETS:\n  OWN: {own}\n")
    args = ["--results", folder / "results.json", "--dataset", "own_val", "--num", 1]
    args += ["--config-file", tmp_path / "config.yaml", "--output", tmp_path / "out"]
    with own_datasets():
        main(["visualize", *map(str, args)])
    picture = tmp_path / "out" / "detections_1_photo20.jpg"
    assert capsys.readouterr().out.split() == [str(picture)] and picture.is_file()
    for flag in ("--html", "--sizes-only", "--weights=model.pth"):
        with pytest.raises(SystemExit):
            main(["visualize", *map(str, args[:2]), "--output", "x", "--dataset", NAME, flag])
        assert "--results: " in capsys.readouterr().err


@pytest.mark.parametrize("names", [["cat", "dog"], ["dog", "cat"]])
def test_results_of_other_classes(names: list[str], folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"DATASETS: {{CLASSES: {{NAMES: {names}, IDS: [3, 7]}}}}\n")
    (tmp_path / "inference").mkdir()
    results = shutil.copy(folder / "results.json", tmp_path / "inference")
    for file in ("", str(config)):
        settings = Settings(file, tmp_path, results=results, dataset=NAME, num=1)
        if names == ["cat", "dog"]:
            assert len(visualize(settings, Bar(quiet=True))) == 1
            continue
        with pytest.raises(ValueError, match="class 0 is 'dog' in the model and 'cat' in pictures"):
            visualize(settings, Bar(quiet=True))


def test_threshold(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    photo: np.ndarray = np.zeros((60, 90, 3), dtype=np.uint8)
    (found,) = [load_results(folder / "results.json", NAME)[10]]
    for score, title in ((0.5, "1 cat"), (0.1, "2 cat"), (0.95, "0; the highest is 0.9")):
        axes = draw_pair(photo, [], found, NAME, score).axes[1]
        assert axes.get_title(loc="left").strip() == f"detections with score ≥ {score}: {title}"
        assert len(axes.collections[-1].get_paths()) == (0 if "0" in title[:1] else int(title[0]))
    draw_results(folder / "results.json", NAME, tmp_path, num=1, score=0.5)
    assert capsys.readouterr().out == ""
    draw_results(folder / "results.json", NAME, tmp_path, num=9, score=0.95)
    said = "No detection has a score ≥ 0.95: the highest is 0.9; give a lower --score"
    assert capsys.readouterr().out.strip() == said


def test_boxes_and_masks_are_drawn_on_their_side(folder: Path) -> None:
    annotation = DatasetCatalog.get(NAME)[0]["annotations"][0]
    photo: np.ndarray = np.full((60, 90, 3), 40, dtype=np.uint8)
    figure = draw_pair(photo, [annotation], [{**annotation, "score": 0.7}] * 2, NAME, 0.5)
    left, right = figure.axes
    titles = [axes.get_title(loc="left").strip() for axes in figure.axes]
    assert titles == ["ground truth: 1 dog", "detections with score ≥ 0.5: 2 dog"]
    assert [text.get_text() for text in left.texts] == ["dog"]
    assert [text.get_text() for text in right.texts] == ["dog 70%"] * 2
    for axes in figure.axes:
        picture = axes.images[0].get_array() * 255
        assert abs(picture[25, 25] - 40).max() > 30 and abs(picture[50, 80] - 40).max() < 1
        assert len(axes.collections[-1].get_paths()) == len(axes.texts)


def test_names_and_scores_cover_neither_each_other_nor_small_objects() -> None:
    """A crowd of objects from 8 to 60 pixels: the best have names, and no text hides anything."""
    rng = np.random.default_rng(0)
    corners, sides = rng.uniform(0, 340, (60, 2)), rng.uniform(8, 60, (60, 1))
    objects = [
        ImageObject((*corner, *(corner + side)), 0, f"tree {99 - i}%", 0.99 - i / 100)
        for i, (corner, side) in enumerate(zip(corners, sides))
    ]
    figure = Figure((6, 6), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    photo: np.ndarray = np.zeros((400, 400, 3), dtype=np.uint8)
    draw_objects(axes, photo, objects, ["#ffd400"] * len(objects))
    texts = [text.get_text() for text in axes.texts]
    assert texts[0] == "tree 99%" and len(texts) > 40 and len(axes.patches) == len(texts)
    transform = axes.transData.inverted()
    places = [text.get_window_extent().transformed(transform) for text in axes.texts]
    for i, place in enumerate(places):
        low, high = sorted((place.y0, place.y1))
        assert place.x0 >= 0 and low >= -1 and place.x1 <= 400 and high <= 401
        for obj in objects:
            box = Bbox([obj.box[:2], obj.box[2:]])
            common = Bbox.intersection(place, box)
            assert common is None or abs(common.width * common.height) <= 0.32 * obj.size**2
        for other in places[:i]:
            common = Bbox.intersection(place, other)
            assert common is None or abs(common.width * common.height) < 1


def test_rle_masks_of_the_evaluator(folder: Path, tmp_path: Path) -> None:
    encoded = rle.encode(np.asfortranarray(np.eye(60, 90, dtype=np.uint8)))
    segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    results = write_results(tmp_path, [result(10, segmentation=segmentation)])
    assert len(draw_results(results, NAME, tmp_path / "out")) == 3


def test_choice_is_evenly_spread() -> None:
    records = [{"image_id": i, "annotations": [1] * (i % 5 > 0)} for i in range(50)]
    chosen = [record["image_id"] for record in spread(records, 4)]
    assert chosen == [7, 19, 32, 44]
    assert len(spread(records, 99)) == 40
    assert len(spread([{"annotations": []}] * 3, 2)) == 2


@pytest.mark.parametrize(
    "results, message",
    [
        ({"annotations": []}, "result 0.*image_id, category_id, bbox, score"),
        ([{"image_id": 10}], "result 0.*image_id, category_id, bbox, score"),
        ([result(10), result(99)], "result 1: .*image of id 99"),
        ([result(10, 4)], r"result 0: category_id 4.*\[3, 7\]"),
    ],
)
def test_bad_results(folder: Path, tmp_path: Path, results: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"results.json.*{message}"):
        load_results(write_results(tmp_path, results), NAME)


def test_bad_arguments(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.json.*coco_instances_results.json"):
        load_results(folder / "nowhere.json", NAME)
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ValueError, match="text.json' is not JSON"):
        load_results(tmp_path / "text.json", NAME)
    with pytest.raises(KeyError, match=f"--dataset.*'pictures_tset'.*did you mean '{NAME}'"):
        load_results(folder / "results.json", "pictures_tset")
    with pytest.raises(ValueError, match="--num: 0"):
        draw_results(folder / "results.json", NAME, tmp_path, num=0)
    with pytest.raises(ValueError, match="--score: 50"):
        draw_results(folder / "results.json", NAME, tmp_path, score=50)
