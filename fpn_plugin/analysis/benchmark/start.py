"""What importing this plugin costs, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from fpn_plugin.analysis.benchmark.clock import Lap, Work

_LIST = (
    "import sys, fpn_plugin;"
    "print(*(n for n in sys.modules if n.startswith('detectron2.') and n.count('.') == 1))"
)
OURS, THEIRS = "import fpn_plugin", "import detectron2, the same modules of it"


def import_works() -> dict[str, Work]:
    """Two contestants: importing the plugin, and importing what it imports of Detectron2 alone.

    `import detectron2` by itself loads next to nothing.
    """
    modules = ", ".join(["detectron2", *sorted(_python(_LIST).split())])
    codes = {THEIRS: f"import {modules}", OURS: "import fpn_plugin"}
    return {name: _work(code) for name, code in codes.items()}


def _work(code: str) -> Work:
    def work(lap: Lap) -> Any:
        return _python(code)

    return work


def _python(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
