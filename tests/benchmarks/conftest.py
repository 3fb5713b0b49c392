"""The tiny configs that are measured."""

from __future__ import annotations

import pytest
from benchmark_configs import write_configs


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_configs(tmp_path_factory.mktemp("benchmark"))
