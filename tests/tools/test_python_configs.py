"""Every tool takes a Python config, and the folder of a run of one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Iterator

import pytest
from PIL import Image
from tiny import TRAIN, VAL, register, write_dataset

from fpn_plugin.checkpoint.run_folder import recorded_config
from fpn_plugin.cli import train
from fpn_plugin.cli.main import main
from fpn_plugin.compare import costs
from fpn_plugin.engine import lazy
from fpn_plugin.study.config import read_study
from fpn_plugin.study.plan import DONE, plan_runs

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "lazy" / "faster_rcnn_trees_FPN.py"
OVERRIDES = [
    "model.backbone.bottom_up.weights=''",
    "model.roi_heads.num_classes=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    f"dataloader.train.dataset.names={TRAIN}",
    f"dataloader.test.dataset.names={VAL}",
    "train.device=cpu",
    "train.max_iter=1",
    "train.seed=0",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished run, which was started by the name of its config."""
    folder = tmp_path_factory.mktemp("python")
    register(write_dataset(folder))
    words = ["lazy/faster_rcnn_trees_FPN.py", *OVERRIDES, f"train.output_dir={folder / 'run'}"]
    args = train.parse_args(words)
    train.train_python(lazy.setup(args), args)
    yield folder / "run"


def test_a_run_knows_its_classes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded_config(str(run))["train"]["classes"] == {"names": ["a", "b"], "ids": [1, 2]}
    weights = f"train.init_checkpoint={run / 'model_final.pth'}"
    args = train.parse_args([str(CONFIG), "--eval-only", *OVERRIDES, weights])
    cfg = lazy.setup(args)
    assert list(cfg.train.classes.names) == ["a", "b"]  # of the checkpoint
    monkeypatch.setattr(lazy, "inference_on_dataset", lambda *args: {})
    assert lazy.evaluate(cfg, lazy.build_model(cfg)) == {}
    cfg.train.classes.names = ["b", "a"]
    with pytest.raises(ValueError, match="class 0 is 'b' in the model and 'a' in engine_val"):
        lazy.evaluate(cfg, lazy.build_model(cfg))


def test_visualize_finds_the_runs_config(run: Path, tmp_path: Path) -> None:
    words = ["--weights", run / "model_final.pth", "--dataset", VAL, "--num", 1]
    assert main(["visualize", *map(str, words), "--output", str(tmp_path), "--quiet"]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"graph.png", "sizes.md"}
    with Image.open(next(tmp_path.glob("1_*.png"))) as picture:
        assert min(picture.size) > 100


def test_export_takes_the_runs_config_and_overrides(run: Path, tmp_path: Path) -> None:
    words = ["--weights", run / "model_final.pth", "--format", "torchscript", "--sizes", "160x192"]
    words += ["--output", tmp_path / "model.ts", "--quiet", "train.device=cpu"]
    assert main(["export", *map(str, words)]) == 0
    info = json.loads((tmp_path / "model.ts.json").read_text())
    assert (info["mean"], info["std"], info["format"]) == ([127.0] * 3, [128.0] * 3, "RGB")


def test_compare_groups_seeds_and_names_the_keys(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "SIZE", (64, 64))
    for name, old, new in (("seed", "seed: 0", "seed: 1"), ("pafpn", "y: fpn", "y: pafpn")):
        shutil.copytree(run, tmp_path / name)
        file = tmp_path / name / "config.yaml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    folders = [str(run), *(str(tmp_path / name) for name in ("seed", "pafpn"))]
    assert main(["compare", *folders, "--report", str(tmp_path / "report"), "--quiet"]) == 0
    report = json.loads((tmp_path / "report" / "compare.json").read_text())
    assert [len(group["runs"]) for group in report["groups"]] == [2, 1]
    assert report["differences"] == {"model.backbone.topology": ["fpn", "pafpn"]}
    assert all("gflops" in group for group in report["groups"]), report["notes"]


def test_benchmark_beside_detectron2s_python_config(run: Path, tmp_path: Path) -> None:
    words = ["--config-file", str(CONFIG), "--image-size", "64", "64", "--what", "counts"]
    words += ["--baseline", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"]
    words += ["--quiet", "--variant", "cl: train.channels_last=false", "--runs", str(run)]
    assert main(["benchmark", *words, "--report", str(tmp_path / "r"), *OVERRIDES]) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    (entry,) = report["runs"]
    assert entry["contestant"] == "faster_rcnn_trees_FPN" and entry["dataset"] == [VAL]
    assert len(report["counts"]) == 3


@pytest.mark.parametrize(
    "words, message",
    [
        (["--train-json", "a.json"], "--train-json 'a.json' is for YAML configs.*names=NAME"),
        (
            ["MODEL.FPN.TOPOLOGY", "bifpn"],
            "'MODEL.FPN.TOPOLOGY': a Python config takes overrides as",
        ),
        (["--allow-partial"], "--allow-partial is for --eval-only"),
    ],
)
def test_flags_of_yaml_configs_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.run(train.parse_args([str(CONFIG), *words]))


def test_the_config_may_be_the_first_word(capsys: pytest.CaptureFixture) -> None:
    for file in ("a.yaml", "b/c.py", "COCO-Detection/fcos_R_50_FPN_1x"):
        args = train.parse_args(["--resume", file, "--num-gpus", "2", "SEED", "-1"])
        assert (args.config_file, args.num_gpus, args.opts) == (file, 2, ["SEED", "-1"])
    args = train.parse_args(["--config-file", "a.py", "train.output_dir=x/y.yaml"])
    assert (args.config_file, args.opts) == ("a.py", ["train.output_dir=x/y.yaml"])
    with pytest.raises(SystemExit):
        train.parse_args(["--config-file", "a.yaml", "b.yaml"])
    assert "two configs: --config-file a.yaml and b.yaml" in capsys.readouterr().err


def test_a_study_of_python_configs(run: Path, tmp_path: Path) -> None:
    overrides = dict(text.split("=", 1) for text in OVERRIDES if "seed" not in text)
    study = {"output": "out", "base": str(CONFIG), "overrides": overrides, "runs": {"fpn": {}}}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    (planned,) = plan_runs(read_study(tmp_path / "study.yaml", ["train.max_iter=1"]))
    assert planned.arguments()[-1] == "train.seed=0" and "train.max_iter=1" in planned.arguments()
    shutil.copytree(run, tmp_path / "done")
    assert dataclasses.replace(planned, folder=tmp_path / "done").state() == DONE
    (other,) = plan_runs(read_study(tmp_path / "study.yaml", ["optimizer.lr=1"]))
    assert dataclasses.replace(other, folder=tmp_path / "done").changes() == [
        "optimizer.lr 0.0004 -> 1"
    ]
