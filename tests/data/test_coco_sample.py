"""Twenty photos of COCO: Detectron2's own paths for COCO and its panoptic segmentation read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from PIL import Image
from prepare_coco_sample import prepare_coco_sample, stuff_labels

from fpn_plugin import add_fpn_config
from fpn_plugin.data import DatasetError, check_dataset, register_all
from fpn_plugin.paths import configs_dir

NAMES = [f"coco_sample{end}" for end in ("", "_panoptic_separated", "_panoptic_stuffonly")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any, wheel_cache: Path) -> Any:
    """The folder of all datasets, in which the names are registered anew."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(folder))
        forget()
        with pytest.raises(DatasetError, match="run `python .*prepare_coco_sample.py`"):
            check_dataset("coco_sample")
        assert prepare_coco_sample(folder, wheel_cache)
        yield folder
    forget()


def forget() -> None:
    for name in NAMES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_all()


def test_the_photos_pass_the_checks(root: Path) -> None:
    for name in NAMES[:2]:
        report = check_dataset(name, "full", masks=True, evaluation=True)
        assert (report.num_images, report.num_annotations) == (20, 293)
        records = DatasetCatalog.get(name)
        assert sum(a["iscrowd"] for r in records for a in r["annotations"]) == 10
    assert not prepare_coco_sample(root, Path("nowhere"))


def test_panoptic_fpn_trains_on_them(root: Path) -> None:
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.merge_from_file(
        str(configs_dir() / "COCO-PanopticSegmentation" / "panoptic_fpn_R_50_1x.yaml")
    )
    inputs = [DatasetMapper(cfg, True)(record) for record in DatasetCatalog.get(NAMES[1])]
    labels = set(np.unique(np.concatenate([i["sem_seg"].numpy().ravel() for i in inputs])))
    assert {0, 255} < labels and labels - {255} <= set(range(54))
    assert sum(len(i["instances"].gt_masks) for i in inputs) == 283  # without crowds
    stuff = MetadataCatalog.get(NAMES[2]).stuff_classes
    assert len(stuff) == 54 and stuff[0] == "things"


def test_stuff_labels(root: Path) -> None:
    colours = np.zeros((1, 4, 3), np.uint8)
    colours[0, 1:] = [[1, 0, 0], [0, 1, 0], [2, 0, 3]]
    segments = [(1, 1), (256, 92), (2 + 3 * 65536, 200)]  # person, banner, rug
    entries = [{"id": key, "category_id": category} for key, category in segments]
    assert stuff_labels(colours, entries).tolist() == [[255, 0, 1, 53]]
    for path in sorted((root / "coco_sample" / "panoptic_stuff").iterdir()):
        with Image.open(path) as image:
            assert image.mode == "L"
