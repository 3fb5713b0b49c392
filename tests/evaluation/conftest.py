"""The scenes with masks and keypoints."""

from __future__ import annotations

import pytest
from scene_data import register


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> None:
    register(tmp_path_factory.mktemp("scenes"))
