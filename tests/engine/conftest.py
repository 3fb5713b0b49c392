"""Fixtures: the tiny dataset, registered, and configs of the tiny detector."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Callable, Iterator

import pytest
import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.data import build as data_build
from tiny import register, tiny_config, write_dataset

from fpn_plugin.engine import setup as engine_setup


@pytest.fixture
def log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    """What the plugin logs, without the handlers that setup() would leave in this process."""
    for name in ("setup_logger", "set_up_logger"):
        monkeypatch.setattr(engine_setup, name, lambda *args, **kwargs: None)
    caplog.set_level("INFO")
    return caplog


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the JSON."""
    path = write_dataset(tmp_path_factory.mktemp("data"))
    register(path)
    return path


@pytest.fixture(scope="session")
def unbroken(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `crash_child.OVERRIDES` that nothing disturbed."""
    from crash_child import OVERRIDES, Child  # not for every test: it loads the trainer

    folder = tmp_path_factory.mktemp("unbroken") / "run"
    child = Child(str(dataset), str(folder), OVERRIDES)
    assert child.end() == 0, child.error
    return folder


@pytest.fixture
def one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any Detectron2 gives the images in the same order.

    Its republication's sampler draws a seed, upstream's takes that of the config.
    """
    sampler = data_build.TrainingSampler
    monkeypatch.setattr(data_build, "TrainingSampler", lambda size, **_: sampler(size))


@pytest.fixture
def quick_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`launch` forks its processes from the server of `crash_child`, and so spares the imports."""
    import crash_child  # noqa: F401  it says what the server has imported

    start = functools.partial(mp.start_processes, start_method="forkserver")
    monkeypatch.setattr(mp, "start_processes", start)


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    """Nothing that a test started runs on after it."""
    yield
    if crash_child := sys.modules.get("crash_child"):
        crash_child.stop_children()


@pytest.fixture
def make_config(dataset: Path, tmp_path: Path) -> Callable[..., CfgNode]:
    """Makes tiny configs that write to this test's own folder."""
    return lambda output="run", **overrides: tiny_config(tmp_path / output, **overrides)
