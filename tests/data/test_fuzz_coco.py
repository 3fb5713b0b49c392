"""Any COCO JSON: it is refused by an error that names the file, or a batch of it can be made."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from fuzzing import VALUES, answer, fuzz_settings, mutated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fpn_plugin import add_fpn_config
from fpn_plugin.data import check_config_datasets, register_coco_format
from fpn_plugin.engine.data import load_training_dicts

NAME = "fuzz_coco"
SQUARE = [[4, 4, 14, 4, 14, 16, 4, 16]]
RLE = {"counts": [0, 12, 52], "size": [8, 8]}
TEXT = {"counts": "0<d1", "size": [8, 8]}  # the same, in pycocotools' text
SOUND: dict[str, Any] = {
    "info": {"year": 2020},
    "images": [
        {"id": 1, "file_name": "a.png", "width": 32, "height": 24},
        {"id": 2, "file_name": "b.png", "width": 8, "height": 8},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 10, 12], "area": 120},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [0, 0.5, 9, 9], "area": 8.5},
        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 12},
        {"id": 4, "image_id": 2, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 12},
    ],
    "categories": [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}],
}
for _annotation, _shape in zip(SOUND["annotations"], (SQUARE, SQUARE, RLE, TEXT)):
    _annotation.update(segmentation=_shape, iscrowd=int(_shape is not SQUARE))
SOUND["annotations"][0]["keypoints"] = [5, 6, 2]


@functools.lru_cache(maxsize=1)
def folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="fuzz-coco-"))
    for image in SOUND["images"]:
        pixels = np.zeros((image["height"], image["width"], 3), np.uint8)
        Image.fromarray(pixels).save(made / image["file_name"])
    return made


@pytest.fixture(autouse=True, scope="module")
def _clean() -> Iterator[None]:
    yield
    shutil.rmtree(folder())
    folder.cache_clear()


@functools.lru_cache(maxsize=2)
def config(masks: bool) -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.DATASETS.TRAIN = (NAME,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.MASK_ON = 2, masks
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (16,), 32
    return cfg


def use(text: str, masks: bool, check: str) -> None:
    """What training does: check the JSON, load it, and map every record."""
    file = folder() / "fuzz.json"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    register_coco_format(NAME, str(file), str(folder()))
    try:
        cfg = config(masks).clone()
        cfg.DATASETS.CHECK = check
        check_config_datasets(cfg)
        records = load_training_dicts(cfg)
        if check == "full":  # the others do not promise that files are as the JSON says
            mapper = DatasetMapper(cfg, is_train=True)
            assert all(mapper(record)["image"].shape[0] == 3 for record in records)
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


LIKELY = st.one_of(
    st.integers(-1, 5),
    st.sampled_from(
        [0, 1, 2, 8, 24, 32, 2**31, 2**63, 2**64, 1e9, -1e9, 0.5, "1", "a.png", "", "../a.png"]
    ),
    st.sampled_from(
        [[], {}, [[]], [1, 2, 3, 4], SQUARE, RLE, TEXT, [[1, 2], SQUARE[0]], [None] * 4]
    ),
    st.sampled_from(["0<d1", "\\", "00000", "~~~~", "é", {"counts": "", "size": [8, 8]}]),
)


ACTIONS = st.sampled_from(["replace", "replace", "replace", "drop", "double", "add"])
ADDED = st.sampled_from(["ignore", "keypoints", "segmentation", "iscrowd", "x"])


@st.composite
def documents(draw: st.DrawFn) -> Any:
    """The sound document, changed in one to three places."""
    values = st.one_of(LIKELY, LIKELY, VALUES)
    return mutated(draw, SOUND, ACTIONS, ADDED, lambda path: draw(values))


CHECKS = st.sampled_from(["full", "full", "annotations"])


@fuzz_settings(75)
@given(documents(), st.booleans(), CHECKS)
def test_any_document(document: Any, masks: bool, check: str) -> None:
    text = json.dumps(document)
    answer(lambda: use(text, masks, check), "fuzz.json", "DATASETS.TRAIN")


PIECES = st.one_of(
    st.text(max_size=4),
    st.sampled_from(
        ["[", "]", "{", "}", ",", ":", '"', "NaN", "-Infinity", "1e999", "\\u0000", "[" * 3000]
    ),
    st.sampled_from(["null", "true", "\\ud800", "9" * 5000, "-", "0.", '"images": [],', "\ufeff"]),
)


@fuzz_settings(100)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), PIECES), max_size=3), st.floats(0, 4)
)
def test_any_text(changes: list[tuple[float, int, str]], end: float) -> None:
    text = json.dumps(SOUND)
    text = text[: int(end * len(text))]  # mostly all of it
    for share, drop, piece in changes:
        start = int(share * len(text))
        text = text[:start] + piece + text[start + drop :]
    answer(lambda: use(text, True, "full"), "fuzz.json", "DATASETS.TRAIN")


def test_the_sound_document_works() -> None:
    for check in ("full", "annotations"):
        assert answer(lambda: use(json.dumps(SOUND), True, check), "fuzz.json") == "works"
