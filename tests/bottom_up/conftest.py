"""Fixtures: what the plugin logs."""

from __future__ import annotations

import logging
from typing import Iterator

import pytest


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "fpn_plugin"):
        yield caplog
