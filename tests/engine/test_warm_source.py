"""Which pyramid a checkpoint has, from the config.yaml beside it or from its names; what happens to
a warm-started run later; mistakes."""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from folders import DATA, run_setup
from test_resume import assert_same
from tiny import tiny_config
from warm_models import BIFPN, NETWORK, RETINANET, TARGETS, a_config, a_model, image, keys, seen

from fpn_plugin.checkpoint.checkpointer import Checkpointer
from fpn_plugin.config import load_config
from fpn_plugin.config.warm_start import (
    NO_PYRAMID,
    describe_checkpoint,
    pyramid_settings,
    resolve_warm_start,
)
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.engine.warm.start import start_warm
from fpn_plugin.visualize.detector import load_detector, read_config

PAFPN = TARGETS["pafpn"]


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an fpn's run, with the config.yaml beside it."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = a_config(folder, {})
    Checkpointer(a_model(cfg), str(folder)).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder / "model_final.pth"


def run(output: Path, weights: Path | str, *more: str) -> CfgNode:
    """The config of a command line that starts a PAFPN; flags may be anywhere in `more`."""
    config = output.parent / "tiny.yaml"
    config.write_text(tiny_config(output, **keys(PAFPN)).dump())
    common = ("MODEL.WEIGHTS", str(weights), "MODEL.FPN.WARM_START", "True")
    flags = [item for item in more if item.startswith("--")]
    rest = [item for item in more if not item.startswith("--")]
    return run_setup("--config-file", str(config), *flags, *common, *DATA, *rest)


def write_warm_run(cfg: CfgNode) -> str:
    """What a warm-started run leaves in its folder; the path of its checkpoint."""
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(cfg.dump())
    model = Trainer.build_model(cfg)
    start_warm(model, cfg)
    Checkpointer(model, str(folder)).save("model_final")
    return str(folder / "model_final.pth")


def test_a_warm_started_run_resumes_bit_for_bit(
    trained: Path, make_config: Callable[..., CfgNode]
) -> None:
    overrides = {**keys({**PAFPN, "WARM_START": True}), "MODEL__WEIGHTS": str(trained)}
    overrides |= {"SOLVER__MAX_ITER": 3, "SOLVER__CHECKPOINT_PERIOD": 2, "TEST__EVAL_PERIOD": 0}

    def train(name: str, stop: int, start: int = 0) -> dict[str, Any]:
        cfg = make_config(name, **overrides)
        folder = Path(cfg.OUTPUT_DIR)
        resolve_warm_start(cfg, str(folder / "model_0000001.pth") if start else "")
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(cfg.dump())
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=start > 0)
        assert trainer.start_iter == start
        trainer.max_iter = stop
        trainer.train()
        return torch.load(folder / "model_final.pth")["model"]

    whole = train("whole", 3)
    train("broken", 2)
    assert_same(whole, train("broken", 3, start=2))
    assert whole["backbone.warm_gate3_fuse.weights"].any()


