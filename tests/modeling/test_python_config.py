"""Python configs in YAML's keys, and the config.yaml of their runs, which names code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from fpn_plugin import plugins, put_pyramid
from fpn_plugin.cli import show
from fpn_plugin.modeling.build import build_model
from fpn_plugin.modeling.described import load_model_config, run_keys
from fpn_plugin.modeling.python_config import is_python_config, read_python_config, test_mapper
from fpn_plugin.yaml_files import read_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LAZY = CONFIGS / "lazy"
TREES = LAZY / "faster_rcnn_trees_FPN.py"
D0 = "retinanet_R_50_BiFPN_D0_1x"
PAIRS = {
    TREES: CONFIGS / "quickstart" / "faster_rcnn_trees_FPN.yaml",
    LAZY / f"{D0}.py": CONFIGS / "COCO-Detection" / f"{D0}.yaml",
}
test_mapper.__test__ = False  # type: ignore[attr-defined]  # no test, in spite of its name


@pytest.mark.parametrize("python", PAIRS, ids=lambda path: path.stem)
def test_the_same_model_shows_the_same_table(
    python: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    texts = []
    for file in (python, PAIRS[python]):
        show.run(show.parse_args(["--config-file", str(file), "--size", "64", "64"]))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_the_keys_of_a_yaml_config() -> None:
    cfg, twin = load_model_config(str(TREES)), load_model_config(str(PAIRS[TREES]))
    keys = (
        *("MODEL.META_ARCHITECTURE", "MODEL.MASK_ON", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"),
        *("MODEL.ROI_HEADS.NAME", "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_HEADS.IN_FEATURES"),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "MODEL.RPN.IN_FEATURES", "MODEL.BACKBONE.NAME"),
        *("MODEL.BOTTOM_UP.NAME", "MODEL.BOTTOM_UP.WEIGHTS", "MODEL.FPN.TOPOLOGY"),
        *("MODEL.FPN.OUT_CHANNELS", "MODEL.FPN.NORM", "MODEL.DEVICE", "TEST.DETECTIONS_PER_IMAGE"),
        *("INPUT.FORMAT", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"),
        *("DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.BASE_LR", "SOLVER.MAX_ITER"),
    )
    for key in keys:
        value, expected = _value(cfg, key), _value(twin, key)
        is_list = isinstance(expected, (list, tuple))
        assert (list(value) if is_list else value) == (list(expected) if is_list else expected), key
    assert test_mapper(cfg).augmentations.augs[0].short_edge_length == (400, 400)


def test_what_a_run_writes_down_is_taken_without_running_tags(tmp_path: Path) -> None:
    python = read_python_config(str(TREES), ["model.backbone.bottom_up.weights=gone.pth"])
    file = tmp_path / "config.yaml"
    LazyConfig.save(python, str(file))
    assert "!!python/object:" in file.read_text() and is_python_config(str(file))
    cfg, before = load_model_config(str(file)), load_model_config(str(TREES))
    cfg.MODEL.BOTTOM_UP.WEIGHTS = before.MODEL.BOTTOM_UP.WEIGHTS = (
        ""  # of a network that may be gone
    )
    states = [build_model(each).state_dict() for each in (cfg, before)]
    assert [(k, x.shape) for k, x in states[0].items()] == [
        (k, x.shape) for k, x in states[1].items()
    ]
    keys = run_keys(read_yaml(str(file), objects=True))  # read without building anything
    for key in ("MODEL.FPN.TOPOLOGY", "MODEL.FPN.IN_FEATURES", "INPUT.MIN_SIZE_TEST"):
        assert keys[key] == _value(before, key)
    assert keys["model.backbone.topology"] == "fpn"


def _value(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize(
    "target, more",
    [
        ("os.system", "command: 'touch RUN'"),
        ("torch.nn.os.system", "command: 'touch RUN'"),
        ("detectron2.modeling.backbone.fpn.math.sqrt", "x: 4"),
        ("${code}", "command: 'touch RUN'"),
        ("torch.hub.load", "repo_or_dir: RUN"),
        ("torch.load", "f: RUN"),
        ("detectron2.config.LazyConfig.load", "filename: RUN.py"),
        ("fpn_plugin.cli.main.main", "argv: [demo]"),
        ("fpn_plugin.modeling.python_config.read_python_config", "path: RUN.py"),
        ("stranger.build", ""),
        ("{_target_: builtins.eval}", ""),
    ],
)
def test_a_strangers_yaml_calls_nothing(
    target: str, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("RUN.py", "stranger.py"):
        (tmp_path / name).write_text("open('ran', 'w')\nmodel = {}\n")
    lines = ["model:", f"  _target_: {target}", *([f"  {more}"] if more else []), "code: os.system"]
    file = tmp_path / "config.yaml"
    file.write_text("\n".join([*lines, "train: {}", "optimizer: {}", "lr_multiplier: {}", ""]))
    with pytest.raises(ValueError, match=r"config.yaml: model._target_: .*--trust-imports"):
        load_model_config(str(file))
    file.write_text("model: {_target_: x, y: !!python/object/apply:os.system ['touch RUN']}\n")
    with pytest.raises(ValueError, match="is no plain YAML"):
        load_model_config(str(file))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "RUN.py",
        "config.yaml",
        "stranger.py",
    ]


@pytest.mark.parametrize(
    "override, message",
    [
        ("MODEL.FPN.TOPOLOGY", "a Python config takes overrides as path.key=value"),
        ("model.backbone.topologyy=bifpn", "model: .*unexpected keyword argument 'topologyy'"),
        ("model.backbone.topology=bifnp", "topology: unknown .*bifnp.*"),
        ("model.pixel_mean.x.y=1", "override 'model.pixel_mean.x.y=1'"),
        ("model.x=[1", "override 'model.x=\\[1'"),
    ],
)
def test_mistakes_name_the_override(override: str, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        load_model_config(str(TREES), [override])


def test_put_pyramid_needs_a_network() -> None:
    with pytest.raises(ValueError, match="put_pyramid: the model has no backbone.bottom_up"):
        put_pyramid(OmegaConf.create({"backbone": {}}), topology="fpn")


def test_a_config_of_detectron2s_zoo_by_its_name() -> None:
    cfg = load_model_config("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.py")
    assert cfg.MODEL.BACKBONE.NAME == "ResNet" and cfg.MODEL.MASK_ON


def test_a_users_own_module_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "own_models_of_a_test.py"
    module.write_text("from detectron2.modeling import GeneralizedRCNN as G\nclass Own(G): pass\n")
    file = tmp_path / "config.yaml"
    LazyConfig.save(read_python_config(str(TREES)), str(file))
    text = file.read_text().replace("detectron2.modeling.GeneralizedRCNN", f"{module.stem}.Own")
    file.write_text(text)
    with pytest.raises(ValueError, match="own_models_of_a_test.Own.*--import MODULE"):
        load_model_config(str(file))
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.load([str(module)])
    assert load_model_config(str(file)).MODEL.META_ARCHITECTURE == "Own"
