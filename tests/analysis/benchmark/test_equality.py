"""Outputs that agree, and outputs that do not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fpn_plugin.analysis.benchmark.contestants import gather
from fpn_plugin.analysis.benchmark.entrants import Entrant, build_all
from fpn_plugin.analysis.benchmark.equality import (
    DIFFERENT,
    EQUAL,
    GRADIENT,
    UNEQUAL,
    compare_outputs,
    matched_share,
)
from fpn_plugin.analysis.benchmark.inputs import Inputs
from fpn_plugin.analysis.benchmark.lineup import line_up
from fpn_plugin.analysis.benchmark.section import check

MAPS = {"p2": torch.tensor([[3.0, 4.0]]), "p3": torch.tensor([[1.0]])}


def test_differences_by_hand() -> None:
    other = {"p2": torch.tensor([[3.0, 4.1]]), "p3": torch.tensor([[1.0]])}
    found = compare_outputs(MAPS, other, depth=2000)
    assert found.verdict == EQUAL and found.max_abs == pytest.approx(0.1)
    assert found.relative == pytest.approx(0.1 / (4 + 12.5**0.5), rel=1e-5)
    assert found.tolerance == 0.02
    found = compare_outputs(MAPS, other, depth=1000)
    assert found.verdict == UNEQUAL and "p2 is off by 1.3e-02" in found.note
    found = compare_outputs(MAPS, other, "bfloat16")
    assert found.verdict == EQUAL and found.relative == pytest.approx(0.1 / 25**0.5, rel=1e-4)


@pytest.mark.parametrize(
    "other, note",
    [
        ({"p2": MAPS["p2"]}, "gives ['p2'], not ['p2', 'p3']"),
        ({**MAPS, "p3": torch.ones(2, 1)}, "p3 is (2, 1), not (1, 1)"),
        ({**MAPS, "p3": torch.tensor([[float("nan")]])}, "p3 is not finite"),
    ],
)
def test_what_cannot_be_compared_is_unequal(other: Any, note: str) -> None:
    found = compare_outputs(MAPS, other, depth=1e5)
    assert found.verdict == UNEQUAL
    assert note in found.note


def test_gradients_have_more_room_and_are_told() -> None:
    one, two = {GRADIENT + "x": torch.ones(1, 2)}, {GRADIENT + "x": torch.tensor([[1.0, 1.01]])}
    found = compare_outputs(one, two)
    assert found.verdict == EQUAL and found.note == "gradients 7.1e-03"
    assert compare_outputs(one, two, depth=0.1).verdict == UNEQUAL


def test_matched_share() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    one = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "classes": torch.tensor([1, 2])}
    assert matched_share(one, one) == 1
    assert matched_share(one, {**one, "classes": torch.tensor([1, 1])}) == 0.5
    assert matched_share(one, {**one, "scores": torch.tensor([0.9, 0.7])}) == 0.5
    nothing = {key: value[:0] for key, value in one.items()}
    assert matched_share(one, nothing) == 0 and matched_share(nothing, nothing) == 1


@pytest.fixture(scope="module")
def entrants(configs: dict[str, str]) -> dict[str, Entrant]:
    files = [configs["fpn"], configs["bifpn"]]
    return build_all(gather(files, baseline=configs["base"]), Inputs((64, 96), 2))


def checked(entrants: dict[str, Entrant], section: str) -> dict[tuple[str, str], Any]:
    lineup = line_up(section, entrants, [], Inputs((64, 96), 2), False, False)
    found = check(lineup)
    return {(pair.contestant, pair.reference): equality for pair, equality in found.items()}


@pytest.mark.parametrize("section", ["neck", "neck_train", "backbone", "inference", "train"])
def test_ours_equals_the_baseline_and_another_pyramid_differs_by_design(
    entrants: dict[str, Entrant], section: str
) -> None:
    found = checked(entrants, section)
    assert found["fpn", "baseline base"].verdict == EQUAL
    assert found["fpn", "baseline base"].relative <= 1e-6
    assert found["bifpn", "baseline base"].verdict == DIFFERENT


@pytest.mark.parametrize("section", ["neck", "inference", "train"])
def test_a_wrong_neck_is_caught(entrants: dict[str, Entrant], section: str) -> None:
    wrong = {name: copy.deepcopy(one) for name, one in entrants.items() if name != "bifpn"}
    with torch.no_grad():
        wrong["fpn"].model.backbone.fpn_output3.bias.add_(0.5)
    found = checked(wrong, section)["fpn", "baseline base"]
    assert found.verdict == UNEQUAL and found.note
