"""A checkpoint's detector goes on as another one: the same function at first, and it learns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from folders import DATA, load_tool, run_setup
from test_resume import assert_same
from tiny import tiny_config
from torch import Tensor, nn

from fpn_plugin.config import pyramid_settings
from fpn_plugin.engine.checkpoint import Checkpointer
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.engine.warm_source import describe_checkpoint, resolve_warm_start
from fpn_plugin.engine.warm_start import WarmStart

OURS = {"MODEL__BACKBONE__NAME": "build_pyramid_backbone", "MODEL__MASK_ON": True}
OURS |= {"MODEL__ROI_MASK_HEAD__CONV_DIM": 16, "MODEL__RPN__POST_NMS_TOPK_TEST": 30}
BIFPN = {"TOPOLOGY": "bifpn", "FUSE_TYPE": "fast_normalized", "BLOCK": "separable"}
TARGETS: dict[str, dict[str, Any]] = {
    "pafpn": {"TOPOLOGY": "pafpn"},
    "bfp": {"TOPOLOGY": "fpn+bfp"},
    "asff": {"TOPOLOGY": "fpn+asff"},
    "fapn": {"TOPOLOGY": "fapn"},
    "bifpn": BIFPN,
}


def keys(fpn: dict[str, Any]) -> dict[str, Any]:
    return {**OURS, **{f"MODEL__FPN__{key}": value for key, value in fpn.items()}}


def a_config(folder: Path, fpn: dict[str, Any], source: CfgNode | None = None) -> CfgNode:
    cfg = tiny_config(folder, **keys(fpn))
    if source is not None:
        cfg.MODEL.FPN.WARM_START = True
        cfg.MODEL.FPN.WARM_START_FROM = CfgNode(pyramid_settings(source), new_allowed=True)
    return cfg


def a_model(cfg: CfgNode) -> nn.Module:
    """With random biases and statistics too, so that each of them counts."""
    model = build_model(cfg).eval()
    for name, x in model.state_dict().items():
        if x.is_floating_point() and "bottom_up" not in name and not name.startswith("pixel"):
            x.add_(torch.randn_like(x).abs() * 0.02 if "running_var" in name else torch.randn_like(x) * 0.02)
    return model


def image() -> dict[str, Any]:
    return {"image": torch.randint(0, 255, (3, 70, 90)).float(), "height": 70, "width": 90}


@torch.no_grad()
def seen(model: nn.Module, inputs: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict]:
    model.eval()
    maps = model.backbone(model.preprocess_image(inputs).tensor)  # type: ignore[operator]
    found = model(inputs)[0]["instances"]
    return maps, {"boxes": found.pred_boxes.tensor, **found.get_fields()}


def warm(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> tuple[nn.Module, ...]:
    source = a_config(folder, old)
    before, after = a_model(source), build_model(a_config(folder, new, source))
    start = WarmStart(after, "old.pth")
    after.load_state_dict(start(before.state_dict()))
    return before, after, start  # type: ignore[return-value]


@pytest.mark.parametrize("name", TARGETS)
def test_a_mask_rcnn_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    before, after, start = warm(tmp_path, {}, TARGETS[name])
    inputs = [image()]
    (maps, found), (maps2, found2) = seen(before, inputs), seen(after, inputs)
    assert list(maps) == list(maps2) and all(torch.equal(maps[k], maps2[k]) for k in maps)
    assert len(found["boxes"]) > 0
    for field in ("boxes", "scores", "pred_classes", "pred_masks"):
        assert torch.equal(found[field], found2[field]), field
    assert set(start.verdict().values()) == {"exactly"}


@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("new", [{}, {"TOPOLOGY": "pafpn"}])
def test_a_wider_mask_rcnn_goes_on(norm: str, new: dict[str, Any], tmp_path: Path) -> None:
    width = {"OUT_CHANNELS": 128, "NORM": norm}, {"OUT_CHANNELS": 256, "NORM": norm, **new}
    before, after, start = warm(tmp_path, *width)
    inputs = [image()]
    (maps, found), (maps2, found2) = seen(before, inputs), seen(after, inputs)
    for name, x in maps.items():
        assert torch.allclose(x.repeat_interleave(2, 1), maps2[name], rtol=1e-4, atol=1e-4), name
    assert len(found["boxes"]) == len(found2["boxes"]) > 0
    assert torch.allclose(found["boxes"], found2["boxes"], atol=1e-2)
    assert torch.allclose(found["scores"], found2["scores"], atol=1e-4)
    assert set(start.verdict().values()) == {"up to rounding"}
    weight = after.proposal_generator.rpn_head.conv.weight  # type: ignore[union-attr]
    assert not torch.allclose(weight[:, ::2], weight[:, 1::2])  # type: ignore[index]


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ({"OUT_CHANNELS": 64}, {"OUT_CHANNELS": 32}, "32 of 64 channels were let go"),
        ({"OUT_CHANNELS": 64, "NORM": "GN"}, {"OUT_CHANNELS": 96, "NORM": "GN"}, "norms of groups"),
        ({"TOPOLOGY": "fpn+bfp"}, {"TOPOLOGY": "fpn", "OUT_CHANNELS": 64}, "non_local does not"),
    ],
)
def test_what_cannot_be_preserved_is_said(old: dict, new: dict, reason: str, tmp_path: Path) -> None:
    start = warm(tmp_path, old, new)[2]
    assert set(start.verdict().values()) == {"no"}  # type: ignore[operator]
    assert f"not preserved: {reason}" in start.report()  # type: ignore[operator]


def test_the_log_names_every_node(tmp_path: Path) -> None:
    start = warm(tmp_path, {}, {"TOPOLOGY": "fapn"})[2]
    lines = {line.split()[0]: line.strip() for line in start.report().splitlines()[1:]}  # type: ignore[operator]
    assert set(lines) > {step.node.name.removeprefix("warm.") for step in start.backbone.steps}  # type: ignore[union-attr]
    assert lines["bottom_up"].split(maxsplit=1)[1] == "copied"
    assert lines["fpn_lateral3"].split() == ["fpn_lateral3", "(old)", "copied"]
    assert "from backbone.fpn_lateral3.weight" in lines["fapn_lateral3"]
    assert lines["fapn_merge3"].endswith("fresh") and lines["warm_gate3"].endswith("fresh")
    assert lines["p3"].endswith("function: exactly (the new pyramid comes in by warm_gate3)")


@pytest.mark.parametrize("name", TARGETS)
def test_every_new_parameter_learns_within_two_steps(name: str, tmp_path: Path) -> None:
    after = warm(tmp_path, {}, TARGETS[name])[1].backbone
    optimizer = torch.optim.SGD(after.parameters(), lr=0.01)
    x, learned = image()["image"][None] / 255, set()
    for _ in range(2):
        optimizer.zero_grad()
        sum((y - 1).square().mean() for y in after(x).values()).backward()  # type: ignore
        learned |= {n for n, p in after.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    names = {name for name, _ in after.named_parameters() if not name.startswith("bottom_up.")}
    # a weight of a fusion that one map wins, or a bias before a softmax, may have none
    assert {n for n in names - learned if not n.endswith("phi.bias")} == set()


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: an fpn after no step, with the config.yaml beside it."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = a_config(folder, {})
    Checkpointer(a_model(cfg), str(folder)).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder / "model_final.pth"


def test_a_warm_started_run_resumes_bit_for_bit(
    trained: Path, make_config: Callable[..., CfgNode]
) -> None:
    fpn = {"TOPOLOGY": "pafpn", "WARM_START": True}
    finals = {}
    for name, stops in {"whole": (4,), "broken": (2, 4)}.items():
        for stop in stops:
            overrides = {**keys(fpn), "MODEL__MASK_ON": False, "MODEL__WEIGHTS": str(trained)}
            cfg = make_config(name, **overrides)
            cfg.merge_from_list(["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2])
            cfg.TEST.EVAL_PERIOD = 0
            folder = Path(cfg.OUTPUT_DIR)
            resumed = str(folder / "model_0000001.pth") if stop == 4 and len(stops) > 1 else ""
            resolve_warm_start(cfg, resumed)
            folder.mkdir(exist_ok=True)
            (folder / "config.yaml").write_text(cfg.dump())
            torch.manual_seed(0)
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=bool(resumed))
            assert trainer.start_iter == (2 if resumed else 0)
            trainer.max_iter = stop
            trainer.train()
        finals[name] = torch.load(folder / "model_final.pth")["model"]
    assert_same(finals["whole"], finals["broken"])
    gate = finals["whole"]["backbone.warm_gate3_fuse.weights"]
    assert gate.any()


def run(output: Path, weights: Path | str, *more: str) -> CfgNode:
    config = output.parent / "tiny.yaml"
    config.write_text(tiny_config(output, **keys({"TOPOLOGY": "pafpn"})).dump())
    common = ("MODEL.WEIGHTS", str(weights), "MODEL.FPN.WARM_START", "True")
    flags = [item for item in more if item.startswith("--")]
    rest = [item for item in more if not item.startswith("--")]
    return run_setup("--config-file", str(config), *flags, *common, *DATA, *rest)


def test_the_source_is_found_and_evaluation_and_resume_keep_it(
    trained: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    cfg = run(tmp_path / "warm", trained)
    source = cfg.MODEL.FPN.WARM_START_FROM
    assert source == pyramid_settings(a_config(tmp_path, {}))
    assert source.EXTRA_LEVELS == "maxpool"
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    Checkpointer(build_model(cfg), str(folder)).save("model_final")
    for more in (("--resume",), ("--eval-only", "--resume")):
        log.clear()
        again = run(folder, trained, *more)
        assert again.MODEL.FPN.WARM_START_FROM == source
        assert "goes on as it is" in log.text
    own = str(folder / "model_final.pth")
    assert run(folder, own, "--eval-only").MODEL.FPN.WARM_START_FROM == source
    further = run(tmp_path / "further", own)
    assert further.MODEL.FPN.WARM_START_FROM == source
    model = Trainer.build_model(further)
    state = torch.load(own)["model"]
    assert WarmStart(model, own)(state).keys() == state.keys()
    assert "nothing is adapted" in log.text
    with pytest.raises(ValueError, match=r"WARM_START: .*two pyramids.*TOPOLOGY 'pafpn' -> 'fpn'"):
        run(tmp_path / "third", own, "MODEL.FPN.TOPOLOGY", "fpn")
    with pytest.raises(ValueError, match="WARM_START: True, but .*MODEL.WEIGHTS.* without it"):
        run(folder, trained, "--eval-only")


def test_mistakes_name_the_key(trained: Path, tmp_path: Path, log: Any) -> None:
    with pytest.raises(ValueError, match="WARM_START: True, but MODEL.WEIGHTS is ''"):
        run(tmp_path / "a", "")
    torch.save({"model": {"stem.weight": torch.zeros(1)}}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="MODEL.WEIGHTS '.*plain.pth' is a checkpoint without a py"):
        run(tmp_path / "a", tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="build_resnet_fpn_backbone'"):
        name = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
        run(tmp_path / "a", trained, *name)
    cfg = run(tmp_path / "a", trained)
    cfg.defrost()
    cfg.MODEL.FPN.WARM_START_FROM = CfgNode(new_allowed=True)
    with pytest.raises(ValueError, match="WARM_START_FROM is empty: call .*resolve_config"):
        build_model(cfg)
    other = {**pyramid_settings(a_config(tmp_path, BIFPN))}
    cfg.MODEL.FPN.WARM_START_FROM = CfgNode(other, new_allowed=True)
    with pytest.raises(ValueError, match="WARM_START_FROM does not describe MODEL.WEIGHTS"):
        WarmStart(build_model(cfg), str(trained))(torch.load(trained)["model"])
    high = {**other, "TOPOLOGY": "fpn", "IN_FEATURES": ["res2"], "EXTRA_LEVELS": "none"}
    cfg.MODEL.FPN.WARM_START_FROM = CfgNode(high, new_allowed=True)
    cfg.merge_from_list(["MODEL.FPN.IN_FEATURES", "['res4']", "MODEL.FPN.EXTRA_LEVELS", "none"])
    with pytest.raises(ValueError, match="no level is in common: .* gives p2, the config's p4"):
        build_model(cfg)


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({}, {"EXTRA_LEVELS": "maxpool", "NORM": "", "OUT_CHANNELS": 32}),
        ({"MODEL__FPN__NORM": "GN"}, {"NORM": "GN"}),
        (
            {
                "MODEL__META_ARCHITECTURE": "RetinaNet",
                "MODEL__BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone",
                "MODEL__FPN__IN_FEATURES": ["res3", "res4", "res5"],
            },
            {"EXTRA_LEVELS": "conv_c5", "IN_FEATURES": ["res3", "res4", "res5"]},
        ),
    ],
)
def test_detectron2s_own_fpn_is_known_by_its_names(
    overrides: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    model = build_model(tiny_config(tmp_path, **overrides))
    torch.save({"model": model.state_dict()}, tmp_path / "d2.pth")
    found = describe_checkpoint(str(tmp_path / "d2.pth"))
    assert {key: found[key] for key in expected} == expected
    model = build_model(tiny_config(tmp_path, **keys({"TOPOLOGY": "pafpn"})))
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pth")
    with pytest.raises(ValueError, match=r"more than Detectron2's FPN \(backbone.pafpn_output3"):
        describe_checkpoint(str(tmp_path / "ours.pth"))


def convert(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *args])
    tool = load_tool("convert_weights")
    monkeypatch.setattr(tool, "setup_logger", lambda *args, **kwargs: None)
    tool.main()


def test_files_are_converted_both_ways(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_config(tmp_path, **keys({"TOPOLOGY": "pafpn"})).dump())
    out, there = tmp_path / "new" / "m.pth", ("--weights", str(trained))
    command = ("--config-file", str(config), *there, "--output", str(out))
    convert(monkeypatch, *command)
    recorded = yaml.safe_load((out.parent / "config.yaml").read_text())["MODEL"]["FPN"]
    assert recorded["WARM_START"] and recorded["WARM_START_FROM"]["TOPOLOGY"] == "fpn"
    assert "backbone.warm_gate3_fuse.weights" in torch.load(out)["model"]
    with pytest.raises(FileExistsError, match="--output .*m.pth exists"):
        convert(monkeypatch, *command)

    back = tmp_path / "d2.pth"
    convert(monkeypatch, "--to", "detectron2", *there, "--output", str(back))
    theirs = build_model(tiny_config(tmp_path, MODEL__MASK_ON=True, MODEL__ROI_MASK_HEAD__CONV_DIM=16))
    theirs.load_state_dict(torch.load(back)["model"])
    to = ("--to", "detectron2", "--weights", str(out), "--output", str(tmp_path / "no.pth"))
    with pytest.raises(ValueError, match="two pyramids"):
        convert(monkeypatch, *to)
    (out.parent / "config.yaml").write_text(a_config(tmp_path, {"TOPOLOGY": "pafpn"}).dump())
    with pytest.raises(ValueError, match="cannot become .*: MODEL.FPN.TOPOLOGY is 'pafpn', not 'f"):
        convert(monkeypatch, *to)
