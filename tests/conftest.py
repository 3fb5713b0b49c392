"""Set before torch is imported: idle OpenMP workers sleep, so that a busy machine stays usable."""

import logging
import os
import re
from pathlib import Path
from typing import Generator, Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import own_imports  # noqa: E402


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """A test of what this torch is refused for (`fpn_plugin.compat`) is skipped, saying why."""
    try:
        return (yield)
    except ValueError as error:
        if needs := re.search("needs torch [0-9.]+ or later, not", str(error)):
            pytest.skip(f"{needs[0]} {torch.__version__}")
        raise


pytest_runtest_setup = pytest_runtest_call


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let caplog see the logs, also after something in this process called `setup_logger`."""
    for name in ("fpn_plugin", "detectron2"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    # what a command's --quiet turns off is on again for the next test
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the plugin logs."""
    with caplog.at_level(logging.INFO, "fpn_plugin"):
        yield caplog


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; what is imported from it is forgotten again."""
    monkeypatch.chdir(tmp_path)
    with own_imports():
        yield tmp_path
