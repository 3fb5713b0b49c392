"""Datasets for the tests: a tiny sound one in COCO's format, and the downloads, made once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import own_datasets
from PIL import Image

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "wheels"

SOUND: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 64, "height": 48},
        {"id": 2, "file_name": "b.jpg", "width": 64, "height": 48},
    ],
    "annotations": [
        {
            "id": i + 1,
            "image_id": 1 + i % 2,
            "category_id": 1 + i % 2,
            "bbox": [4 + i, 4, 10, 12],
            "area": 120,
            "iscrowd": 0,
            "segmentation": [[4 + i, 4, 14 + i, 4, 14 + i, 16, 4 + i, 16]],
        }
        for i in range(4)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}


@pytest.fixture(scope="session")
def wheel_cache() -> Path:
    """Downloads survive the session in a git-ignored folder; their hash is checked at every use."""
    return CACHE


@pytest.fixture
def registry() -> Iterator[None]:
    """Forget the datasets that a test registers."""
    with own_datasets():
        yield


@pytest.fixture
def sound() -> dict[str, Any]:
    return copy.deepcopy(SOUND)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], tuple[str, str]]:
    """Return a function that writes a JSON file and the pictures of ``SOUND``, and their paths."""

    def _write(content: Any) -> tuple[str, str]:
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        for image in SOUND["images"]:
            Image.fromarray(pixels).save(images / image["file_name"])
        path = tmp_path / "own.json"
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        return str(path), str(images)

    return _write