def test_evaluation_and_resume_keep_the_structure(
    trained: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    cfg = run(tmp_path / "warm", trained)
    source = cfg.MODEL.FPN.WARM_START_FROM
    assert source == pyramid_settings(a_config(tmp_path, {}))
    assert source.EXTRA_LEVELS == "maxpool"
    own, folder = write_warm_run(cfg), tmp_path / "warm"
    for more in (("--resume",), ("--eval-only", "--resume")):
        log.clear()
        assert run(folder, trained, *more).MODEL.FPN.WARM_START_FROM == source
        assert "goes on as it is" in log.text
    assert run(folder, own, "--eval-only").MODEL.FPN.WARM_START_FROM == source

    # trained further, it is what it is; the run's own config.yaml works as well
    further = run(tmp_path / "further", own)
    assert further.MODEL.FPN.WARM_START_FROM == source
    log.clear()
    start_warm(Trainer.build_model(further), further)
    assert "has this very pyramid: nothing to do" in log.text
    inputs = [image()]
    before = Trainer.build_model(a_config(tmp_path, {})).eval()
    Checkpointer(before).load(str(trained))
    record = str(folder / "config.yaml")
    detector = load_detector(read_config(record, own, ["DATASETS.TEST", "()"]))
    assert_same(seen(before, inputs), seen(detector.model, inputs))

    with pytest.raises(ValueError, match="WARM_START: True, but no config.yaml of a run with it"):
        opts = ["MODEL.FPN.WARM_START", "True", *DATA]
        read_config(str(tmp_path / "tiny.yaml"), str(trained), opts)

    with pytest.raises(ValueError, match=r"WARM_START: .*two pyramids.*TOPOLOGY 'pafpn' -> 'fpn'"):
        run(tmp_path / "third", own, "MODEL.FPN.TOPOLOGY", "fpn")
    off = ("MODEL.FPN.WARM_START", "False")
    for more in (("--eval-only",), ("--resume",)):
        with pytest.raises(ValueError, match="WARM_START: False, but .*holds two pyramids"):
            run(folder, own, *more, *off)
    log.clear()
    run(tmp_path / "other", own, *off)
    assert "MODEL.FPN.WARM_START: False, but" in log.text and "holds two pyramids" in log.text


def test_the_source_may_be_gone_once_the_run_is_there(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source" / "model_final.pth"
    copy.parent.mkdir()
    copy.write_bytes(trained.read_bytes())
    (copy.parent / "config.yaml").write_text((trained.parent / "config.yaml").read_text())
    cfg = run(tmp_path / "warm", copy)
    own = write_warm_run(cfg)
    copy.unlink()
    (copy.parent / "config.yaml").unlink()
    record = str(tmp_path / "warm" / "config.yaml")
    for more in (["--resume"], ["--eval-only", "--resume"]):
        again = run_setup("--config-file", record, *more, *DATA)
        assert again.MODEL.FPN.WARM_START_FROM == cfg.MODEL.FPN.WARM_START_FROM
    assert again.MODEL.WEIGHTS == own
    # as tools/visualize.py --results reads it, for its data
    given = Namespace(config_file=record, opts=["MODEL.WEIGHTS", ""])
    assert load_config(given).MODEL.FPN.WARM_START_FROM == cfg.MODEL.FPN.WARM_START_FROM


def test_the_same_pyramid_is_loaded_as_it_is(
    trained: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    cfg = run(tmp_path / "same", trained, "MODEL.FPN.TOPOLOGY", "fpn")
    model = Trainer.build_model(cfg)
    start_warm(model, cfg)
    assert "nothing to do" in log.text and "node by node" not in log.text
    assert_same(dict(model.state_dict()), dict(torch.load(trained)["model"]))


def test_mistakes_name_the_key(trained: Path, tmp_path: Path, log: Any) -> None:
    with pytest.raises(ValueError, match="WARM_START: True, but MODEL.WEIGHTS is ''"):
        run(tmp_path / "a", "")
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS.*gone.pth"):
        run(tmp_path / "a", tmp_path / "gone.pth")
    torch.save({"model": {"stem.weight": torch.zeros(1)}}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="plain.pth' is no checkpoint of a detector.*BOTTOM_UP.WE"):
        run(tmp_path / "a", tmp_path / "plain.pth")
    with pytest.raises(
        ValueError, match="WARM_START: True are set.*: build_resnet_fpn_backbone is"
    ):
        run(tmp_path / "a", trained, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    for flag in ("--eval-only", "--resume"):
        folder = tmp_path / "a" if flag == "--eval-only" else trained.parent
        with pytest.raises(ValueError, match="no config.yaml of a run with it is beside"):
            run(folder, trained, flag)


def test_a_source_that_does_not_say_enough_or_cannot_be_built(tmp_path: Path) -> None:
    cfg = a_config(tmp_path, PAFPN)
    cfg.MODEL.FPN.WARM_START = True
    with pytest.raises(ValueError, match="WARM_START_FROM is empty: call .*resolve_config"):
        build_model(cfg)
    full = pyramid_settings(a_config(tmp_path, {}))
    for settings, message in (
        ({"TOPOLOGY": "fpn"}, "WARM_START_FROM: it has no IN_FEATURES"),
        ({"WIDTH": 3}, "WARM_START_FROM.*WIDTH"),
        ({**full, "TOPOLOGY": "fnp"}, "WARM_START_FROM: the checkpoint's pyramid: .*'fnp'"),
        ({**full, "IN_FEATURES": ["res1", "res2"]}, "FROM: the checkpoint's pyramid: .*'res1'"),
        (
            {**full, "IN_FEATURES": ["res2"], "EXTRA_LEVELS": "none"},
            "WARM_START_FROM: no level is in common: .* gives p2, the new one p4",
        ),
    ):
        cfg.MODEL.FPN.WARM_START_FROM = CfgNode(settings, new_allowed=True)
        if "common" in message:
            cfg.merge_from_list(["MODEL.FPN.IN_FEATURES", "['res4']"])
            cfg.merge_from_list(["MODEL.FPN.TOPOLOGY", "fpn", "MODEL.FPN.EXTRA_LEVELS", "none"])
        with pytest.raises((KeyError, ValueError), match=message):
            build_model(cfg)


NAMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zoo": ({}, {"EXTRA_LEVELS": "maxpool", "NORM": "", "OUT_CHANNELS": 32}),
    "gn": ({"MODEL__FPN__NORM": "GN"}, {"NORM": "GN"}),
    "frozen": ({"MODEL__FPN__NORM": "FrozenBN"}, {"NORM": "FrozenBN"}),
    "retinanet": (
        {**RETINANET, "MODEL__BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone"},
        {"EXTRA_LEVELS": "conv_c5", "IN_FEATURES": ["res3", "res4", "res5"]},
    ),
    "c4": (
        {
            "MODEL__BACKBONE__NAME": "build_resnet_backbone",
            "MODEL__RESNETS__OUT_FEATURES": ["res4"],
            "MODEL__RPN__IN_FEATURES": ["res4"],
            "MODEL__ROI_HEADS__IN_FEATURES": ["res4"],
            "MODEL__ANCHOR_GENERATOR__SIZES": [[32]],
        },
        NO_PYRAMID,
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_detectron2s_own_models_are_known_by_their_names(name: str, tmp_path: Path) -> None:
    overrides, expected = NAMED[name]
    model = build_model(tiny_config(tmp_path, **overrides))
    # as the files of Detectron2's zoo are laid out
    arrays = {key: x.numpy() for key, x in model.state_dict().items()}
    zoo = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(zoo))
    settings = describe_checkpoint(str(tmp_path / "zoo.pkl"))
    assert {key: settings[key] for key in expected} == expected


def test_a_mask_rcnn_of_the_zoo_becomes_a_retinanet(tmp_path: Path, log: Any) -> None:
    """The finest level is let go, the coarsest are new, and so are the heads."""
    model = build_model(tiny_config(tmp_path, **NETWORK))
    torch.save({"model": model.state_dict()}, tmp_path / "d2.pth")
    cfg = a_config(tmp_path, BIFPN, **RETINANET)
    cfg.MODEL.WEIGHTS, cfg.MODEL.FPN.WARM_START = str(tmp_path / "d2.pth"), True
    resolve_warm_start(cfg)
    warmed = build_model(cfg).eval()
    start_warm(warmed, cfg)
    x = torch.randn(1, 3, 64, 96)
    one, two = model.eval().backbone(x), warmed.backbone(x)
    assert list(two) == ["p3", "p4", "p5", "p6", "p7"]
    assert all(torch.equal(one[name], two[name]) for name in ("p3", "p4", "p5", "p6"))
    assert "p7                           the checkpoint's function: no" in log.text
    assert "not preserved: the heads get no p2 any more" in log.text
    assert "in the checkpoint alone: backbone.fpn_lateral2.weight" in log.text
    assert "warm.fpn_output2.weight" not in str(list(warmed.state_dict()))


def test_names_that_do_not_tell_enough(tmp_path: Path) -> None:
    model = build_model(a_config(tmp_path, PAFPN))
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pth")
    with pytest.raises(ValueError, match=r"more than Detectron2's FPN \(backbone.pafpn_output3"):
        describe_checkpoint(str(tmp_path / "ours.pth"))
    cfg = a_config(tmp_path, {}, a_config(tmp_path, PAFPN))
    cfg.MODEL.WEIGHTS = str(tmp_path / "ours.pth")
    resolve_warm_start(cfg)
    assert cfg.MODEL.FPN.WARM_START_FROM.TOPOLOGY == "pafpn"
    same = {"backbone.bottom_up.stem.weight": torch.zeros(1)}
    same["backbone.fpn_lateral5.weight"] = torch.zeros(8, 8, 1, 1)
    same["backbone.top_block.p6.weight"] = torch.zeros(8, 8, 3, 3)
    torch.save({"model": same}, tmp_path / "same.pth")
    with pytest.raises(ValueError, match="p6.weight may read .* both have 8 channels; say in"):
        describe_checkpoint(str(tmp_path / "same.pth"))


@pytest.mark.parametrize("text", ["MODEL: resnet50", "MODEL: {FPN: 3}", "MODEL:", "model: {a: 1}"])
def test_another_programs_config_beside_a_checkpoint_says_nothing(
    text: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    torch.save({"model": build_model(tiny_config(tmp_path)).state_dict()}, tmp_path / "m.pth")
    cfg = a_config(tmp_path, PAFPN)
    cfg.MODEL.WEIGHTS = str(tmp_path / "m.pth")
    resolve_warm_start(cfg)
    cfg.MODEL.FPN.WARM_START = True
    resolve_warm_start(cfg)
    assert cfg.MODEL.FPN.WARM_START_FROM.TOPOLOGY == "fpn"
    assert "m.pth: by its names it is taken for Detectron2's FPN" in log.text


def test_a_python_configs_run_can_be_gone_on_from(tmp_path: Path) -> None:
    """Its config.yaml may have tags that call code, which are not read."""
    (tmp_path / "config.yaml").write_text("norm: !!python/name:torch.nn.LayerNorm ''")
    cfg = a_config(tmp_path, PAFPN)
    cfg.MODEL.WEIGHTS = str(tmp_path / "m.pth")
    resolve_warm_start(cfg)
    cfg.MODEL.FPN.WARM_START = True
    with pytest.raises(ValueError, match="m.pth.*no plain YAML.*: say it in MODEL.FPN.WARM_START_"):
        resolve_warm_start(cfg)
    settings = pyramid_settings(a_config(tmp_path, {}))
    cfg.MODEL.FPN.WARM_START_FROM = CfgNode(settings, new_allowed=True)
    resolve_warm_start(cfg)
    assert cfg.MODEL.FPN.WARM_START_FROM == settings
    model = "_target_: fpn_plugin.PyramidBackbone, out_channels: 32, in_features: [res4, res5]"
    spec = "!!python/object:detectron2.layers.shape_spec.ShapeSpec {channels: 1}"
    text = f"model: {{_target_: x.Y, shape: {spec}, backbone: {{{model}, topology: bifpn}}}}"
    (tmp_path / "config.yaml").write_text(text)
    resolve_warm_start(cfg)
    found = cfg.MODEL.FPN.WARM_START_FROM
    assert (found.TOPOLOGY, found.OUT_CHANNELS, found.IN_FEATURES) == (
        "bifpn",
        32,
        ["res4", "res5"],
    )
