"""Training from Python configs: the tool from its command line, resuming, evaluating, its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import digest
from omegaconf import DictConfig
from tiny import TRAIN, VAL

from fpn_plugin.checkpoint.finite import DivergedError
from fpn_plugin.checkpoint.run_folder import metric_lines
from fpn_plugin.cli import train
from fpn_plugin.engine import lazy
from fpn_plugin.engine.resume import ResumeError
from fpn_plugin.modeling.python_config import read_python_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "lazy" / "faster_rcnn_trees_FPN.py"
SMALL = [
    "model.backbone.bottom_up.weights=''",
    "model.roi_heads.num_classes=2",
    "model.roi_heads.box_head.fc_dims=[512]",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    "train.device=cpu",
    "train.max_iter=2",
    "train.checkpointer.period=1",
]
NAMES = [f"dataloader.train.dataset.names={TRAIN}", f"dataloader.test.dataset.names={VAL}"]


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> Any:
    """What the tool does in a process, flags first; its dataset is registered in this one."""
    flags = [argument for argument in arguments if argument.startswith("--")]
    keys = [argument for argument in arguments if not argument.startswith("--")]
    line = ["--config-file", str(CONFIG), *flags, *SMALL, *NAMES]
    args = train.parse_args([*line, f"train.output_dir={output}", *keys])
    return train.train_python(lazy.setup(args), args)


def iterations(output: Path) -> list[int]:
    """Those whose losses are in metrics.json."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [line["iteration"] for line in lines if line.get("total_loss", 0) > 0]


def own_config(path: Path, *lines: str) -> Path:
    """A Python config that changes CONFIG."""
    head = [
        "from detectron2.config import LazyCall as L, LazyConfig",
        f"_cfg = LazyConfig.load({str(CONFIG)!r})",
        "model, optimizer, lr_multiplier = _cfg.model, _cfg.optimizer, _cfg.lr_multiplier",
        "dataloader, train = _cfg.dataloader, _cfg.train",
        "del dataloader.evaluator",
    ]
    path.write_text("\n".join([*head, *lines]))
    return path


def test_train_resume_and_evaluate(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lazy, "setup_logger", lambda *args, **kwargs: None)
    output = tmp_path / "run"
    options = ["+train.model_ema.enabled=True", "+train.test_aug.enabled=True"]
    options += ["+train.test_aug.min_sizes=[64]", "train.eval_period=1"]
    results = run(monkeypatch, output, "train.amp.enabled=True", *options)
    assert "bbox/AP" in results
    augmented = [x["iteration"] for x in metric_lines(str(output)) if "bbox_TTA/AP" in x]
    assert augmented == [2] and "bbox_TTA/AP" in results
    assert (output / "inference_TTA" / "coco_instances_results.json").is_file()
    assert (output / "inference" / "coco_instances_results.json").is_file()
    assert iterations(output) == [0, 1]  # written before each checkpoint, so that none is lost
    first = torch.load(output / "model_0000000.pth", weights_only=False)
    assert first["iteration"] == 0 and "optimizer" in first["trainer"]
    trained, average = first["trainer"]["hooks"]["EMAHook"]["trained"], first["model"]
    assert sum(not torch.equal(x, average[name]) for name, x in trained.items()) > 50

    with pytest.raises(FileExistsError, match="train.output_dir .* --resume .* --overwrite"):
        run(monkeypatch, output)
    run(monkeypatch, output, "--resume", "train.max_iter=3")
    assert iterations(output) == [0, 1, 2]
    assert "train.model_ema was enabled and is not" in log.text
    assert sorted(file.name for file in output.glob("model_*")) == [
        "model_0000000.pth",
        "model_0000001.pth",
        "model_0000002.pth",
        "model_final.pth",
    ]
    final = torch.load(output / "model_final.pth", weights_only=False)
    assert final["iteration"] == 2

    before = digest(output)
    message = "num_classes 2 -> 3.* another train.output_dir, and train.init_checkpoint .*final.pth"
    keys = ("model.roi_heads.num_classes=3", "train.max_iter=4")
    with pytest.raises(ResumeError, match=message):
        run(monkeypatch, output, "--resume", *keys)
    results = run(monkeypatch, output, "--resume", "train.max_iter=3")
    assert results["bbox/AP"] == metric_lines(str(output))[-1]["bbox/AP"]
    assert "is finished" in log.text and "train.max_iter is 3. Raise train.max_iter" in log.text
    after = digest(output)
    assert all(after[name] == before[name] for name in before if name != "log.txt")

    again = run(monkeypatch, output, "--eval-only", "--resume")
    assert set(again) == {"bbox"} and (output / "eval-1" / "inference").is_dir()
    run(monkeypatch, output, "--overwrite", "train.max_iter=1")
    assert sorted(file.name for file in output.glob("model_*")) == [
        "model_0000000.pth",
        "model_final.pth",
    ]


