"""A pyramid's settings: one record behind the config, the constructor, a warm start and the docs;
one resolver; a pyramid that knows no config."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from helpers import zoo_config
from torch import nn

from fpn_plugin import PyramidBackbone, add_fpn_config, resolve_config
from fpn_plugin.config import PyramidSettings, defaults, load_config, settings
from fpn_plugin.config.files import merge_config_file, merge_overrides
from fpn_plugin.config.pixels import pixel_notes
from fpn_plugin.config.warm_start import resolve_warm_start, warm_settings
from fpn_plugin.engine.setup import argument_parser
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.pyramid.topologies import TOPOLOGIES, fpn

ROOT = Path(__file__).resolve().parents[2]
MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RPN, ROI = "MODEL.RPN.IN_FEATURES", "MODEL.ROI_HEADS.IN_FEATURES"
SMALL = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
SMALL += ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32]
AUTO = [RPN, ["auto"], ROI, ["auto"], "MODEL.ANCHOR_GENERATOR.SIZES", ["auto"]]


def config(*overrides: Any) -> CfgNode:
    name = ["MODEL.BACKBONE.NAME", "build_pyramid_backbone"]
    return zoo_config(MASK, *SMALL, *name, *overrides)


def ours() -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    return cfg


class Network(nn.Module):
    """Stands for a bottom-up network."""

    size_divisibility = 0

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"res{level}": ShapeSpec(channels=8, stride=2**level) for level in (3, 4)}


@dataclass(frozen=True, eq=False)
class Extended(PyramidSettings):
    """With one more key."""

    strength: float = settings._setting(0.5, "how strong it is")


def test_a_new_field_is_a_new_key_everywhere(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(settings, "PyramidSettings", Extended)
    defaults.plugin_keys.cache_clear()
    request.addfinalizer(defaults.plugin_keys.cache_clear)
    cfg = config()
    assert cfg.MODEL.FPN.STRENGTH == 0.5
    merge_overrides(cfg, ["MODEL.FPN.STRENGTH", "0.25"])
    assert settings.read_settings(cfg).as_keys()["STRENGTH"] == 0.25
    assert PyramidBackbone.from_config(cfg, ShapeSpec(channels=3))["settings"].strength == 0.25
    built = PyramidBackbone(Network(), in_features=["res3", "res4"], out_channels=8, strength=2.0)
    assert built.settings.strength == 2.0
    cfg.MODEL.FPN.WARM_START = True
    source = {"IN_FEATURES": ["res3"], "OUT_CHANNELS": 8, "STRENGTH": 0.75}
    cfg.MODEL.FPN.WARM_START_FROM = CfgNode(source, new_allowed=True)
    assert warm_settings(cfg).strength == 0.75
    assert "| `MODEL.FPN.STRENGTH` | `0.5` | how strong it is |" in defaults.page()


def test_a_record_and_its_fields_build_the_same_pyramid() -> None:
    fields = {"in_features": ["res3", "res4"], "out_channels": 8, "topology": "pafpn"}
    one = PyramidBackbone(Network(), settings=PyramidSettings(**fields))
    two = PyramidBackbone(Network(), **fields)
    # the order of the arguments of Detectron2's FPN
    three = PyramidBackbone(Network(), ["res3", "res4"], 8, topology="pafpn")
    assert one.settings == two.settings == three.settings and one.graph == two.graph
    assert list(one.state_dict()) == list(two.state_dict())
    assert PyramidSettings(repeats=1) != PyramidSettings(repeats=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="strength"):
        PyramidBackbone(Network(), **fields, strength=1)
    for given in (["res3"], one.settings):
        with pytest.raises(TypeError, match="settings: .*out_channels"):
            PyramidBackbone(Network(), settings=given, out_channels=8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"fuse_type": "add"}, "^fuse_type: unknown name 'add'.*fast_normalized"),
        ({"topology": "fnp"}, "^topology: unknown name 'fnp'.*pafpn"),
        ({"extra_levels": "conv_c6"}, "^extra_levels: unknown name 'conv_c6'.*conv_c5"),
        ({"topology": "simple"}, "^topology: 'simple' reads one map, but `in_features`"),
        ({"in_features": ["res9"]}, "^in_features: .*'res9', but res3, res4"),
        ({"in_features": "res3"}, "^in_features: 'res3' is not a list"),
        ({"graph": [{"name": "a"}]}, r"^graph\[0\]: the field 'level'"),
        ({"repeats": 0}, "^repeats: 0 is not"),
        ({"lateral": None}, "^lateral: None"),
        ({"norm": "XN"}, "^norm: unknown norm 'XN'"),
    ],
)
def test_errors_of_the_constructor_name_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message) as error:
        PyramidBackbone(Network(), **{"in_features": ["res3", "res4"], **arguments})
    assert "MODEL.FPN" not in str(error.value)


def test_the_pyramid_knows_no_config() -> None:
    for path in (ROOT / "fpn_plugin/pyramid").rglob("*.py"):
        text = path.read_text()
        assert "MODEL." not in text and "detectron2.config" not in text, path


def test_a_graph_is_built_and_checked_once_per_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(inputs: Any, style: Any) -> Any:
        calls.append("topology")
        return fpn.fpn(inputs, style)

    monkeypatch.setitem(TOPOLOGIES._objects, "counted", counted)
    checks = PyramidSettings.check.cache_info().misses
    cfg = resolve_config(config(*AUTO, "MODEL.FPN.TOPOLOGY", "counted"))
    assert list(build_model(cfg).backbone.output_shape()) == cfg.MODEL.RPN.IN_FEATURES
    assert calls == ["topology"]
    assert PyramidSettings.check.cache_info().misses == checks + 1


def test_the_backbone_alone_is_built_whatever_the_heads_say() -> None:
    custom = ["MODEL.FPN.IN_FEATURES", ["res4", "res5"]]
    assert list(build_backbone(config(*custom)).output_shape()) == ["p4", "p5", "p6"]


@pytest.mark.parametrize("network", ["build_resnet_backbone", "build_third_party_backbone"])
def test_heads_are_checked_before_a_whole_model(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the names of a network's maps say nothing of their levels, when it is built."""
    from detectron2.modeling import BACKBONE_REGISTRY

    resnet = BACKBONE_REGISTRY.get("build_resnet_backbone")
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "build_third_party_backbone", resnet)
    cfg = config("MODEL.BOTTOM_UP.NAME", network, RPN, ["p2", "p9"])
    with pytest.raises(ValueError, match=r"MODEL.RPN.IN_FEATURES: \['p9'\].*p2, p3, p4, p5, p6"):
        build_model(resolve_config(cfg.clone()))
    with pytest.raises(ValueError, match=r"MODEL.RPN.IN_FEATURES: \['p9'\].*p2, p3, p4, p5, p6"):
        Trainer.build_model(cfg)


