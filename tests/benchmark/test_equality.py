"""Outputs that agree, and outputs that do not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fpn_plugin.benchmark.equality import (
    BIT_EQUAL,
    DIFFERS,
    FLOAT32,
    GRADIENT,
    NOT_COMPARED,
    compare_outputs,
    matched_share,
    rounding_of,
    within_half,
)
from fpn_plugin.benchmark.inputs import Inputs
from fpn_plugin.benchmark.measure import check_outputs, section_of
from fpn_plugin.benchmark.models import BenchmarkModel

MAPS = {"p2": torch.tensor([[3.0, 4.0]]), "p3": torch.tensor([[1.0]])}


def test_differences_by_hand() -> None:
    """One of three values is off by 0.1, of 4, in maps whose root mean square is 3.5."""
    other = {"p2": torch.tensor([[3.0, 4.1]]), "p3": torch.tensor([[1.0]])}
    assert compare_outputs(MAPS, dict(MAPS)).verdict == "bit-equal"
    equality = compare_outputs(MAPS, other, depth=2000)
    assert equality.verdict == "equal within float32 rounding"
    assert equality.max_abs == pytest.approx(0.1)
    assert equality.relative == pytest.approx(0.1 / (4 + 12.5**0.5), rel=1e-5)
    assert equality.tolerance == pytest.approx(0.02, rel=2e-3)
    equality = compare_outputs(MAPS, other, depth=1000)
    assert equality.verdict == DIFFERS and "p2 is off by 1.3e-02" in equality.note


@pytest.mark.parametrize(
    "off, precision, rounding, verdict",
    [
        # root mean square: 0.02 of 5 for each 0.1; 4 epsilon of bfloat16 are 0.031, of float16 0.004
        (0.1, "bfloat16", {}, "within what bfloat16 rounds"),
        (0.1, "float16", {}, DIFFERS),
        (0.2, "bfloat16", {}, DIFFERS),
        (0.2, "bfloat16", {"p2": 0.025}, "within what bfloat16 rounds"),
        (0.2, "bfloat16", {"p2": 0.015, "p3": 0.9}, DIFFERS),  # each map has its own
        (2.0, "bfloat16", {"p2": 0.9}, DIFFERS),  # no rounding is so large
        (1e-6, "bfloat16", {}, "equal within float32 rounding"),
    ],
)
def test_what_half_precision_rounds(
    off: float, precision: str, rounding: dict[str, float], verdict: str
) -> None:
    other = {**MAPS, "p2": MAPS["p2"] + torch.tensor([[0.0, off]])}
    equality = compare_outputs(MAPS, other, precision, rounding=rounding)
    assert equality.verdict == verdict
    if verdict == within_half(precision) or verdict == DIFFERS:
        assert equality.relative == pytest.approx(off / 5, rel=1e-4)
        assert equality.rounding == max(rounding.values(), default=None)


def test_rounding_is_that_of_the_reference() -> None:
    rounded = {"p2": MAPS["p2"] * 1.01, "p3": torch.tensor([[float("inf")]])}
    assert rounding_of(MAPS, rounded) == {"p2": pytest.approx(0.01, rel=1e-5)}


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
    assert equality.verdict == DIFFERS
    assert note in equality.note


def test_gradients_have_more_room_and_are_noted() -> None:
    one, two = {GRADIENT + "x": torch.ones(1, 2)}, {GRADIENT + "x": torch.tensor([[1.0, 1.01]])}
    equality = compare_outputs(one, two)
    assert equality.verdict == FLOAT32 and equality.note == "gradients 7.1e-03"
    assert compare_outputs(one, two, depth=0.1).verdict == DIFFERS


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
    (equality,) = check_outputs(section_of(workload, wrong, inputs, trained=False), "cpu").values()
    assert equality.verdict == DIFFERS and equality.note


def test_what_a_key_of_the_pyramid_changes_is_no_fault(
    models: dict[str, BenchmarkModel], inputs: Inputs
) -> None:
    fpn = copy.deepcopy(models["fpn"])
    fpn.config.cfg.defrost()
    fpn.config.cfg.MODEL.FPN.FUSE_TYPE = "avg"
    pair = {"baseline base": models["baseline base"], "fpn": fpn}
    (equality,) = check_outputs(section_of("neck", pair, inputs, trained=False), "cpu").values()
    assert (equality.verdict, equality.note) == (NOT_COMPARED, "other MODEL.FPN.FUSE_TYPE")


def test_verdicts_of_a_report(report: dict[str, Any]) -> None:
    assert list(report["timings"]) == ["neck", "neck_train", "backbone", "inference", "train"]
    for name, section in report["timings"].items():
        rows = {(row["contestant"], row["reference"]): row for row in section["equality"]}
        assert rows["fpn", "baseline base"]["verdict"] in (BIT_EQUAL, FLOAT32), name
        assert rows["fpn", "baseline base"]["relative"] <= 1e-6, name
        half = rows["fpn [bf16]", "fpn"]
        assert half["verdict"] == "within what bfloat16 rounds", name
        assert 0 < half["rounding"] < 0.1 and half["relative"] <= half["tolerance"], name
        other = rows["bifpn", "baseline base"]
        assert (other["verdict"], other["note"]) == (NOT_COMPARED, "other weights"), name