def test_two_processes_on_the_cpu_from_the_command_line(dataset: Path, tmp_path: Path) -> None:
    """The data is named by its files, as a Python config can."""
    data = f"json_file={str(dataset)!r}, image_root={str(dataset.parent)!r}, dataset_name={TRAIN!r}"
    config = own_config(
        tmp_path / "own.py",
        "from detectron2.data.datasets import load_coco_json",
        f"dataloader.train.dataset = L(load_coco_json)({data})",
    )
    line = [
        sys.executable,
        "-m",
        "fpn_plugin",
        "train",
        str(config),
        "--num-gpus",
        "2",
    ]
    port = 20_000 + os.getpid() % 20_000
    line += ["--dist-url", f"tcp://127.0.0.1:{port}", *SMALL]
    done = subprocess.run(
        [*line, "train.max_iter=1", f"train.output_dir={tmp_path / 'run'}"]
        + ["dataloader.train.total_batch_size=4", "+train.accumulate=2"]
        + ["+train.ddp.compress=bf16", "+train.ddp.gradient_as_bucket_view=True"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model_final.pth").is_file()
    assert (tmp_path / "run" / "log.txt.rank1").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train.init_checkpoint=gone.pth"], "train.init_checkpoint 'gone.pth': there is no such"),
        (["--eval-only"], "--eval-only: train.init_checkpoint is empty"),
        (["--resume", "--overwrite"], "choose one"),
        (["--allow-partial"], "--allow-partial is for --eval-only"),
        (["train.amp.enabled=True", "+train.amp.precision=fp16"], "train.amp.precision 'fp16' nee"),
        (["train.amp.enabled=True", "+train.amp.precision=half"], "train.amp.precision.*'half'"),
        (["+train.model_ema.decay=1"], "train.model_ema.decay: 1 "),
        (["+train.test_aug={enabled: True, sizes: [4]}"], "train.test_aug: unknown name 'sizes'"),
        (["+train.max_loss_ratio=0.5"], "train.max_loss_ratio: 0.5 is neither 0"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=message):
        run(monkeypatch, tmp_path / "run", *arguments)


def test_a_config_without_a_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text("model = dict()\ntrain = dict(device='cpu')\n")
    with pytest.raises(ValueError, match="lacks optimizer, lr_multiplier, dataloader"):
        read_python_config(str(tmp_path / "part.py"))
    with pytest.raises(FileNotFoundError, match="--config-file 'none.py'"):
        read_python_config("none.py")


def test_channels_last() -> None:
    cfg: DictConfig = read_python_config(str(CONFIG), SMALL)
    model = lazy.build_model(cfg)
    weight = model.backbone.get_submodule("fpn_output2").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_run_that_diverges(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("optimizer.lr=1e20", "lr_multiplier.warmup_factor=1")
    with pytest.raises(DivergedError, match="Iteration 1: ") as caught:
        run(monkeypatch, tmp_path / "run", *keys)
    assert "It begins in " in str(caught.value) and "optimizer.lr (1e+20)" in str(caught.value)
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000000.pth"
    assert f"goes on from {tmp_path / 'run' / 'model_0000000.pth'}" in str(caught.value)


def test_a_pyramid_starts_as_another_one(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lazy, "setup_logger", lambda *args, **kwargs: None)
    config = own_config(
        tmp_path / "warm.py",
        "from fpn_plugin import PyramidBackbone",
        "_old = {k: x for k, x in model.backbone.items() if k not in ('_target_', 'bottom_up')}",
        "model.backbone.warm_from = L(PyramidBackbone)(bottom_up='${..bottom_up}', **_old)",
        "model.backbone.warm_from.in_features = ['res2', 'res3', 'res4', 'res5']",
        "model.backbone.topology = 'pafpn'",
    )
    before = lazy.build_model(read_python_config(str(CONFIG), SMALL))
    (tmp_path / "old").mkdir()
    torch.save({"model": before.state_dict()}, tmp_path / "old" / "model.pth")
    extra = [f"train.init_checkpoint={tmp_path / 'old' / 'model.pth'}", "train.max_iter=1"]
    cfg = read_python_config(str(config), [*SMALL, *NAMES, *extra])
    cfg.train.output_dir = str(tmp_path / "run")
    lazy.train(cfg)
    assert "the detector                 the checkpoint's function: exactly" in log.text
    after = lazy.build_model(cfg)
    lazy.load_adapted(after, cfg.train.init_checkpoint)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, again = before.eval().backbone(x), after.eval().backbone(x)
    assert list(maps) == list(again) and all(torch.equal(maps[k], again[k]) for k in maps)
    log.clear()
    cfg.train.max_iter = 2
    lazy.train(cfg, resume=True)
    assert "node by node" not in log.text and "the checkpoint's function" not in log.text
    cfg.model.backbone.warm_from.out_channels = 64
    with pytest.raises(ValueError, match="init_checkpoint .* has a pyramid of 64 channels, not 96"):
        lazy.load_adapted(lazy.build_model(cfg), "model.pth", key="train.init_checkpoint")


def test_the_cpu_that_a_run_falls_back_to_is_not_its_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for gpu, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        cfg = read_python_config(str(CONFIG), [x for x in SMALL if "device" not in x])
        assert (cfg.train.device, lazy.device_of(cfg)) == ("cuda", device)
