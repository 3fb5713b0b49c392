"""Set before torch is imported: idle OpenMP workers sleep, so that a busy machine stays usable."""

import logging
import os
from typing import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let caplog see the logs, also after something in this process called `setup_logger`."""
    for name in ("fpn_plugin", "detectron2"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the plugin logs."""
    with caplog.at_level(logging.INFO, "fpn_plugin"):
        yield caplog
