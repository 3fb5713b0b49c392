"""What importing this plugin costs, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Callable

from fpn_plugin.benchmark.measure import Pair, time_pairs
from fpn_plugin.benchmark.timing import Lap, Plan, WallClock, Work

STARTUP = "startup"
TITLE = "Start: importing in fresh processes"
OURS, THEIRS = "import fpn_plugin", "import detectron2"
# it has the registries that the plugin registers with: nothing less can do
FLOOR = "import detectron2.modeling"
PAIRS = [Pair(OURS, other, compared=False) for other in (THEIRS, FLOOR)]


def measure_startup(plan: Plan, on_round: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Time imports of Detectron2, of its models, and of this plugin.

    `import detectron2` by itself loads torch and next to nothing else.

    Returns:
        what :func:`time_pairs` returns.
    """
    works = {line: import_work(line) for line in (THEIRS, FLOOR, OURS)}
    return time_pairs(STARTUP, works, PAIRS, WallClock(), plan, on_round)


def import_work(line: str) -> Work:
    """A fresh Python that runs one line.

    Raises:
        subprocess.CalledProcessError: when the work is run, if the line fails.
    """
    command = [sys.executable, "-W", "ignore", "-c", line]

    def work(lap: Lap) -> None:
        subprocess.run(command, capture_output=True, check=True)

    return work
