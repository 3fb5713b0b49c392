"""Study files: what they say, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fpn_plugin.study.config import read_study
from fpn_plugin.study.plan import plan_runs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = {"c4", "c5", "channel_mapper", "fpn", "fpn-avg", "fpn-concat", "fpn-fast_normalized"}
NAMES |= {"fpn-carafe", "pafpn", "bifpn", "nas_fpn"}
MORE = {"fpn-freq", "fpn-dysample", "csp_pan", "hybrid", "dyhead", "fpn-p3"}


def write(folder: Path, **values: Any) -> Path:
    (folder / "base.yaml").write_text("VERSION: 2\n")
    content = {"output": "out", "base": "base.yaml", "runs": {"a": {}}, **values}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


def test_overrides_of_the_command_line_come_last_and_those_of_all_runs_first(
    tmp_path: Path,
) -> None:
    (tmp_path / "other.yaml").write_text("VERSION: 2\n")
    runs = {
        "a": {},
        "b": {"config": "other.yaml", "SEED": 3, "INPUT.FORMAT": "RGB"},
        "c": {"overrides": {"MODEL.RPN.IN_FEATURES": ["p2", "p3"]}},
        "d": {"DATASETS.OWN.VAL_JSON": "my/val.json"},
    }
    shared = {"SEED": 1, "VIS_PERIOD": 5}
    path = write(tmp_path, runs=runs, overrides=shared, seeds=[4, 2], size_bins=[8, 16.5])
    study = read_study(path, ["VIS_PERIOD", "7"])
    a, b, c, d = study.configs
    assert (study.seeds, study.size_bins, study.baseline) == ((4, 2), (8, 16.5), "")
    assert study.keep_checkpoints
    assert (a.name, a.file) == ("a", (tmp_path / "base.yaml").resolve())
    assert a.overrides == ("SEED", "1", "VIS_PERIOD", "7")
    assert b.file == (tmp_path / "other.yaml").resolve()
    assert b.overrides == ("SEED", "3", "VIS_PERIOD", "7", "INPUT.FORMAT", "RGB")
    assert d.overrides[-1] == str(tmp_path / "my" / "val.json")  # relative to the study file
    assert c.overrides[-2:] == ("MODEL.RPN.IN_FEATURES", "['p2', 'p3']")


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"sedes": [1]}, KeyError, "study.yaml: unknown name 'sedes' .did you mean 'seeds'"),
        ({"output": None}, ValueError, "study.yaml: output is missing"),
        ({"output": 3}, ValueError, "study.yaml: output: 3 is no text"),
        ({"runs": {}}, ValueError, "study.yaml: runs is missing"),
        ({"runs": ["a"]}, ValueError, r"runs: \['a'\] is no mapping"),
        ({"runs": {"../a": {}}}, ValueError, "runs.../a: '../a' is no name of a folder"),
        ({"runs": {"report": {}}}, ValueError, "runs.report: 'report' is no name of a folder"),
        ({"runs": {"a": {"config": "no.yaml"}}}, ValueError, "runs.a.config: 'no.yaml': there is"),
        ({"runs": {"a": {"MODEL.X": None}}}, ValueError, "runs.a.MODEL.X: None is no value"),
        ({"runs": {"a": {"x y": 1}}}, ValueError, "runs.a.x y: 1 is no value for a config key"),
        ({"runs": {"a": {"overrides": {}, "SEED": 1}}}, KeyError, "runs.a: unknown name 'SEED'"),
        ({"base": None}, ValueError, "base: None is no path"),
        ({"base": "gone.yaml"}, ValueError, "base: 'gone.yaml': there is no file /"),
        ({"seeds": []}, ValueError, r"seeds: \[\] is no list of different seeds"),
        ({"seeds": [1, 1]}, ValueError, r"seeds: \[1, 1\] is no list of different seeds"),
        ({"seeds": [-1]}, ValueError, r"seeds: \[-1\] is no list"),
        ({"seeds": [True]}, ValueError, r"seeds: \[True\] is no list"),
        ({"seeds": 3}, ValueError, "seeds: 3 is no list"),
        ({"size_bins": [16, 8]}, ValueError, "size_bins: .16, 8. is no list of growing"),
        ({"size_bins": [0, 8]}, ValueError, "size_bins: .0, 8. is no list of growing sizes above"),
        ({"baseline": "b"}, KeyError, "study.yaml: baseline: unknown name 'b'; choose from: a"),
        ({"keep_checkpoints": "no"}, ValueError, "keep_checkpoints: 'no' is no boolean"),
        ({"keep_checkpoints": 1}, ValueError, "keep_checkpoints: 1 is no boolean"),
    ],
)
def test_a_mistake_is_named(
    tmp_path: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_study(write(tmp_path, **values))


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "runs: {a: {}, a: {}}",
            "study.yaml: has a key twice, line 1: runs.a is there already, in line 1",
        ),
        ("- 1", "study.yaml: holds a list, not keys with values"),
        ("runs: [", "study.yaml: is no plain YAML, line 1"),
    ],
)
def test_a_broken_file_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_study(path)
    with pytest.raises(FileNotFoundError, match="the study .*there is no file"):
        read_study(tmp_path / "gone.yaml")


def test_a_merge_may_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text("output: o\nbase: base.yaml\nruns:\n  a: &a {K: 1}\n  b: {<<: *a, K: 2}\n")
    assert [config.overrides for config in read_study(path).configs] == [("K", "1"), ("K", "2")]


@pytest.mark.parametrize("name", ["trees", "cells", "scenes"])
def test_the_studies_have_equal_schedules_and_data(name: str) -> None:
    runs = plan_runs(read_study(CONFIGS / "studies" / f"{name}.yaml"))
    names = NAMES if name == "scenes" else NAMES | MORE
    assert {run.config.name for run in runs} == names
    assert [run.seed for run in runs[:: len(names)]] == [0, 1, 2]
    first = runs[0].cfg
    for run in runs:
        for key in ("SOLVER", "DATASETS", "DATALOADER", "INPUT", "TEST"):
            assert run.cfg[key] == first[key]
        assert run.cfg.MODEL.BOTTOM_UP == first.MODEL.BOTTOM_UP
        assert run.cfg.MODEL.FPN.OUT_CHANNELS == first.MODEL.FPN.OUT_CHANNELS
        assert run.cfg.MODEL.MASK_ON == (name != "trees")
        assert run.cfg.SOLVER.FUSED and run.cfg.MODEL.FAST_ROI_ALIGN and run.cfg.TEST.FOLD_NORMS
        assert run.cfg.SEED == run.seed


@pytest.mark.parametrize(
    "values, only, error, message",
    [
        ({}, ["b"], KeyError, "--only: unknown name 'b'; choose from: a"),
        ({"runs": {"a": {"MODEL.FPN.FUSE": 1}}}, [], ValueError, "runs.a: .*did you mean 'MODEL"),
        ({"runs": {"a": {"SEED": 1}}}, [], ValueError, "runs.a: SEED is the study's to set"),
        ({}, [], ValueError, "runs.a: DATASETS.TEST is empty"),
    ],
)
def test_a_config_that_cannot_be_trained_is_named(
    tmp_path: Path, values: dict[str, Any], only: list[str], error: type[Exception], message: str
) -> None:
    shared = {"DATASETS.TRAIN": ["trees_train"], "DATASETS.TEST": []}
    study = read_study(write(tmp_path, overrides=shared, **values))
    with pytest.raises(error, match=message):
        plan_runs(study, only)


def test_runs_that_are_tested_on_other_data_are_refused_before_they_are_trained(
    tmp_path: Path,
) -> None:
    runs = {"a": {}, "b": {"DATASETS.TEST": ["scenes_val"]}}
    shared = {"DATASETS.TRAIN": ["trees_train"], "DATASETS.TEST": ["trees_val"]}
    study = read_study(write(tmp_path, overrides=shared, runs=runs))
    with pytest.raises(ValueError, match="runs.a on trees_val, runs.b on scenes_val"):
        plan_runs(study)
    assert len(plan_runs(study, ["b"])) == 1
