"""What would spoil or end an evaluation is found before the training, not after it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from coco_data import config
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_lvis_instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_plugin.data import DatasetError, check_config_datasets, check_dataset, register_coco_format
from fpn_plugin.data.coco_records import read_truth
from fpn_plugin.evaluation.coco_metrics import prepare_truth

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("registry")


@pytest.mark.parametrize("train", [("t",), ()])
def test_what_the_evaluation_reads_is_filled_in(
    train: tuple[str, ...], sound: Any, write: Any, log: Any
) -> None:
    for annotation in sound["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    sound["annotations"][0]["iscrowd"] = None
    paths = write(sound)
    register_coco_format("t", *paths)
    check_config_datasets(config(train, ("t",)))
    assert "without 'area': the evaluation takes that of its mask or box" in log.text
    records = DatasetCatalog.get("t")
    assert {x.get("iscrowd", 0) for record in records for x in record["annotations"]} == {0}
    truth = prepare_truth(read_truth(paths[0])).dataset["annotations"]
    assert {annotation["iscrowd"] for annotation in truth} == {0}
    for annotation in truth:
        _, _, width, height = annotation["bbox"]
        assert annotation["area"] == pytest.approx(width * height, rel=0.1)
    with pytest.raises((KeyError, TypeError)):  # why they are filled in
        evaluate(paths[0])


@pytest.mark.parametrize("key, value", [("area", "9"), ("iscrowd", "0")])
def test_values_that_the_evaluation_cannot_use(
    key: str, value: Any, sound: Any, write: Any
) -> None:
    sound["annotations"][2][key] = value
    register_coco_format("t", *write(sound))
    with pytest.raises(DatasetError, match=f"annotation 3 .*'{key}' is {value!r}, but must be"):
        check_dataset("t", evaluation=True)


def test_sizes_may_be_texts_and_classes_without_objects_are_named(
    sound: Any, write: Any, log: Any
) -> None:
    for image in sound["images"]:
        image["width"], image["height"] = str(image["width"]), f"{image['height']}.0"
    sound["categories"].append({"id": 9, "name": "root"})
    register_coco_format("t", *write(sound))
    check_dataset("t", images="annotations")
    assert "1 of 3 classes have no object to train on, and keep an output each: root" in log.text
    assert {type(record["width"]) for record in DatasetCatalog.get("t")} == {int}


def evaluate(json_file: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
        results = [{"image_id": 1, "category_id": 1, "bbox": [4, 4, 10, 12], "score": 0.5}]
        COCOeval(truth, truth.loadRes(results), "bbox").evaluate()


ORDER = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
NAME = [{"id": 1, "name": "cat"}, {"id": 2, "name": "Dog"}]
IDS = [{"id": 3, "name": "cat"}, {"id": 2, "name": "dog"}]
MORE = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}]


@pytest.mark.parametrize(
    "categories, difference, names",
    [
        (ORDER, "class 0 is 'cat' in t and 'dog' in v", "2: dog, cat"),
        (NAME, "class 1 is 'dog' in t and 'Dog' in v", "2: cat, Dog"),
        (IDS, "class 0 is 'cat' in t and 'dog' in v", "2: dog, cat"),
        (MORE, "class 2 is no class in t and 'cow' in v", "3: cat, dog, cow"),
    ],
)
def test_categories_of_all_datasets_agree(
    categories: Any, difference: str, names: str, sound: Any, write: Any
) -> None:
    register_both(sound, write, categories)
    files = rf"own\.json has 2: cat, dog\n.*other\.json has {names}$"
    cfg = config(("t",), ("v",))
    with pytest.raises(ValueError, match=rf"{difference}:\n.*{files}"):
        check_config_datasets(cfg)
    with pytest.raises(ValueError, match=difference):
        check_config_datasets(config(("t", "v"), ()))
    cfg.DATASETS.CHECK = "off"
    assert [report.level for report in check_config_datasets(cfg)] == ["off", "off"]


def register_both(content: Any, write: Any, categories: Any) -> None:
    """Register a dataset as "t", and with other categories as "v"."""
    register_coco_format("t", *write(content))
    for i, annotation in enumerate(content["annotations"]):
        annotation["category_id"] = categories[i % 2]["id"]
    register_coco_format("v", *write({**content, "categories": categories}, "other.json"))


def test_other_ids_in_the_same_order_agree(sound: Any, write: Any) -> None:
    register_both(sound, write, [{"id": 7, "name": "dog"}, {"id": 5, "name": "cat"}])
    reports = check_config_datasets(config(("t",), ("v",)))
    assert [report.classes for report in reports] == [("cat", "dog")] * 2


def test_proposals_have_no_classes(sound: Any, write: Any) -> None:
    register_both(sound, write, ORDER)
    cfg = config(("t",), ("v",))
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    assert len(check_config_datasets(cfg)) == 2


def test_lvis_images_are_named_by_their_url_and_its_evaluation_reads_the_area(
    sound: Any, write: Any
) -> None:
    for image in sound["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image['file_name']}"
        image["file_name"] = f"COCO_val2014_{image['file_name']}"  # as LVIS v0.5 names it
    for annotation in sound["annotations"]:
        del annotation["iscrowd"]
    json_file, images = write(sound)
    folder = Path(images)
    (folder / "val2017").mkdir()
    for image_file in folder.glob("*.jpg"):
        image_file.rename(folder / "val2017" / image_file.name)
    register_lvis_instances("t", {}, json_file, f"{images}/")
    report = check_dataset("t", "full", masks=True, evaluation=True)
    assert (report.num_images, report.level) == (2, "full")
    del sound["annotations"][2]["area"]
    write(sound)
    with pytest.raises(DatasetError, match="annotation 3 .*val2017/a.jpg.*'area' is missing"):
        check_dataset("t", training=False)


def test_lvis_image_without_a_url(sound: Any, write: Any) -> None:
    register_lvis_instances("t", {}, *write(sound))
    with pytest.raises(DatasetError, match="own.json(.|\n)*image id 1: 'coco_url' is None"):
        check_dataset("t")


def test_coco_images_are_named_by_file_name(sound: Any, write: Any) -> None:
    sound["images"][0]["coco_url"] = "http://images.cocodataset.org/val2017/c.jpg"
    register_coco_format("t", *write(sound))
    assert check_dataset("t", "full").num_images == 2


def test_command_of_the_readme_checks_by_hand_whatever_the_locale(
    sound: Any, write: Any, tmp_path: Path
) -> None:
    text = (ROOT / "datasets" / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^python -c .*check_dataset.*$", text, re.MULTILINE)
    sound["categories"][0]["name"] = "K\u00e4tzchen"
    write(json.dumps(sound, ensure_ascii=False))
    (tmp_path / "my").mkdir()
    (tmp_path / "own.json").rename(tmp_path / "my" / "val.json")
    (tmp_path / "images").rename(tmp_path / "my" / "val")
    # files are ASCII by default, the output is not
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf8"}
    result = subprocess.run(
        [sys.executable, *shlex.split(line)[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        encoding="utf8",
    )
    assert result.returncode == 0, result.stderr
    assert "level='full', num_images=2" in result.stdout and "K\u00e4tzchen" in result.stdout