def test_a_dilated_network_is_left_to_the_builder() -> None:
    """Its res5 is of the level of res4, which its name does not say."""
    keys = ["MODEL.RESNETS.RES5_DILATION", 2, "MODEL.FPN.IN_FEATURES", ["res5"]]
    keys += ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256]
    keys += ["MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.FPN.EXTRA_LEVELS", "none"]
    keys += [RPN, ["p4"], ROI, ["p4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32]]]
    assert list(build_backbone(resolve_config(config(*keys))).output_shape()) == ["p4"]


def test_what_was_found_out_goes_with_the_copies_of_a_config() -> None:
    cfg = resolve_config(config())
    (line,) = pixel_notes(cfg)
    assert "MODEL.BOTTOM_UP.WEIGHTS is empty" in line[1]
    assert pixel_notes(cfg.clone()) == pixel_notes(pickle.loads(pickle.dumps(cfg))) == (line,)
    assert cfg.dump() == config().dump()


def test_the_page_of_keys_is_the_generated_one() -> None:
    """`python -m fpn_plugin.config > docs/config.md` writes it."""
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == defaults.page()
    plain, with_ours = get_cfg(), ours()
    missing = [key for key in leaves(with_ours) - leaves(plain) if f"| `{key}` |" not in page]
    assert sorted(missing) == sorted(defaults._DETECTRON2_KEYS)


def leaves(node: CfgNode, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in node.items():
        is_section = isinstance(value, CfgNode) and value
        keys |= leaves(value, f"{prefix}{key}.") if is_section else {prefix + key}
    return keys


CHANGED = {"MODEL.FPN.TRITON": True, "MODEL.FPN.MERGE_PROJECTIONS": True}
CHANGED["DATALOADER.CACHE_IMAGES"] = 500


def write(path: Path, key: str, value: Any) -> str:
    """The config.yaml of a run of the version before, with this value of a key that is gone."""
    cfg = ours()
    section, _, name = key.rpartition(".")
    node: Any = cfg
    for part in section.split("."):
        node = node[part]
    node[name] = value
    path.write_text(cfg.dump())
    return str(path)


@pytest.mark.parametrize("key", defaults.GONE)
def test_a_key_that_is_gone(key: str, tmp_path: Path) -> None:
    gone = defaults.GONE[key]
    old = write(tmp_path / "config.yaml", key, gone.default)
    cfg = ours()
    merge_config_file(cfg, old)
    assert yaml.safe_load(cfg.dump()) == yaml.safe_load(ours().dump())
    cfg.merge_from_file(old)  # yacs's own way
    (tmp_path / "above.yaml").write_text("_BASE_: changed.yaml\n")
    changed = write(tmp_path / "changed.yaml", key, CHANGED[key])
    for path in (changed, str(tmp_path / "above.yaml")):
        args = argument_parser().parse_args(["--config-file", path])
        with pytest.raises(ValueError, match=f"changed.yaml: {key}: {CHANGED[key]}.*is gone"):
            load_config(args)
    for value in (gone.default, CHANGED[key]):
        with pytest.raises(ValueError, match=f"{key}: '{value}' .*{gone.reason[:9]}"):
            merge_overrides(ours(), [key, str(value)])


@pytest.mark.parametrize("argument", ["triton", "merge_projections"])
def test_an_argument_that_is_gone(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: False .* is gone"):
        PyramidBackbone(Network(), in_features=["res3"], **{argument: False})


def test_a_checkpoint_of_a_run_with_a_key_that_is_gone(tmp_path: Path) -> None:
    write(tmp_path / "config.yaml", "MODEL.FPN.TRITON", True)
    cfg = config("MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    resolve_config(cfg)  # nothing but the pixels is taken from that run
    message = "config.yaml: MODEL.FPN.TRITON: True .* is gone"
    with pytest.raises(ValueError, match=message):
        resolve_warm_start(cfg, str(tmp_path / "model_final.pth"))  # --resume
    cfg.MODEL.FPN.WARM_START = True
    with pytest.raises(ValueError, match=message):
        resolve_config(cfg)
    write(tmp_path / "config.yaml", "MODEL.FPN.TRITON", False)
    cfg.MODEL.FPN.WARM_START = False
    resolve_config(cfg, str(tmp_path / "model_final.pth"))
