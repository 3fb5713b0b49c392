"""What all command lines have in common."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TOOLS = [
    path
    for path in sorted((Path(__file__).parents[2] / "tools").glob("*.py"))
    if re.search(r"^(import|from) (torch|detectron2|fpn_plugin)\b", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_threads_are_told_to_sleep_before_torch_is_imported(path: Path) -> None:
    before = path.read_text().partition('os.environ.setdefault("OMP_WAIT_POLICY", "passive")')
    assert before[1] and re.findall(r"^(?:import|from) (\w+)", before[0], re.MULTILINE) == ["os"]
