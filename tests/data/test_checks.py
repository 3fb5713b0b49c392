"""Every fault of a dataset is found, and the message names the file and the annotation."""

from __future__ import annotations

import functools
import json
import logging
import operator
import random
import re
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coco_data import config
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fpn_plugin.data import DatasetError, check_config_datasets, check_dataset, register_coco_format

Change = Callable[[dict[str, Any]], Any]
pytestmark = pytest.mark.usefixtures("registry")


def change(*path: Any, to: Any) -> Change:
    return lambda content: operator.setitem(
        functools.reduce(_get, path[:-1], content), path[-1], to
    )


def drop(*path: Any) -> Change:
    return lambda content: operator.delitem(functools.reduce(_get, path[:-1], content), path[-1])


_get = operator.getitem


ANN = ("annotations", 2)
ERRORS: dict[str, tuple[Change, str]] = {
    "no images key": (drop("images"), "'images' is missing"),
    "no annotations key": (drop("annotations"), "'annotations' is missing"),
    "no categories key": (drop("categories"), "'categories' is missing"),
    "images no list": (change("images", to={}), "'images' is a dict"),
    "annotation no object": (change(*ANN, to=7), r"annotations\[2\] is a int"),
    "id is a truth value": (change(*ANN, "id", to=True), r"annotations\[2\].*'id' is True"),
    "id is no whole number": (change(*ANN, "image_id", to=1.5), r"annotations\[2\].*is 1.5"),
    "ids of two types": (change("images", 1, "id", to="x"), "'images': some ids are numbers and"),
    "no image_id": (drop(*ANN, "image_id"), r"annotations\[2\] \(id 3\): 'image_id' is missing"),
    "image width is text": (change("images", 0, "width", to="6o"), r"images\[0\].*'width' is '6o'"),
    "no file_name": (drop("images", 0, "file_name"), "image id 1 has no 'file_name'"),
    "size zero": (change("images", 0, "height", to=0), r"'a.jpg' \(id 1\): its size is 64 x 0"),
    "missing file": (change("images", 0, "file_name", to="c.jpg"), "'c.jpg'.*does not exist"),
    "other size": (change("images", 1, "width", to=63), "'b.jpg'.* 64 x 48 .*JSON says 63 x 48"),
    "unknown category": (
        change(*ANN, "category_id", to=9),
        r"annotation 3 \(image 'a.jpg'\): category id 9 is unknown; known ids: 1, 2",
    ),
    "unknown image": (change(*ANN, "image_id", to=9), "annotation 3: image id 9 is unknown"),
    "duplicate image": (change("images", 1, "id", to=1), "image id 1 is used 2 times"),
    "duplicate category": (change("categories", 1, "id", to=1), "category id 1 is used 2 times"),
    "no category name": (drop("categories", 1, "name"), "category id 2 has no 'name'"),
    "empty category name": (change("categories", 1, "name", to=" "), "id 2 has no 'name'.*' '"),
    "image of 2**32 pixels": (change("images", 0, "width", to=10**9), "'a.jpg'.*too large"),
    "no images": (change("images", to=[]), "the dataset is empty: 'images'"),
    "no annotations": (change("annotations", to=[]), "the dataset is empty: 'annotations'"),
    "no categories": (change("categories", to=[]), "'categories' is empty"),
    "no box": (drop(*ANN, "bbox"), "annotation 3 .*'a.jpg'.*'bbox' is missing"),
    "box of three": (change(*ANN, "bbox", to=[1, 2, 3]), "annotation 3 .*'bbox' is .1, 2, 3."),
    "mask of another type": (change(*ANN, "segmentation", to="x"), "annotation 3 .*'segmentation'"),
    "ignore": (change(*ANN, "ignore", to=1), "annotation 3 .*'ignore'"),
}
WARNINGS: dict[str, tuple[Change, str]] = {
    "wholly outside": (change(*ANN, "bbox", to=[70, 4, 5, 5]), "box outside the image"),
    "partly outside": (change(*ANN, "bbox", to=[60, 4, 9, 5]), "box that reaches over"),
    "shared id": (change(*ANN, "id", to=2), "annotation that shares its id.*annotation 2"),
    "zero area": (change(*ANN, "bbox", to=[4, 4, 0, 5]), "box of zero area"),
    "negative": (change(*ANN, "bbox", to=[9, 4, -5, 5]), "box of negative size"),
    "NaN": (change(*ANN, "bbox", to=[float("nan"), 4, 5, 5]), "box that is not finite"),
    "two points": (change(*ANN, "segmentation", to=[[1, 1, 2, 2]]), "polygon of under three"),
    "odd count": (change(*ANN, "segmentation", to=[[1, 1, 2, 2, 3, 3, 4]]), "polygon of under"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_names_file_and_annotation(name: str, sound: Any, write: Any) -> None:
    apply, message = ERRORS[name]
    apply(sound)
    register_coco_format("t", *write(sound))
    with pytest.raises(DatasetError, match=message) as caught:
        check_dataset("t", masks=True)
    assert "own.json: " in str(caught.value)


@pytest.mark.parametrize("name", WARNINGS)
def test_warning_names_file_and_annotation(name: str, sound: Any, write: Any, caplog: Any) -> None:
    apply, message = WARNINGS[name]
    apply(sound)
    register_coco_format("t", *write(sound))
    with caplog.at_level(logging.WARNING, "fpn_plugin"):
        report = check_dataset("t")
    assert list(report.warnings.values()) == ([1] if name != "shared id" else [2])
    pattern = rf"own\.json: [12] × {message}.*annotation [23] \(image 'a\.jpg'\)"
    assert re.search(pattern, caplog.text), caplog.text


def test_sound_dataset(sound: Any, write: Any, caplog: Any) -> None:
    sound["annotations"][0]["bbox"] = [-0.9, 4, 65.8, 5]  # rounding, within the tolerance
    register_coco_format("t", *write(sound))
    with caplog.at_level(logging.INFO, "fpn_plugin"):
        report = check_dataset("t", masks=True)
    assert (report.num_images, report.num_annotations) == (2, 4)
    assert (report.classes, report.level, report.warnings) == (("cat", "dog"), "full", {})
    assert "every image decoded" in caplog.text


@pytest.mark.parametrize("text, message", [("{", "is not JSON"), ("[]", "holds a JSON list")])
def test_not_coco(text: str, message: str, write: Any) -> None:
    register_coco_format("t", *write(text))
    with pytest.raises(DatasetError, match=rf"own\.json: {message}"):
        check_dataset("t")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-400])


