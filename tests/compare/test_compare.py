"""The report on made-up runs: its numbers, its files, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from comparing import Study, detect, evaluation, write_run, write_truth
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_plugin.cli.main import main
from fpn_plugin.compare.comparison import compare
from fpn_plugin.compare.costs import count_costs
from fpn_plugin.compare.runs import group_runs, read_runs

FILES = ["compare.html", "compare.json", "compare.md", "configs.csv", "runs.csv"]
PICTURES = ["cost", "difference_bbox", "difference_segm", "sizes_bbox", "sizes_segm"]


def report_on(folders: list[str], to: Path, **options: Any) -> dict[str, Any]:
    page = compare(folders, str(to), **{"resamples": 20, "quiet": True, **options})
    return json.loads((page.parent / "compare.json").read_text())


def test_the_metrics_are_pycocotools(study: Study) -> None:
    truth = COCO(str(study.truth))
    for number, task in ((0, "bbox"), (3, "segm")):
        results = json.loads(
            Path(study.folders[number], "inference", "coco_instances_results.json").read_text()
        )
        if task == "segm":
            for result in results:
                del result["bbox"]
        evaluation = COCOeval(truth, truth.loadRes(results), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        metrics = study.content["runs"][number]["metrics"]
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        wanted = [100 * value for value in evaluation.stats[:6]]
        assert [metrics[f"{task}/{name}"] for name in names] == pytest.approx(wanted, abs=1e-9)
        nut = evaluation.eval["precision"][:, :, 0, 0, -1]
        assert metrics[f"{task}/AP-nut"] == pytest.approx(100 * nut[nut > -1].mean())


def test_seeds_are_grouped_with_mean_and_spread(study: Study) -> None:
    fpn, pafpn = study.content["groups"]
    assert (fpn["name"], fpn["seeds"]) == ("fpn", [0, 1])
    first, second = (run["metrics"]["bbox/AP"] for run in study.content["runs"][:2])
    assert fpn["metrics"]["bbox/AP"]["mean"] == pytest.approx((first + second) / 2)
    assert fpn["metrics"]["bbox/AP"]["spread"] == pytest.approx(abs(first - second) / math.sqrt(2))
    assert pafpn["parameters"] > fpn["parameters"] > 1e6
    assert pafpn["gflops"] > fpn["gflops"] > 0
    assert study.content["differences"] == {"MODEL.FPN.TOPOLOGY": ["fpn", "pafpn"]}


def test_the_better_config_is_significant(study: Study) -> None:
    for task in ("bbox", "segm"):
        pair = study.content["pairs"][task]["pafpn"]["fpn"]
        assert pair["better"] == 1 and pair["significant"]
        assert pair["low"] < pair["value"] < pair["high"]
    text = study.content["summary"]
    assert text.startswith("Of 2 configs, pafpn has the highest box AP, ")
    assert "above fpn (95% interval" in text
    assert re.search(
        r"Seeds of one config spread by up to ±\d+\.\d in box AP and ±\d+\.\d in mask", text
    )


def test_all_files_are_there_and_say_the_same(study: Study) -> None:
    names = sorted(path.name for path in study.report.iterdir())
    assert names == sorted([*FILES, *(f"{name}.svg" for name in PICTURES)])
    with (study.report / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [run["name"] for run in runs] == [
        f"{name}/seed-{seed}" for name in ("fpn", "pafpn") for seed in (0, 1)
    ]
    for row, run in zip(runs, study.content["runs"], strict=True):
        assert float(row["segm/APs"]) == run["metrics"]["segm/APs"]
        assert row["bbox/AP@0-4"] == ""
    with (study.report / "configs.csv").open() as file:
        row, other = csv.DictReader(file)
    assert (
        float(row["bbox/AP spread"]) == study.content["groups"][0]["metrics"]["bbox/AP"]["spread"]
    )
    assert other["segm/AP against fpn verdict"] == "better"
    text = (study.report / "compare.md").read_text()
    best = f"**{study.content['groups'][1]['metrics']['bbox/AP']['mean']:.1f} ± "
    assert best in text and study.content["summary"] in text
    page = (study.report / "compare.html").read_text()
    assert page.count("<svg") == len(PICTURES) and "<script" not in page
    where = Path(study.folders[0]).parents[1]
    assert f"tensorboard --logdir {where}" in page and f"tensorboard --logdir {where}" in text


def test_size_bins_have_objects_and_a_dash_where_there_are_none(study: Study) -> None:
    assert study.content["objects"] == {"0-4": 0, "4-16": 30, "16-64": 29, "64-inf": 20}
    lines = (study.report / "compare.md").read_text().splitlines()
    start = lines.index("## Box AP by size")
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines[start + 2 :][:5]]
    assert rows[0] == ["config", "0-4"]
    assert rows[2:] == [["objects", "0"], ["fpn", "–"], ["pafpn", "–"]]


@pytest.fixture
def images() -> int:
    """Of the test set of `make`; a test that wants a verdict takes more."""
    return 6


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int) -> Any:
    """Makes a run whose boxes are off by `error`; its comparison has no pictures and no counts."""
    monkeypatch.setattr("fpn_plugin.compare.report.draw_all", lambda report: {})
    monkeypatch.setattr("fpn_plugin.compare.comparison.count_costs", lambda group: {})
    truth = tmp_path / "truth.json"
    content = write_truth(truth, images)

    def run(name: str, error: float | None = 0.3, *lines: Any, **keys: Any) -> str:
        results = None if error is None else detect(content, error)
        return write_run(tmp_path / name, truth, results, lines, **keys)

    return run


@pytest.mark.parametrize("images", [10])
def test_equal_runs_tie(make: Any, tmp_path: Path, capsys: Any) -> None:
    folders = [make("a"), make("b", MODEL__FPN__TOPOLOGY="pafpn")]
    compare(folders, str(tmp_path / "report"), resamples=20)
    text = capsys.readouterr().out
    assert "+0.00 … +0.00" in text and "50.0%" in text and "tie as shown" in text
    assert "fpn and pafpn tie for the highest box AP, " in text
    assert "One seed each" in text
    assert "**" not in (tmp_path / "report" / "compare.md").read_text()  # no number is the best


def test_few_images_have_no_winner(make: Any, tmp_path: Path, capsys: Any) -> None:
    """An AP of 0.0 against one of 1.3, as a short training gives, in six images."""
    folders = [make("a"), make("b", MODEL__FPN__TOPOLOGY="pafpn")]
    for folder, kept in zip(folders, (slice(0, 0), slice(0, 6))):
        path = Path(folder, "inference", "coco_instances_results.json")
        results = json.loads(path.read_text())
        stray = {**results[0], "bbox": [0, 0, 1, 1]}
        path.write_text(json.dumps([stray, *results[kept]]))
    compare(folders, str(tmp_path / "report"), resamples=20)
    report = json.loads((tmp_path / "report" / "compare.json").read_text())
    first, second = (group["metrics"]["bbox/AP"]["mean"] for group in report["groups"])
    assert first == 0 and 0.5 < second < 10
    pair = report["pairs"]["bbox"]["pafpn"]["fpn"]
    assert pair["low"] is pair["better"] is None and not pair["significant"]
    assert (pair["verdict"], pair["images"]) == ("too few images", 1)
    files = [tmp_path / "report" / f"compare.{kind}" for kind in ("md", "html")]
    for text in (capsys.readouterr().out, *(file.read_text() for file in files)):
        assert text.count("too few images (1 of 6 with a hit)") == 2  # summary and table
        assert "better on" not in text and "**" not in text and 'class="best' not in text
    assert "too few images (1 of 6 with a hit)" in (tmp_path / "report/configs.csv").read_text()


def test_a_test_set_without_objects_has_no_ap(make: Any, tmp_path: Path) -> None:
    truth = json.loads((tmp_path / "truth.json").read_text())
    crowds = [{**annotation, "iscrowd": 1} for annotation in truth["annotations"]]
    (tmp_path / "truth.json").write_text(json.dumps({**truth, "annotations": crowds}))
    folders = [make("a"), make("b", 0.1, MODEL__FPN__TOPOLOGY="pafpn")]
    report = report_on(folders, tmp_path / "report", size_bins=[16])
    assert report["pairs"]["bbox"]["pafpn"]["fpn"]["verdict"] == "unknown"
    text = (tmp_path / "report" / "compare.md").read_text()
    assert "nan" not in text and "**" not in text and report["summary"].startswith("No box AP")


@pytest.mark.parametrize("images", [10])
def test_a_metric_of_few_objects_has_no_best(make: Any, tmp_path: Path) -> None:
    """Large objects in one image only: the other sizes have a best config, that has none."""
    truth = json.loads((tmp_path / "truth.json").read_text())
    for annotation in truth["annotations"]:
        large = annotation["area"] > 96**2
        annotation["iscrowd"] = int(large and annotation["image_id"] > 1)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    folders = [make("a"), make("b", 0.1, MODEL__FPN__TOPOLOGY="pafpn")]
    report = report_on(folders, tmp_path / "report")
    assert report["support"]["APl"] == {"objects": 1, "images": 1}
    row = next(
        line
        for line in (tmp_path / "report" / "compare.md").read_text().splitlines()
        if line.startswith("| pafpn ") and "**" in line
    )
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[2].startswith("**") and cells[6] != "–" and not cells[7].startswith("**")


def test_another_baseline(make: Any, tmp_path: Path, capsys: Any) -> None:
    folders = [make("a"), make("b", 0.1, MODEL__FPN__TOPOLOGY="pafpn")]
    report = report_on(folders, tmp_path / "report", baseline=folders[1])
    assert report["baseline"] == "pafpn"
    assert "inconclusive" not in report["summary"]
    assert "Box AP against pafpn" in (tmp_path / "report" / "compare.md").read_text()
    assert any(note.startswith("6 test images are too few") for note in report["notes"])
    assert not any("same seed" in note for note in report["notes"])


def test_metrics_json_with_other_results_is_noted(make: Any, tmp_path: Path) -> None:
    report = report_on([make("a", 0.3, evaluation(99.0))], tmp_path / "report")
    assert any("bbox AP is 99.00 in metrics.json, but" in note for note in report["notes"])
    assert any("iteration 20 of 40" in note for note in report["notes"])


def test_as_many_detections_count_as_the_runs_may_have(tmp_path: Path) -> None:
    truth = tmp_path / "truth.json"
    content = write_truth(truth, images=2)
    ids = [(image, number) for image in (1, 2) for number in range(150)]
    content["annotations"] = [
        {**content["annotations"][0], "id": -i, "image_id": image, "iscrowd": 0}
        | {"bbox": [number % 15 * 16, number // 15 * 16, 12, 12], "area": 144}
        for i, (image, number) in enumerate(ids)
    ]
    truth.write_text(json.dumps(content))
    keys = ("image_id", "category_id", "bbox")
    results = [{**{k: a[k] for k in keys}, "score": 0.9} for a in content["annotations"]]
    metrics = [{**evaluation(100.0), "bbox/maxDets": 200.0, "bbox/AP-bolt": math.nan}]
    folder = write_run(*(tmp_path / "a", truth, results, metrics), TEST__DETECTIONS_PER_IMAGE=200)
    report = report_on([folder], tmp_path / "report")
    assert report["runs"][0]["metrics"]["bbox/AP"] == pytest.approx(100)
    assert report["runs"][0]["metrics"]["bbox/AP-bolt"] is None  # no object
    assert "bbox/maxDets" not in report["runs"][0]["metrics"]
    noted = [note for note in report["notes"] if "TEST.DETECTIONS_PER_IMAGE" in note]
    assert len(noted) == 1 and "counts 200 detections" in noted[0]


def test_without_detections_the_ap_is_that_of_metrics_json(make: Any, tmp_path: Path) -> None:
    folders = [make("a", None, evaluation(12.0)), make("b", 0.1, MODEL__FPN__TOPOLOGY="pafpn")]
    report = report_on(folders, tmp_path / "report")
    assert report["groups"][0]["metrics"]["bbox/AP"]["mean"] == 12.0
    assert "a: no detections are there; its AP is metrics.json's." in report["notes"]
    assert report["pairs"] == {}
    assert "of unknown significance" in report["summary"]


def test_without_the_truth_there_is_no_bootstrap(make: Any, tmp_path: Path) -> None:
    folders = [make("a", 0.3, evaluation(12.0))]
    (tmp_path / "truth.json").unlink()
    report = report_on(folders, tmp_path / "report")
    assert report["groups"][0]["metrics"]["bbox/AP"]["mean"] == 12.0
    assert any(note.startswith("No bootstrap, and AP from") for note in report["notes"])


@pytest.mark.parametrize(
    "detections, text",
    [
        (
            '[{"image_id": 77, "category_id": 3, "bbox": [0, 0, 9, 9], "score": 1}]',
            "1 images that the test set does not have, such as 77",
        ),
        ("[{", "no list of COCO results"),
        ("[]", "none of the runs has an AP: a"),
    ],
)
def test_detections_that_cannot_be_compared_are_refused(
    make: Any, tmp_path: Path, detections: str, text: str
) -> None:
    folder = make("a")
    Path(folder, "inference", "coco_instances_results.json").write_text(detections)
    with pytest.raises(ValueError, match=text):
        report_on([folder], tmp_path / "report")


def test_a_run_that_detected_nothing(make: Any, tmp_path: Path) -> None:
    folders = [make("a"), make("b", None, evaluation(math.nan), MODEL__FPN__TOPOLOGY="pafpn")]
    Path(folders[1], "inference", "coco_instances_results.json").write_text("[]")
    report = report_on(folders, tmp_path / "report")
    assert any(note == "b detected nothing at all." for note in report["notes"])
    assert report["groups"][1]["metrics"]["bbox/AP"]["mean"] is None
    assert " – |" in (tmp_path / "report" / "compare.md").read_text()


def test_unfinished_runs_are_listed_and_left_out(make: Any, tmp_path: Path) -> None:
    folders = [make("a"), make("b", None)]
    report = report_on(folders, tmp_path / "report")
    assert report["unfinished"] == [folders[1]]
    assert [run["name"] for run in report["runs"]] == ["a"]
    with pytest.raises(ValueError, match="none of the runs has been evaluated yet: .*b"):
        report_on(folders[1:], tmp_path / "other")


def test_a_comparison_is_not_replaced_unasked(make: Any, tmp_path: Path) -> None:
    folders, to = [make("a")], tmp_path / "report"
    report_on(folders, to)
    (to / "sizes_segm.png").write_text("of an old comparison")
    (to / "mine.png").write_text("mine")
    with pytest.raises(FileExistsError, match="holds a comparison; give --overwrite"):
        report_on(folders, to)
    report_on(folders, to, overwrite=True)
    assert not (to / "sizes_segm.png").exists()
    assert (to / "mine.png").exists()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"size_bins": [8, 4]}, r"--size-bins: \[8, 4\]"),
        ({"resamples": 0}, "--resamples 0"),
        ({"baseline": "nobody"}, "--baseline 'nobody'"),
    ],
)
def test_bad_options_are_refused(make: Any, tmp_path: Path, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        report_on([make("a")], tmp_path / "report", **options)
    assert not (tmp_path / "report").exists()


def test_a_model_that_cannot_be_built_is_compared_without_costs(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpn_plugin.compare.comparison.count_costs", count_costs)
    folder = make("a")
    config = Path(folder, "config.yaml")
    config.write_text(config.read_text() + "\nMY_OWN_KEY: 3\n")
    report = report_on([folder], tmp_path / "report")
    assert any("cannot be built here" in note and "MY_OWN_KEY" in note for note in report["notes"])
    assert "parameters" not in report["groups"][0]


def test_latencies_are_those_of_the_models_that_the_benchmark_measured(
    make: Any, tmp_path: Path
) -> None:
    fpn, pafpn = folders = [make("a"), make("b", 0.1, MODEL__FPN__TOPOLOGY="pafpn")]
    contestants = {
        "one": {"config": f"{fpn}/config.yaml", "overrides": []},
        "two": {"config": f"{pafpn}/config.yaml", "overrides": ["SOLVER.AMP.ENABLED", "True"]},
        "three": {"config": "gone.yaml", "overrides": []},
    }
    bench = {
        "contestants": contestants,
        "settings": {"size": [480, 640], "batch": 1},
        "machine": {"cpu": "Zuse Z3", "date": "1941-05-12T00:00:00+00:00"},
        "timings": {"neck": {"times": {name: {"seconds": 0.25} for name in contestants}}},
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench))
    report = report_on(folders, tmp_path / "report", benchmark=str(path))
    assert [group.get("seconds") for group in report["groups"]] == [0.25, None]
    assert report["latency"] == "neck of an image of 480 × 640 on Zuse Z3, 1941-05-12"
    assert any("did not measure the model of pafpn" in note for note in report["notes"])
    assert any("three is left out" in note for note in report["notes"])
    bench["timings"]["neck"]["times"]["one"]["verdict"] = "too wide"
    path.write_text(json.dumps(bench))
    report = report_on(folders, tmp_path / "refused", benchmark=str(path))
    assert report["groups"][0]["seconds"] is None
    assert any("the time of one was refused" in note for note in report["notes"])
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no report.json of `fpn benchmark`"):
        report_on(folders, tmp_path / "other", benchmark=str(path))


def test_the_tool(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    to = str(tmp_path / "report")
    arguments = [make("a"), "--report", to, "--size-bins", "16,64.5", "--resamples", "9", "--quiet"]
    main(["compare", *arguments])
    assert capsys.readouterr().out.strip() == f"The comparison is in {to}/compare.html"
    report = json.loads(Path(to, "compare.json").read_text())
    assert list(report["objects"]) == ["0-16", "16-64.5", "64.5-inf"]
    # one run alone is fine
    assert report["pairs"] == {}
    assert report["summary"].startswith("There is one config with a box AP, a: ")


def test_a_mean_does_not_leave_out_a_seed_that_detected_nothing(make: Any, tmp_path: Path) -> None:
    folders = [make("a", SEED=0), make("b", None, evaluation(math.nan), SEED=1)]
    report = report_on(folders, tmp_path / "report")
    assert report["groups"][0]["metrics"]["bbox/AP"] == {"mean": None, "spread": None}
    assert report["summary"].startswith("No box AP is known.")


def test_seeds_that_were_not_set_are_several(make: Any, tmp_path: Path) -> None:
    seeds = {"a": -1, "b": -1, "c": 3, "d": 3}
    folders = [make(name, 0.1 + 0.1 * (name == "b"), SEED=seed) for name, seed in seeds.items()]
    report = report_on(folders[:2], tmp_path / "report")
    assert "Seeds of one config spread by up to ±" in report["summary"]
    assert not any("same seed" in note for note in report["notes"])
    report = report_on(folders, tmp_path / "other")
    assert [note for note in report["notes"] if "same seed" in note] == [
        "a: 2 runs have the same seed, 3."
    ]


@pytest.mark.parametrize("images", [10])
def test_many_configs_have_a_row_for_each_value(make: Any, tmp_path: Path) -> None:
    kinds = ("fpn", "pafpn", "bifpn", "channel_mapper", "top_down", "panet")
    repeats = (1, 1, 2, 1, 1, 1)
    folders = [
        make(kind, MODEL__FPN__TOPOLOGY=kind, MODEL__FPN__REPEATS=times)
        for kind, times in zip(kinds, repeats, strict=True)
    ]
    report_on(folders, tmp_path / "report", baseline=folders[1])
    lines = (tmp_path / "report" / "compare.md").read_text().splitlines()
    start = lines.index("## What the configs differ in")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start + 4 :][:8]]
    assert rows[:2] == [
        ["MODEL.FPN.REPEATS", "1", "REPEATS 1 + pafpn and 4 others"],
        ["", "2", "REPEATS 2 + bifpn"],
    ]
    assert rows[2] == ["MODEL.FPN.TOPOLOGY", "pafpn", "REPEATS 1 + pafpn"]
    assert rows[3] == ["", "fpn", "REPEATS 1 + fpn"]
    start = lines.index("## Box AP: how often the row is better than the column")
    assert [cell.strip() for cell in lines[start + 2].split("|")[1:-1]][1:] == list("123456")


def test_a_single_level_is_counted(make: Any, tmp_path: Path) -> None:
    single = {
        "MODEL__BACKBONE__NAME": "build_bottom_up_backbone",
        "MODEL__RPN__IN_FEATURES": ["res4"],
        "MODEL__ROI_HEADS__IN_FEATURES": ["res4"],
        "MODEL__ANCHOR_GENERATOR__SIZES": [[32, 64]],
    }
    counts = count_costs(group_runs(read_runs([make("a", **single)]))[0])
    assert counts["parameters"] > 1e6 and counts["gflops"] > 0
