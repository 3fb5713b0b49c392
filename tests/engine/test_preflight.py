"""What is refused before any process is started, any data is read or any weights are fetched."""

from __future__ import annotations

import argparse
import re
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.utils.file_io import PathManager
from folders import run_setup
from tiny import TRAIN, VAL

from fpn_plugin import add_fpn_config
from fpn_plugin.config.files import merge_config_file
from fpn_plugin.engine import lazy, rendezvous
from fpn_plugin.engine.preflight import check_weights

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [
    path
    for folder in (Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).parent, ROOT / "configs")
    for path in sorted(folder.rglob("*.yaml"))
    if path.parent.name not in ("studies", "presets", "pyramids")
]
TWO = ("--num-gpus", "2")
PYRAMID = ("MODEL.BACKBONE.NAME", "build_pyramid_backbone")
R50 = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
X101 = "catalog://ImageNetPretrained/FAIR/X-101-32x8d"


@pytest.fixture
def config(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file of a config; its data must not be read."""

    def get(name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(DatasetCatalog, "get", get)
    (tmp_path / "config.yaml").write_text(make_config(DATASETS__TEST=(VAL,)).dump())
    return str(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "args, message",
    [
        ([*TWO, "SOLVER.IMS_PER_BATCH", 3], "SOLVER.IMS_PER_BATCH: 3 images.*multiple of 2"),
        ([*TWO, "SOLVER.IMS_PER_BATCH", 1], "SOLVER.IMS_PER_BATCH: 1 images.*among 2 processes"),
        (
            [*TWO, "SOLVER.IMS_PER_BATCH", 6, "SOLVER.ACCUMULATE", 2],
            "6 images cannot be .* 2 processes, in 2 parts each .SOLVER.ACCUMULATE.*multiple of 4",
        ),
        (["SOLVER.ACCUMULATE", 0], "SOLVER.ACCUMULATE: 0 is not the number of parts"),
        (
            ["SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.ACCUMULATE", 2],
            "SOLVER.IMS_PER_BATCH: 2 images .*multiple of 4",
        ),
        (["SOLVER.DDP.BUCKET_MB", -1], "SOLVER.DDP.BUCKET_MB: -1 is no size"),
        (
            [*TWO, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE", 2]
            + ["SOLVER.DDP.STATIC_GRAPH", True],
            "SOLVER.DDP.STATIC_GRAPH: True does not go with a batch in 2 parts",
        ),
        (
            ["SOLVER.REFERENCE_WORLD_SIZE", 8],
            "SOLVER.REFERENCE_WORLD_SIZE: 8 .*IMS_PER_BATCH: 2",
        ),
        (
            [*TWO, *PYRAMID, "MODEL.FPN.NORM", "SyncBN"],
            "FPN.NORM: 'SyncBN': SyncBN .*take BN or GN",
        ),
        (
            [*TWO, "MODEL.RESNETS.NORM", "SyncBN", "MODEL.BACKBONE.FREEZE_AT", 2],
            "MODEL.RESNETS.NORM: 'SyncBN': .*the CPU",
        ),
        (
            [*TWO, "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1]
            + ["MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.NORM", "SyncBN"],
            "MODEL.ROI_BOX_HEAD.NORM: 'SyncBN'",
        ),
        (
            [*TWO, *PYRAMID, "MODEL.FPN.BLOCK", 'conv3x3(norm="SyncBN")'],
            "MODEL.FPN.BLOCK: .*SyncBN.* the CPU",
        ),
        ([*TWO, *PYRAMID, "MODEL.FPN.IN_FEATURES", "('res9',)"], "FPN.IN_FEATURES: .*'res9'"),
        ([*TWO, "MODEL.WEIGHTS", "{tmp}/other.pth"], "MODEL.WEIGHTS .*other.pth.*nothing of it"),
        (
            [*TWO, *PYRAMID, "MODEL.BOTTOM_UP.WEIGHTS", "{tmp}/other.pth"],
            "MODEL.BOTTOM_UP.WEIGHTS: nothing in .*other.pth matches",
        ),
        (
            [*TWO, "--eval-only", "MODEL.WEIGHTS", "{tmp}/other.pth"],
            "MODEL.WEIGHTS .*other.pth' does not fit the config",
        ),
        (["--machine-rank", 1], "--machine-rank 1: machines count from 0"),
        (["--num-machines", 2, "--dist-url", "auto"], "--dist-url auto: several machines need"),
        (["MODEL.WEIGHTS", R50.replace("50", "101")], "MODEL.WEIGHTS: .*ResNet-101, but .*DEPTH"),
        (["MODEL.WEIGHTS", X101, "MODEL.RESNETS.DEPTH", 101], "ResNeXt-101, but .*NUM_GROUPS is 1"),
        (
            [*PYRAMID, "MODEL.WEIGHTS", R50, "MODEL.BOTTOM_UP.NAME", "torchvision/swin_t"],
            "ResNet-50, but MODEL.BOTTOM_UP.NAME is 'torchvision/swin_t': set MODEL.WEIGHTS to ''",
        ),
    ],
)
def test_refused(
    args: list[Any],
    message: str,
    config: str,
    tmp_path: Path,
    log: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: str, **options: Any) -> str:
        assert "://" not in path, f"{path} was fetched"
        return path

    monkeypatch.setattr(PathManager, "get_local_path", refuse)
    torch.save({"model": {"a.b": torch.zeros(1)}}, tmp_path / "other.pth")
    if "torchvision/swin_t" in args:
        args = [*args, *(x for k in _RESNET_KEYS for x in k)]
    words = [str(word).format(tmp=tmp_path) for word in args]
    opts = next((i for i, word in enumerate(words) if re.match(r"[A-Z]+\.", word)), len(words))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run_setup("--config-file", config, *words[:opts], *words[opts:])
    assert not (tmp_path / "run").exists()


_RESNET_KEYS = (
    ("MODEL.RESNETS.NORM", "FrozenBN"),
    ("MODEL.RESNETS.WIDTH_PER_GROUP", 64),
    ("MODEL.RESNETS.RES2_OUT_CHANNELS", 256),
)


def test_two_processes_that_may_start(config: str, log: pytest.LogCaptureFixture) -> None:
    before = torch.get_rng_state()
    cfg = run_setup("--config-file", config, *TWO, *PYRAMID)
    assert cfg.SOLVER.IMS_PER_BATCH == 2 and torch.equal(before, torch.get_rng_state())
    assert cfg.MODEL.DEVICE == "cpu" and TRAIN in cfg.DATASETS.TRAIN


def test_an_address_that_cannot_be_reached_before_the_data_is_read(
    config: str, log: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(PathManager, "get_local_path", refuse)
    for flags in ([], ["--eval-only"]):
        with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS: 'https://x/m.pth' cannot be"):
            run_setup("--config-file", config, *flags, "MODEL.WEIGHTS", "https://x/m.pth")
    with pytest.raises(FileNotFoundError, match="BOTTOM_UP.WEIGHTS: 'https://x/m.pth' cannot be"):
        key = "MODEL.BOTTOM_UP.WEIGHTS"
        run_setup("--config-file", config, *PYRAMID, key, "https://x/m.pth")
    assert not (tmp_path / "run").exists()


def test_no_weights_of_our_configs_or_detectron2s_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr("fpn_plugin.engine.preflight.fetch", lambda path, key: fetched.append(path))
    for path in CONFIGS:
        cfg = get_cfg()
        add_fpn_config(cfg)
        merge_config_file(cfg, str(path))
        check_weights(cfg, argparse.Namespace(eval_only=False))
    assert R50 in fetched and len(fetched) > 50


def test_too_few_gpus(config: str, log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--num-gpus 2: this machine has 1"):
        run_setup("--config-file", config, *TWO, "MODEL.DEVICE", "cuda:0")


def test_python_configs(tmp_path: Path, log: Any) -> None:
    file = str(ROOT / "configs" / "lazy" / "faster_rcnn_trees_FPN.py")
    args = argparse.Namespace(config_file=file, eval_only=False, resume=False, overwrite=False)
    vars(args).update(allow_partial=False, num_gpus=2, num_machines=1, machine_rank=0)
    vars(args).update(dist_url="tcp://127.0.0.1:1")
    folder = f"train.output_dir={tmp_path}"
    args.opts = [folder, "dataloader.train.total_batch_size=3", "train.device=cpu"]
    with pytest.raises(ValueError, match="dataloader.train.total_batch_size: 3 images"):
        lazy.setup(args)
    args.opts = [folder, "train.device=cpu", "+train.accumulate=3"]
    with pytest.raises(ValueError, match="2 images .*3 parts each .train.accumulate.: .* 6"):
        lazy.setup(args)
    args.opts = [folder, "train.device=cpu", "+train.ddp.bucket_cap=1"]
    with pytest.raises(KeyError, match="train.ddp.*'bucket_cap'"):
        lazy.setup(args)


def test_a_late_process_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Both ranks in one process: the second comes when the first has said twice that it waits."""
    monkeypatch.setattr(rendezvous, "_PAUSE", 0.2)
    monkeypatch.setattr(rendezvous, "_POLL", 0.05)
    port = free_port()
    url = rendezvous.announced(f"tcp://127.0.0.1:{port}", 0) + "&world_size=2&rank="
    found: list[int] = []

    def join(rank: int) -> None:
        store, _, _ = next(rendezvous._rendezvous(f"{url}{rank}", timedelta(seconds=20)))
        found.append(rank)
        stores.append(store)

    stores: list[Any] = []
    first = threading.Thread(target=join, args=(0,))
    first.start()
    first.join(0.7)
    join(1)
    first.join(20)
    assert sorted(found) == [0, 1]
    text = f"Waiting for 1 of 2 processes at tcp://127.0.0.1:{port}\n"
    assert capsys.readouterr().out.count(text) >= 2
    with pytest.raises(ValueError, match="--rank-timeout: 1 of 2 .*, that of rank 0 did not"):
        other = rendezvous.announced(f"tcp://127.0.0.1:{free_port()}", 1)
        next(rendezvous._rendezvous(f"{other}&world_size=2&rank=1", timedelta(seconds=0.1)))
    with pytest.raises(ValueError, match=f"--dist-url tcp://127.0.0.1:{port} cannot be used"):
        next(rendezvous._rendezvous(f"{url}0", timedelta(seconds=1)))
    assert rendezvous.announced("file:///a", 0) == "file:///a"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
