"""Where these tests run: `pytest tests/gpu`, or `--device cpu` for a rehearsal on any machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable, Iterator

# what cuBLAS needs to be deterministic, before it is used
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest  # noqa: E402
import torch  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402
from tiny import add_masks, register, tiny_config, write_dataset  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "what tests/gpu run on (default: cuda, without which they are skipped)"
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help=text)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    # without this folder on pytest's command line the option comes too late to be parsed
    device: str = request.config.getoption("--device", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU; a rehearsal: pytest tests/gpu --device cpu")
    return device


@pytest.fixture(autouse=True)
def full_precision(device: str) -> Iterator[None]:
    """float32 has its 24 bits in convolutions too: TF32, torch's default there, has 11."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the JSON, in which every box has its rectangle as a mask."""
    path = write_dataset(tmp_path_factory.mktemp("data"))
    add_masks(path)
    register(path)
    return path


@pytest.fixture
def make_config(device: str, dataset: Path, tmp_path: Path) -> Callable[..., CfgNode]:
    """Makes configs of the tiny detector on the device, which write to this test's own folder."""
    return lambda output="run", **overrides: tiny_config(
        tmp_path / output, **{"MODEL__DEVICE": device, **overrides}
    )
