"""The models and the report that several tests look at."""

from __future__ import annotations

from typing import Any

import pytest
from benchmark_configs import write_configs

from fpn_plugin.benchmark.configs import gather_configs
from fpn_plugin.benchmark.inputs import Inputs
from fpn_plugin.benchmark.measure import Settings, benchmark
from fpn_plugin.benchmark.models import BenchmarkModel, build_models
from fpn_plugin.benchmark.timing import Plan
from fpn_plugin.report.progress import Bar

INPUTS = Inputs((64, 128), 2)
VARIANT = "bf16: MODEL.CHANNELS_LAST True SOLVER.AMP.ENABLED True"


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_configs(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="session")
def inputs() -> Inputs:
    return INPUTS


@pytest.fixture(scope="session")
def models(configs: dict[str, str]) -> dict[str, BenchmarkModel]:
    """Not to be changed."""
    files = [configs["fpn"], configs["bifpn"]]
    return build_models(gather_configs(files, [], [VARIANT], configs["base"]), INPUTS)


@pytest.fixture(scope="session")
def report(configs: dict[str, str]) -> dict[str, Any]:
    """Everything there is, on the tiny configs."""
    settings = Settings(
        files=[configs["fpn"], configs["bifpn"]],
        variants=[VARIANT],
        baseline=configs["base"],
        size=INPUTS.size,
        batch=INPUTS.batch,
        what=["counts", "neck", "neck_train", "backbone", "inference", "train"],
        plan=Plan(1, 1, 0.001, 0, max_spread=1e6),
    )
    return benchmark(settings, Bar(quiet=True))
