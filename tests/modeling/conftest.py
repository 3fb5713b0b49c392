"""The dataset of the heads' tests."""

from __future__ import annotations

import pytest
from scene_data import register


@pytest.fixture(scope="session", autouse=True)
def dataset(tmp_path_factory: pytest.TempPathFactory) -> None:
    register(tmp_path_factory.mktemp("heads"))
