"""A detector on every bottom-up network: one training step and one evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from networks import CASES, Case
from runs import check_run, config

HEADS = ("mask_rcnn", "retinanet", "fcos")


@pytest.mark.parametrize("number, case", enumerate(CASES), ids=map(str, CASES))
def test_one_step_and_one_evaluation(
    number: int, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heads take turns; a network of one map goes with the simple pyramid."""
    head = HEADS[number % len(HEADS)]
    maps = [name for name in case.maps if head == "mask_rcnn" or name != "res2"]
    keys = {"MODEL.BOTTOM_UP.NAME": case.name, "MODEL.FPN.IN_FEATURES": maps}
    keys |= {f"MODEL.BOTTOM_UP.ARGS.{name}": value for name, value in case.args.items()}
    keys |= {f"MODEL.{name}": value for name, value in case.keys.items()}
    pyramid = "simple" if len(maps) == 1 else "fpn"
    flat = [part for pair in keys.items() for part in pair]
    check_run(head, config(head, pyramid, tmp_path, *flat), monkeypatch)
