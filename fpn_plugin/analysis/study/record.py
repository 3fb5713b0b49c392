"""What a study writes down beside a run: its name and seed, and on what it ran for how long."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECORD = "study.json"


def read_record(folder: Path) -> dict[str, Any]:
    """What a study wrote beside a run; {} if none did."""
    path = folder / RECORD
    return json.loads(path.read_text()) if path.is_file() else {}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = (folder / RECORD).with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, folder / RECORD)
