"""Folders become runs, runs become groups with names, and what differs is found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from comparing import write_run

from fpn_plugin.compare.runs import (
    Group,
    config_differences,
    find_group,
    group_runs,
    read_runs,
)

AP = {"iteration": 40, "bbox/AP": 30.0, "bbox/APs": float("nan")}


def differences(groups: list[Group]) -> dict[str, list[Any]]:
    return config_differences([group.runs for group in groups])


@pytest.fixture
def make(tmp_path: Path) -> Any:
    truth = tmp_path / "truth.json"
    truth.write_text("{}")
    return lambda name, *lines, **keys: write_run(
        tmp_path / name, truth, None, lines or (AP,), **keys
    )


def test_a_run_is_read(make: Any) -> None:
    folder = make("a", {"iteration": 9, "total_loss": 2.0}, {"iteration": 20, "bbox/AP": 3.0}, AP)
    with open(Path(folder, "metrics.json"), "a") as file:
        file.write('{"iteration": 49, "total_lo')  # a run that is at work
    run = read_runs([folder])[0]
    assert (run.name, run.seed, run.iteration, run.max_iterations) == ("a", 7, 40, 40)
    assert run.curves == {"bbox": {20: 3.0, 40: 30.0}}
    assert run.metrics["bbox/AP"] == 30.0 and math.isnan(run.metrics["bbox/APs"])
    assert run.results is None and run.is_evaluated


def test_of_several_test_sets_it_is_the_first(make: Any) -> None:
    line = {"iteration": 40, "trees_val/bbox/AP": 4.0, "scenes_val/bbox/AP": 5.0}
    folder = make("a", line, DATASETS__TEST=("trees_val", "scenes_val"))
    inner = Path(folder, "inference", "trees_val")
    inner.mkdir()
    (inner / "coco_instances_results.json").write_text("[]")
    run = read_runs([folder])[0]
    assert (run.dataset, run.metrics) == ("trees_val", {"bbox/AP": 4.0})
    assert run.results == inner / "coco_instances_results.json"


def test_folders_that_are_no_run_or_given_twice_are_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"RUN_DIR '{tmp_path}' has no config.yaml"):
        read_runs([str(tmp_path)])
    folder = make("a")
    with pytest.raises(ValueError, match="given twice"):
        read_runs([folder, f"{folder}/"])


def test_other_test_sets_are_refused_and_named(make: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    folders = [make("a"), make("b", DATASETS__OWN__VAL_JSON=str(other))]
    with pytest.raises(ValueError, match=r"a on own_val .*truth.json; .*b on own_val .*other.json"):
        read_runs(folders)
    with pytest.raises(ValueError, match="b2 on trees_val"):
        read_runs([folders[0], make("b2", DATASETS__TEST=("trees_val",))])


def test_seeds_and_the_place_where_it_runs_make_no_other_config(make: Any) -> None:
    folders = [
        make("a/seed-0", SEED=0),
        make("a/seed-1", SEED=1, DATALOADER__NUM_WORKERS=1, TEST__SIZE_BINS=[8]),
    ]
    groups = group_runs(read_runs(folders))
    assert [group.name for group in groups] == ["a"]
    assert [run.seed for run in groups[0].runs] == [0, 1]
    assert differences(groups) == {}


def test_groups_are_called_by_what_differs_where_that_is_short(make: Any) -> None:
    folders = [
        make("a/seed-0", SEED=0),
        make("b/seed-0", SEED=0, MODEL__FPN__TOPOLOGY="pafpn"),
        make("a/seed-1", SEED=1),
    ]
    groups = group_runs(read_runs(folders))
    assert [group.name for group in groups] == ["fpn", "pafpn"]
    assert [[run.name for run in group.runs] for group in groups] == [
        ["a/seed-0", "seed-1"],
        ["b/seed-0"],
    ]
    assert differences(groups) == {"MODEL.FPN.TOPOLOGY": ["fpn", "pafpn"]}


@pytest.mark.parametrize(
    "overrides, names",
    [
        (
            {"MODEL__FPN__REPEATS": 2, "MODEL__FPN__NORM": "GN"},
            ["NORM none + REPEATS 1", "GN + REPEATS 2"],
        ),
        ({"MODEL__WEIGHTS": "some/r18.pth"}, ["WEIGHTS none", "r18.pth"]),
        # much differs: by their folders
        (
            {"MODEL__FPN__REPEATS": 2, "SOLVER__BASE_LR": 0.5, "MODEL__RPN__NMS_THRESH": 0.6},
            ["x.1", "x.2"],
        ),
    ],
)
def test_names_of_groups(make: Any, overrides: dict[str, Any], names: list[str]) -> None:
    groups = group_runs(read_runs([make("x.1/seed-0"), make("x.2/seed-0", **overrides)]))
    assert [group.name for group in groups] == names
    assert list(differences(groups)) == sorted(key.replace("__", ".") for key in overrides)


def test_an_evaluation_has_its_runs_start_and_may_lie_alone(make: Any) -> None:
    run = make("a", SEED=3, MODEL__WEIGHTS="r18.pth")
    again = make("a/eval-1", SEED=4, MODEL__WEIGHTS=f"{run}/model_final.pth", DATASETS__TRAIN=())
    folded = make("a/eval-2", MODEL__WEIGHTS=f"{run}/model_final.pth", TEST__FOLD_NORMS=True)
    runs = read_runs([run, again, folded])
    assert [run.name for run in runs] == ["a", "a/eval-1", "a/eval-2"]
    groups = group_runs(runs)
    assert list(differences(groups)) == ["TEST.FOLD_NORMS"]
    assert [len(group.runs) for group in groups] == [2, 1]
    assert runs[1].seed == 3


def test_a_key_that_is_newer_than_a_run_has_its_default(make: Any) -> None:
    folders = [make("a"), make("b")]
    config = Path(folders[1], "config.yaml")
    text = config.read_text()
    assert "FOLD_NORMS: false" in text
    config.write_text(text.replace("  FOLD_NORMS: false\n", ""))
    assert len(group_runs(read_runs(folders))) == 1


def test_a_group_is_found_by_name_or_folder(make: Any) -> None:
    groups = group_runs(read_runs([make("a"), make("b", MODEL__FPN__TOPOLOGY="pafpn")]))
    assert find_group("pafpn", groups) is groups[1]
    assert find_group(str(groups[0].runs[0].folder), groups) is groups[0]
    with pytest.raises(ValueError, match="--baseline 'bifpn' .*'fpn', 'pafpn'"):
        find_group("bifpn", groups)


def test_groups_are_called_as_their_study_calls_them(make: Any) -> None:
    def names(*configs: str) -> list[str]:
        for folder, name in zip(folders, configs):
            Path(folder, "study.json").write_text(json.dumps({"name": name}))
        return [group.name for group in group_runs(read_runs(folders))]

    folders = [make("a"), make("b", MODEL__FPN__TOPOLOGY="pafpn")]
    assert names("mine") == ["fpn", "pafpn"]
    assert names("mine", "other") == ["mine", "other"]
    assert names("mine", "mine") == ["fpn", "pafpn"]  # two studies with one name for two configs
    folders = [make("c"), make("d")]
    assert names("mine", "same") == ["mine + same"]  # two names for one config
