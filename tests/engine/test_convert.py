"""tools/convert_weights.py: checkpoints as files of another pyramid, and back to Detectron2."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from test_resume import assert_same
from tiny import tiny_config
from warm_models import MASKS, NETWORK, RETINANET, TARGETS, a_config, a_model, image, keys, seen

from fpn_plugin.checkpoint.checkpointer import Checkpointer
from fpn_plugin.cli import convert as convert_command


def convert(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(convert_command, "setup_logger", lambda *args, **kwargs: None)
    convert_command.run(convert_command.parse_args(args))


def an_fpn(folder: Path, **overrides: Any) -> tuple[Any, Path]:
    """A model of ours with the checkpoint and the config.yaml of its run."""
    folder.mkdir()
    cfg = a_config(folder, {}, **overrides)
    model = a_model(cfg)
    Checkpointer(model, str(folder)).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return model, folder / "model_final.pth"


@pytest.mark.parametrize(
    "heads, builder",
    [(MASKS, "build_resnet_fpn_backbone"), (RETINANET, "build_retinanet_resnet_fpn_backbone")],
    ids=["mask-rcnn", "retinanet"],
)
def test_detectron2_computes_the_same_from_our_fpn(
    heads: dict[str, Any], builder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, path = an_fpn(tmp_path / "ours", **heads)
    output = str(tmp_path / "d2.pth")
    convert(monkeypatch, "--to", "detectron2", "--weights", str(path), "--output", output)
    theirs = build_model(
        tiny_config(tmp_path, **{**NETWORK, **heads, "MODEL__BACKBONE__NAME": builder})
    )
    incompatible = theirs.load_state_dict(torch.load(output)["model"], strict=False)
    assert not incompatible.missing_keys and not incompatible.unexpected_keys
    inputs = [image()]
    maps, found = seen(ours, inputs)
    assert len(found["boxes"]) > 0
    assert_same((maps, found), seen(theirs.eval(), inputs))


def test_a_zoo_file_becomes_ours_and_no_file_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = a_model(tiny_config(tmp_path, **NETWORK, **MASKS))
    arrays = {name: x.numpy() for name, x in theirs.state_dict().items()}
    zoo, out = tmp_path / "zoo.pkl", tmp_path / "new" / "m.pth"
    zoo.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_config(tmp_path, **MASKS, **keys(TARGETS["pafpn"])).dump())
    there = ("--weights", str(zoo), "--output")
    convert(monkeypatch, "--config-file", str(config), *there, str(out))
    recorded = yaml.safe_load((out.parent / "config.yaml").read_text())
    fpn = recorded["MODEL"]["FPN"]
    assert fpn["WARM_START"] and fpn["WARM_START_FROM"]["TOPOLOGY"] == "fpn"
    cfg = a_config(tmp_path, TARGETS["pafpn"], a_config(tmp_path, {}, **MASKS), **MASKS)
    ours = build_model(cfg).eval()
    ours.load_state_dict(torch.load(out)["model"])
    inputs = [image()]
    assert_same(seen(theirs, inputs), seen(ours, inputs))

    before = out.stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="--output .*m.pth exists; give --overwrite"):
        convert(monkeypatch, "--config-file", str(config), *there, str(out))
    assert out.stat().st_mtime_ns == before
    convert(monkeypatch, "--config-file", str(config), "--overwrite", *there, str(out))
    assert out.stat().st_mtime_ns > before
    with pytest.raises(FileExistsError, match="config.yaml exists"):
        convert(monkeypatch, "--config-file", str(config), *there, str(out.with_name("b.pth")))

    to = ("--to", "detectron2", "--weights", str(out), "--output", str(tmp_path / "no.pth"))
    with pytest.raises(ValueError, match="two pyramids"):
        convert(monkeypatch, *to)
    network = a_config(tmp_path, {}, MODEL__BOTTOM_UP__NAME="timm/resnet18")
    (out.parent / "config.yaml").write_text(network.dump())
    with pytest.raises(ValueError, match="MODEL.BOTTOM_UP.NAME is 'timm/resnet18', not 'build_re"):
        convert(monkeypatch, *to)
    (out.parent / "config.yaml").write_text(a_config(tmp_path, TARGETS["pafpn"]).dump())
    with pytest.raises(ValueError, match="cannot become .*: MODEL.FPN.TOPOLOGY is 'pafpn', not 'f"):
        convert(monkeypatch, *to)
    assert not (tmp_path / "no.pth").exists()


def test_the_checkpoint_itself_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = an_fpn(tmp_path / "ours")[1]
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_config(tmp_path, **keys(TARGETS["pafpn"])).dump())
    for output in (path, path.with_name("other.pth")):  # the latter's config.yaml is the run's
        with pytest.raises(ValueError, match="--output .* belongs to --weights"):
            args = ["--overwrite", "--weights", str(path), "--output", str(output)]
            convert(monkeypatch, "--config-file", str(config), *args)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give --config-file, or --to detectron2"),
        (("--to", "detectron2", "--config-file", "a.yaml"), "give --config-file, or --to"),
        (("--to", "detectron2", "MODEL.FPN.NORM", "GN"), "no config overrides, but got MODEL.FPN"),
    ],
)
def test_arguments_that_would_be_ignored(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        convert(monkeypatch, "--weights", "a.pth", "--output", "b.pth", *arguments)
    assert message in capsys.readouterr().err
