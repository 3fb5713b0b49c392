"""Outputs that agree, and outputs that do not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fpn_plugin.benchmark.equality import (
    DIFFERENT,
    EQUAL,
    GRADIENT,
    UNEQUAL,
    compare_outputs,
    matched_share,
)
from fpn_plugin.benchmark.inputs import Inputs
from fpn_plugin.benchmark.measure import check_outputs, section_of
from fpn_plugin.benchmark.models import BenchmarkModel

MAPS = {"p2": torch.tensor([[3.0, 4.0]]), "p3": torch.tensor([[1.0]])}


def test_differences_by_hand() -> None:
    other = {"p2": torch.tensor([[3.0, 4.1]]), "p3": torch.tensor([[1.0]])}
    equality = compare_outputs(MAPS, other, depth=2000)
    assert equality.verdict == EQUAL and equality.max_abs == pytest.approx(0.1)
    assert equality.relative == pytest.approx(0.1 / (4 + 12.5**0.5), rel=1e-5)
    assert equality.tolerance == 0.02
    equality = compare_outputs(MAPS, other, depth=1000)
    assert equality.verdict == UNEQUAL and "p2 is off by 1.3e-02" in equality.note
    equality = compare_outputs(MAPS, other, "bfloat16")
    assert equality.verdict == EQUAL and equality.relative == pytest.approx(0.1 / 25**0.5, rel=1e-4)


@pytest.mark.parametrize(
    "other, note",
    [
        ({"p2": MAPS["p2"]}, "gives ['p2'], not ['p2', 'p3']"),
        ({**MAPS, "p3": torch.ones(2, 1)}, "p3 is (2, 1), not (1, 1)"),
        ({**MAPS, "p3": torch.tensor([[float("nan")]])}, "p3 is not finite"),
    ],
)
def test_what_cannot_be_compared_is_unequal(other: Any, note: str) -> None:
    equality = compare_outputs(MAPS, other, depth=1e5)
    assert equality.verdict == UNEQUAL
    assert note in equality.note


def test_gradients_have_more_room_and_are_noted() -> None:
    one, two = {GRADIENT + "x": torch.ones(1, 2)}, {GRADIENT + "x": torch.tensor([[1.0, 1.01]])}
    equality = compare_outputs(one, two)
    assert equality.verdict == EQUAL and equality.note == "gradients 7.1e-03"
    assert compare_outputs(one, two, depth=0.1).verdict == UNEQUAL


def test_matched_share() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    one = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "classes": torch.tensor([1, 2])}
    assert matched_share(one, one) == 1
    assert matched_share(one, {**one, "classes": torch.tensor([1, 1])}) == 0.5
    assert matched_share(one, {**one, "scores": torch.tensor([0.9, 0.7])}) == 0.5
    nothing = {key: value[:0] for key, value in one.items()}
    assert matched_share(one, nothing) == 0 and matched_share(nothing, nothing) == 1


@pytest.mark.parametrize("workload", ["neck", "inference", "train"])
def test_a_wrong_neck_is_caught(
    models: dict[str, BenchmarkModel], inputs: Inputs, workload: str
) -> None:
    wrong = {name: copy.deepcopy(models[name]) for name in ("baseline base", "fpn")}
    with torch.no_grad():
        wrong["fpn"].model.backbone.fpn_output3.bias.add_(0.5)
    (equality,) = check_outputs(section_of(workload, wrong, inputs, trained=False)).values()
    assert equality.verdict == UNEQUAL and equality.note


def test_equal_and_different_by_design(report: dict[str, Any]) -> None:
    assert list(report["timings"]) == ["neck", "neck_train", "backbone", "inference", "train"]
    for name, section in report["timings"].items():
        rows = {(row["contestant"], row["reference"]): row for row in section["equality"]}
        assert rows["fpn", "baseline base"]["verdict"] == EQUAL, name
        assert rows["fpn", "baseline base"]["relative"] <= 1e-6, name
        assert rows["fpn [bf16]", "fpn"]["verdict"] == EQUAL, name
        assert rows["bifpn", "baseline base"]["verdict"] == DIFFERENT, name
