"""What importing this plugin costs, in fresh processes."""

from __future__ import annotations

import subprocess
import sys

from fpn_plugin.analysis.benchmark.clock import Lap, Work

OURS, THEIRS = "import fpn_plugin", "import detectron2"
# The registries that the plugin enters its parts into are there: it can take no less
FLOOR = "import detectron2.modeling"
START_PAIRS = [(OURS, THEIRS), (OURS, FLOOR)]


def import_works() -> dict[str, Work]:
    """Three contestants by the line that they run: Detectron2, its models, and this plugin.

    `import detectron2` by itself loads torch and next to nothing else.
    """
    return {code: _work(code) for code in (THEIRS, FLOOR, OURS)}


def _work(code: str) -> Work:
    command = [sys.executable, "-W", "ignore", "-c", code]

    def work(lap: Lap) -> None:
        subprocess.run(command, capture_output=True, check=True)

    return work