def turn(file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(file, exif=exif)


@pytest.mark.parametrize(
    "level, spoil, message",
    [
        ("full", truncate, "cannot be read to its end"),
        ("headers", truncate, ""),
        ("headers", lambda file: file.write_text("hello"), "is not an image"),
        ("headers", turn, "48 x 64 pixels .turned"),
        ("annotations", turn, ""),
    ],
)
def test_image_files(
    level: str, spoil: Callable[[Path], Any], message: str, sound: Any, write: Any
) -> None:
    json_file, images = write(sound)
    spoil(Path(images) / "b.jpg")
    register_coco_format("t", json_file, images)
    if message:
        with pytest.raises(DatasetError, match=rf"own\.json(.|\n)*'b.jpg' .*{message}"):
            check_dataset("t", level)
    else:
        assert check_dataset("t", level).level == level


def test_missing_image_folder(sound: Any, write: Any) -> None:
    register_coco_format("t", write(sound)[0], "nowhere")
    with pytest.raises(DatasetError, match="image folder .*nowhere' does not exist"):
        check_dataset("t")


def test_many_errors_are_counted_and_ten_shown(sound: Any, write: Any) -> None:
    sound["annotations"] = [{**sound["annotations"][0], "category_id": 9} for _ in range(30)]
    register_coco_format("t", *write(sound))
    with pytest.raises(DatasetError, match="30 errors") as caught:
        check_dataset("t")
    assert str(caught.value).count("  - ") == 10
    assert "and 20 more" in str(caught.value)


@pytest.mark.parametrize("train, test", [(("t",), ()), ((), ("t",))])
def test_mask_head_needs_masks(
    train: tuple[str, ...], test: tuple[str, ...], sound: Any, write: Any
) -> None:
    del sound["annotations"][2]["segmentation"]
    register_coco_format("t", *write(sound))
    cfg = config(train, test)
    assert len(check_config_datasets(cfg)) == 1
    cfg.MODEL.MASK_ON = True
    with pytest.raises(DatasetError, match="annotation 3 .*MODEL.MASK_ON"):
        check_config_datasets(cfg)


def test_test_set_may_lack_annotations(sound: Any, write: Any) -> None:
    del sound["annotations"]
    register_coco_format("t", *write(sound))
    assert check_dataset("t", training=False).num_annotations == 0


def test_off_reads_nothing() -> None:
    register_coco_format("t", "nowhere.json", "nowhere")
    assert check_dataset("t", "off").level == "off"
    with pytest.raises(ValueError, match="DATASETS.CHECK is 'on', choose from auto, full"):
        check_dataset("t", "on")


def test_config_datasets_are_checked_once(sound: Any, write: Any) -> None:
    register_coco_format("t", *write(sound))
    reports = check_config_datasets(config(("t", "t"), ("t",)))
    assert [report.name for report in reports] == ["t"]


@pytest.mark.parametrize(
    "architecture, section", [("GeneralizedRCNN", "ROI_HEADS"), ("RetinaNet", "RETINANET")]
)
def test_class_count(architecture: str, section: str, sound: Any, write: Any) -> None:
    register_coco_format("t", *write(sound))
    cfg = config(("t",))
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL[section].NUM_CLASSES = 5
    message = rf"MODEL.{section}.NUM_CLASSES is 5, but dataset t .*own.json.* has 2 .*: cat, dog"
    with pytest.raises(ValueError, match=message):
        check_config_datasets(cfg)


def test_unknown_dataset_lists_what_is_close() -> None:
    with pytest.raises(KeyError, match="'coco_2017_trian' is not registered.*coco_2017_train"):
        check_config_datasets(config(("coco_2017_trian",)))


def test_other_formats_are_skipped(caplog: Any) -> None:
    DatasetCatalog.register("t", lambda: [])
    MetadataCatalog.get("t").set(evaluator_type="pascal_voc")
    with caplog.at_level(logging.INFO, "fpn_plugin"):
        assert [report.level for report in check_config_datasets(config(("t",)))] == ["off"]
    assert "it is not in COCO's format" in caplog.text


def test_checks_are_fast_enough_for_coco_and_use_little_memory(tmp_path: Path) -> None:
    """A hundred thousand images shall take ten seconds of CPU; here a twentieth of that, in the best
    of three runs, as neighbours cost CPU time too."""
    file = tmp_path / "large.json"
    write_large(file, images=5_000, annotations=7_500, points=8)
    register_coco_format("t", str(file), str(tmp_path))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        report = check_dataset("t", "annotations", masks=True, evaluation=True)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5
    assert (report.num_images, report.num_annotations) == (5_000, 7_500)
    tracemalloc.start()
    check_dataset("t", "annotations", masks=True, evaluation=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    limit = 4 if sys.version_info >= (3, 11) else 4.5  # measured: 3.8, with Python 3.10 4.2
    assert peak < limit * file.stat().st_size


def write_large(path: Path, images: int, annotations: int, points: int) -> None:
    """Write a COCO JSON with polygons of so many points, and whitespace as in COCO's own."""
    draw = random.Random(0).random
    pictures = [
        {
            "id": i,
            "file_name": f"{i:012d}.jpg",
            "width": 640,
            "height": 480,
            "license": 3,
            "coco_url": f"http://images.cocodataset.org/train2017/{i:012d}.jpg",
        }
        for i in range(images)
    ]
    objects = []
    for i in range(annotations):
        x, y, w, h = (round(10 + draw() * 200, 2) for _ in range(4))
        outline = [round(v, 2) for _ in range(points) for v in (x + draw() * w, y + draw() * h)]
        objects.append({"id": i + 1, "image_id": i % images, "category_id": 1 + i % 80})
        objects[-1].update(bbox=[x, y, w, h], area=w * h / 2, iscrowd=0, segmentation=[outline])
    categories = [{"id": i, "name": f"c{i}"} for i in range(1, 81)]
    content = {"images": pictures, "annotations": objects, "categories": categories}
    path.write_text(json.dumps(content))
