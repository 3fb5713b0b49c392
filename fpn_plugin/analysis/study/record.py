"""What a study writes down beside a run: its name and seed, and on what it ran for how long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fpn_plugin.engine.checkpoint import write_atomically

RECORD = "study.json"


def read_record(folder: Path) -> dict[str, Any]:
    """What a study wrote beside a run; {} if none did."""
    path = folder / RECORD
    return json.loads(path.read_text()) if path.is_file() else {}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(folder / RECORD, lambda file: file.write(text.encode()))
