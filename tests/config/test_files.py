"""YAML configs say what they said to Detectron2, run no code, and every fault names the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from fpn_plugin import add_fpn_config
from fpn_plugin.config import load_config
from fpn_plugin.config.files import find_config_file, merge_config_file, merge_overrides
from fpn_plugin.engine import lazy
from fpn_plugin.engine.setup import argument_parser
from fpn_plugin.yaml_files import evaluate, read_yaml

ROOT = Path(__file__).resolve().parents[2]
ZOO = Path(model_zoo.__file__).with_name("configs")
FILES = sorted(
    path
    for path in [*ZOO.rglob("*.yaml"), *(ROOT / "configs").rglob("*.yaml")]
    if "studies" not in path.parts
)


def ours() -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    return cfg


def merged(path: Path) -> CfgNode:
    cfg = ours()
    merge_config_file(cfg, str(path))
    return cfg


def test_every_config_of_the_zoo_and_of_ours_says_what_it_says_to_detectron2() -> None:
    retinanet = ZOO / "Base-RetinaNet.yaml"  # with arithmetic in it
    assert len(FILES) > 80 and "python/object/apply:eval" in retinanet.read_text()
    for path in [retinanet, *FILES[::4]]:
        theirs = ours()
        theirs.merge_from_file(str(path))
        assert merged(path) == theirs, path


CODE = {
    "call": "OUTPUT_DIR: !!python/object/apply:os.mkdir [{marker}]",
    "new": "OUTPUT_DIR: !!python/object/new:os.mkdir [{marker}]",
    "eval": "OUTPUT_DIR: !!python/object/apply:eval [\"__import__('os').mkdir('{marker}')\"]",
    "name": "OUTPUT_DIR: !!python/name:os.mkdir",
    "module": "OUTPUT_DIR: !!python/module:antigravity",
}


@pytest.mark.parametrize("place", ["file", "base"])
@pytest.mark.parametrize("kind", CODE)
def test_a_config_runs_no_code(kind: str, place: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "x.yaml"
    path.write_text(CODE[kind].format(marker=marker) + "\n")
    given = path
    if place == "base":
        given = tmp_path / "y.yaml"
        given.write_text("_BASE_: x.yaml\n")
    args = argument_parser().parse_args(["--config-file", str(given)])
    with pytest.raises(ValueError, match="x.yaml: is no plain YAML.*no code of a config is run"):
        load_config(args)
    assert not marker.exists()
    if kind in ("call", "eval"):
        ours().merge_from_file(str(given))
        assert marker.exists()  # it would have


BAD = {
    "no yaml": ("a: [", "is no plain YAML, line 1: expected the node content"),
    "list": ("- a\n", "holds a list, not keys with values"),
    "text": ("hello", "holds a str, not keys with values"),
    "not text": (b"\xff\xfe\x00\x01", "cannot be read|is no plain YAML"),
    "impossible date": ("OUTPUT_DIR: 2000-99-99", "cannot be read: month"),
    "nested": ("a: " + "[" * 1000, "nested too deeply"),
    "itself": ("MODEL: {FPN: {GRAPH: &a [*a]}}", "anchors stand for more than 100000 values"),
    "unhashable key": ("{[1]: 2}: 3", "is no plain YAML"),
    "bomb": (
        "\n".join(["x0: &x0 [1]"] + [f"x{i}: &x{i} [{f'*x{i - 1},' * 9}]" for i in range(1, 9)]),
        "anchors stand for more than 100000 values",
    ),
    "unknown key": ("MODEL: {FPN: {TOPOLOGI: fpn}}", "x.yaml: config key: .*TOPOLOGI.*TOPOLOGY"),
    "key no text": ("MODEL: {1: 2}", "x.yaml: config key: unknown name 'MODEL.1'"),
    "section for a value": ("OUTPUT_DIR: {a: 1}", "OUTPUT_DIR is a str, but {'a': 1} is given"),
    "value for a section": ("MODEL: 3", "MODEL is a section of keys, but 3 is given"),
    "other type": ("SOLVER: {MAX_ITER: many}", "x.yaml: Type mismatch.*SOLVER.MAX_ITER"),
    "none": ("SOLVER: {MAX_ITER: null}", "x.yaml: SOLVER.MAX_ITER: None is given, .* an? int"),
    "date": ("OUTPUT_DIR: 2001-01-01", "x.yaml: Key OUTPUT_DIR with value .*date"),
    "other version": ("VERSION: 1", "VERSION 1: only 2 is read"),
    "base itself": ("_BASE_: x.yaml", "x.yaml: is its own _BASE_"),
    "base missing": ("_BASE_: y.yaml", "x.yaml: _BASE_ 'y.yaml': there is no file"),
    "base no path": ("_BASE_: 3", "_BASE_ 3 is no path"),
    "section twice": (
        "MODEL: {MASK_ON: true}\nSEED: 1\nMODEL: {MASK_ON: false}",
        "x.yaml: has a key twice, line 3: MODEL is there already, in line 1",
    ),
    "key twice": ("SOLVER:\n  GAMMA: 1\n  'GAMMA': 1", "line 3: SOLVER.GAMMA is there .* line 2"),
    "key twice in a list": (
        "MODEL: {FPN: {GRAPH: [{}, {level: 3, level: 4}]}}",
        r"line 1: MODEL.FPN.GRAPH\[1\].level is there already",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_every_fault_names_the_file(kind: str, tmp_path: Path) -> None:
    content, message = BAD[kind]
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=message) as error:
        merged(path)
    assert "x.yaml" in str(error.value)


def test_a_base_is_found_beside_the_file_below_home_and_among_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("SEED: 1\nSOLVER: {MAX_ITER: 5, GAMMA: 0.5}\n")
    (tmp_path / "b.yaml").write_text("SOLVER: {MAX_ITER: 6}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.yaml").write_text("_BASE_: [../a.yaml, ~/b.yaml]\nSEED: 2\n")
    cfg = merged(tmp_path / "sub" / "c.yaml")
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.GAMMA) == (2, 6, 0.5)
    (tmp_path / "d.yaml").write_text("_BASE_: a.yaml\nSOLVER: 3\n")
    with pytest.raises(ValueError, match="d.yaml: SOLVER is a section of keys"):
        merged(tmp_path / "d.yaml")
    (tmp_path / "e.yaml").write_text("_BASE_: a.yaml\nSEED: {a: 3}\n")
    with pytest.raises(ValueError, match="e.yaml: SEED is a section here, but a value in _BASE_"):
        merged(tmp_path / "e.yaml")


def test_a_key_twice_is_refused_in_a_base_and_in_python_configs_dumps(tmp_path: Path) -> None:
    base, above = tmp_path / "base.yaml", tmp_path / "x.yaml"
    base.write_text("SEED: 1\nSEED: 2\n")
    above.write_text("_BASE_: base.yaml\n")
    for read in (merged, lambda path: lazy.load_config(str(path.with_name("base.yaml")))):
        with pytest.raises(ValueError, match="base.yaml: has a key twice, line 2: SEED"):
            read(above)


def test_what_an_anchor_stands_for_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("SOLVER: {<<: {GAMMA: 0.5, BASE_LR: 1.0}, GAMMA: 0.25}\n")
    cfg = merged(tmp_path / "x.yaml")
    assert (cfg.SOLVER.GAMMA, cfg.SOLVER.BASE_LR) == (0.25, 1.0)


def test_an_empty_file_changes_nothing_and_tuples_are_plain(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("")
    assert merged(tmp_path / "x.yaml") == ours()
    (tmp_path / "x.yaml").write_text("SOLVER: {STEPS: !!python/tuple [1, 2]}")
    assert merged(tmp_path / "x.yaml").SOLVER.STEPS == (1, 2)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "open('x')",
        "(1).real",
        "[1][0]",
        "'a' * 9",
        "[0] * 10**9",
        "9 ** 9 ** 9",
        "1e300 ** 2",
        "1 / 0",
        "(-1) ** 0.5 ** 0.5",
        "[x for x in 5]",
        "[x for x in [1] if x]",
        "[y for x in [1]]",
        "lambda: 1",
        "True",
        "",
        "(" * 300,
        "x := 1",
        "-" * 9000 + "1",
    ],
)
def test_what_is_no_arithmetic_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        evaluate(text)


def test_arithmetic_is_pythons() -> None:
    for text in (
        "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]",
        "(1, -2.5, [+3])",
        "[[a + b for a in (1, 2)] for b in [3]]",
    ):
        assert evaluate(text) == eval(text)


OVERRIDES = [
    ("MODEL", "{}", "MODEL is a section of keys"),
    ("MODEL.FPN", "1", "MODEL.FPN is a section of keys"),
    ("SOLVER.MAX_ITER", "None", "SOLVER.MAX_ITER: None is given, but it takes a int"),
    ("SOLVER.MAX_ITER", "x", "SOLVER.MAX_ITER: Type mismatch"),
    ("SOLVER.STEPS", "{[]: 1}", "SOLVER.STEPS: "),
    ("OUTPUT_DIR", "!!python/object/apply:os.mkdir [ran]", ""),
    ("MODEL.BOTTOM_UP.ARGS", "!!python/object/apply:os.mkdir [ran]", "is no dict"),
    ("MODEL.BOTTOM_UP.ARGS", "__import__('os').mkdir('ran')", "is no dict"),
    ("OUTPUT_DIR", "__import__('os').mkdir('ran')", ""),
]


@pytest.mark.parametrize("key, value, message", OVERRIDES)
def test_an_override_runs_no_code_and_names_its_key(
    key: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if message:
        with pytest.raises(ValueError, match=message):
            merge_overrides(ours(), [key, value])
    else:
        cfg: Any = ours()
        merge_overrides(cfg, [key, value])
        assert cfg.OUTPUT_DIR == value  # the text itself
    assert os.listdir(tmp_path) == []


def test_what_a_run_records_is_read_as_it_was(tmp_path: Path) -> None:
    cfg = merged(ROOT / "configs" / "quickstart" / "faster_rcnn_trees_FPN.yaml")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert yaml.safe_load(cfg.dump()) == read_yaml(str(tmp_path / "config.yaml"))
    theirs = ours()
    theirs.merge_from_file(str(tmp_path / "config.yaml"))
    assert merged(tmp_path / "config.yaml") == theirs


def test_merged_sections_that_grow_without_end(tmp_path: Path) -> None:
    lines = ["a0: &a0 {b: 1, c: 2}"]
    for i in range(1, 12):
        lines.append(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}")
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="bomb.yaml.*more than 100000 keys"):
        read_yaml(str(path))


def test_lists_inside_of_lists_that_grow_without_end() -> None:
    text = "1"
    for _ in range(12):
        text = f"[{text} for a in [{', '.join('1' * 10)}]]"
    with pytest.raises(ValueError, match="more than 100000 steps"):
        evaluate(text)


@pytest.mark.parametrize(
    "key, meant",
    [
        ("MODEL.FPN.TOPOLGY", "MODEL.FPN.TOPOLOGY"),
        ("model.fpn.topology", "MODEL.FPN.TOPOLOGY"),
        ("MODEL.FPNN.TOPOLOGY", "MODEL.FPN.TOPOLOGY"),
        ("FPN.TOPOLOGY", "MODEL.FPN.TOPOLOGY"),
        ("MODEL.ANCHOR_GENERATOR.SIZE", "MODEL.ANCHOR_GENERATOR.SIZES"),
    ],
)
def test_a_wrong_key_gets_the_right_one(key: str, meant: str) -> None:
    with pytest.raises(KeyError, match=f"'{key}' .did you mean '{meant}'"):
        merge_overrides(ours(), [key, "x"])


BOTH = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"


@pytest.mark.parametrize(
    "name, root",
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_BiFPN_1x.yaml", ROOT / "configs"),
        ("configs/lazy/faster_rcnn_trees_FPN.py", ROOT / "configs"),
        ("./configs/quickstart/faster_rcnn_trees_FPN", ROOT / "configs"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", ZOO),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x", ZOO),
        ("Misc/torchvision_imagenet_R_50.py", ZOO),
        (f"{BOTH}.yaml", ROOT / "configs"),  # of both
        (BOTH, ROOT / "configs"),
    ],
)
def test_a_config_is_found_by_its_name_in_any_folder(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_config_file(name)
    assert Path(found).is_relative_to(root) and Path(found).is_file()
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    assert find_config_file(name) == name  # a file comes first


def test_the_log_says_which_of_two_configs_of_one_name_is_taken(
    log: pytest.LogCaptureFixture,
) -> None:
    ours, zoo = (str(root / f"{BOTH}.yaml") for root in (ROOT / "configs", ZOO))
    assert find_config_file(f"{BOTH}.yaml") == ours
    assert f"taking this plugin's, {ours}; Detectron2's of this name is {zoo}" in log.text
    assert find_config_file(f"{BOTH}.yaml", zoo_first=True) == zoo


@pytest.mark.parametrize(
    "name, similar",
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_BiFPM_1x.yaml", "mask_rcnn_R_50_BiFPN_1x.yaml"),
        ("mask_rcnn_R_50_BiFPN_1x", "COCO-InstanceSegmentation/mask_rcnn_R_50_BiFPN_1x.yaml"),
        ("coco-detection/retinanet_r_50_fpn_3x.yaml", "COCO-Detection/retinanet_R_50_FPN_3x.yaml"),
        ("../configs/quickstart/faster_rcnn_trees_FPN.yaml", "quickstart/faster_rcnn_trees_FPN"),
        ("/no/such/faster_rcnn_trees_FPN.yaml", "quickstart/faster_rcnn_trees_FPN.yaml"),
        ("quickstart", ""),
        ("nothing/of/the/kind.yaml", ""),
    ],
)
def test_a_config_that_is_not_found_names_similar_ones(
    name: str, similar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        find_config_file(name)
    text = str(error.value)
    assert text.startswith(f"--config-file {name!r}: there is no file") and similar in text
    assert "Detectron2" in text


def test_a_base_may_be_a_configs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also below the folder that the file itself is in, and never from the current folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.yaml").write_text("_BASE_: [b.yaml, quickstart/Base-quickstart.yaml]\n")
    (tmp_path / "mine" / "b.yaml").write_text("_BASE_: COCO-Detection/retinanet_R_50_FPN_3x.yaml\n")
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "Base-quickstart.yaml").write_text("SEED: 77\n")
    monkeypatch.chdir(tmp_path)
    cfg = merged(tmp_path / "mine" / "a.yaml")
    assert cfg.SEED != 77 and cfg.SOLVER.OPTIMIZER == "AdamW"
    assert cfg.SOLVER.MAX_ITER == 270000


def load(*words: str) -> CfgNode:
    return load_config(argument_parser().parse_args(list(words)))


def test_own_data_in_a_file_is_beside_it_and_on_a_command_line_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("configs/base", "data", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configs/base/b.yaml").write_text(
        "DATASETS: {OWN: {TRAIN_JSON: t.json, VAL_JSON: v.json, VAL_IMAGES: ~/images}}\n"
    )
    mine = tmp_path / "configs/mine.yaml"
    mine.write_text("_BASE_: base/b.yaml\nDATASETS: {OWN: {VAL_JSON: ../data/v.json}}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = ["--config-file", "../configs/mine.yaml", "--train-images", "images"]
    expected = {
        "TRAIN_JSON": tmp_path / "configs/base/t.json",
        "TRAIN_IMAGES": tmp_path / "elsewhere/images",
        "VAL_JSON": tmp_path / "data/v.json",
        "VAL_IMAGES": tmp_path / "images",
    }
    own = load(*words).DATASETS.OWN
    assert own == {key: str(path) for key, path in expected.items()}
    # what a run writes down means the same from its own folder
    (tmp_path / "config.yaml").write_text(load(*words).dump())
    assert load("--config-file", str(tmp_path / "config.yaml")).DATASETS.OWN == own
    # what is there only when it is taken from the current folder
    (tmp_path / "data/v.json").touch()
    (tmp_path / "elsewhere/t.json").touch()
    with pytest.raises(ValueError, match="TRAIN_JSON: 't.json' .*write '../../elsewhere/t.json'"):
        load(*words)
    assert load(*words, "DATASETS.OWN.TRAIN_JSON", "t.json").DATASETS.OWN.TRAIN_JSON == str(
        tmp_path / "elsewhere/t.json"
    )
    (tmp_path / "configs/base/t.json").touch()
    assert load(*words).DATASETS.OWN == own
