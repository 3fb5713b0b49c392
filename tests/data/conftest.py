"""Fixtures: the tiny dataset of `coco_data`, and the downloads, made once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coco_data import SOUND, write_coco
from helpers import own_datasets

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "wheels"


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
def write(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """A function that writes a JSON file and the images of `SOUND`, and returns their paths."""
    return lambda content, name="own.json": write_coco(tmp_path, content, name)
