"""A user's own code: what imports it, what does not, and how it reaches other processes."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode
from helpers import own_imports, zoo_config

from fpn_plugin import plugins, resolve_config
from fpn_plugin.cli import show
from fpn_plugin.cli.main import load_plugins
from fpn_plugin.config import load_config
from fpn_plugin.data.dataset_checks import require_registered
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.modeling.build import build_model
from fpn_plugin.pyramid import FUSIONS
from fpn_plugin.registry import HOW_TO_ADD
from fpn_plugin.study.config import read_study
from fpn_plugin.study.plan import plan_runs

TREES = Path(__file__).resolve().parent.parent / "configs/quickstart/faster_rcnn_trees_FPN.yaml"
FUSION = """
from fpn_plugin.pyramid import FUSIONS, Fusion

@FUSIONS.register("twice")
class Twice(Fusion):
    def forward(self, maps):
        return 2 * maps[0] + maps[1]
"""
TWICE = ("MODEL.FPN.FUSE_TYPE", "twice")


def write(files: dict[str, str]) -> None:
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def load(*words: str, config: str | Path = TREES) -> CfgNode:
    """The config of a command line, which imports as every command does."""
    args = show.parse_args(["--config-file", str(config), *words])
    load_plugins(args)
    return load_config(args)


@pytest.mark.parametrize(
    "file, names, recorded",
    [
        ("mine.py", ["mine"], "mine.py"),
        ("mine.py", ["mine.py", "./mine.py", "mine"], "mine.py"),
        ("a folder/my-fusions.py", ["a folder/my-fusions.py"], "a folder/my-fusions.py"),
        ("parts/mine.py", ["parts.mine", "parts/mine.py"], "parts/mine.py"),
        ("pack/mine.py", ["pack/mine.py", "pack.mine"], "pack/mine.py"),
        ("pack/__init__.py", ["pack"], "pack/__init__.py"),
        ("site/elsewhere.py", ["elsewhere"], "elsewhere"),
        ("site/elsewhere.py", ["elsewhere", "site/elsewhere.py"], "elsewhere"),
    ],
)
def test_modules_and_files_are_imported_once_and_recorded(
    file: str, names: list[str], recorded: str, own_folder: Path
) -> None:
    (own_folder / "pack").mkdir()
    (own_folder / "pack" / "__init__.py").touch()
    write({file: FUSION})
    sys.path.append(str(own_folder / "site"))
    cfg = load(*plugins.flags(names), *TWICE)
    assert "twice" in FUSIONS
    assert cfg.IMPORTS[0] == (str(own_folder / recorded) if "." in recorded else recorded)
    # a run writes its config into its folder: evaluating takes the same, from wherever
    write({"run/config.yaml": cfg.dump()})
    assert load(config="run/config.yaml").IMPORTS == cfg.IMPORTS


@pytest.mark.parametrize(
    "name, expected",
    [
        ("mien", "there is no module of that name.*did you mean mine.py"),
        ("mien.py", "there is no file .*mien.py .did you mean mine.py"),
        ("./mine", "there is no file .*mine .did you mean mine.py"),
        ("pack", "there is no module"),
        ("pack/", "is a folder; give a .py file"),
        ("my-fusions", "there is no module.*did you mean my-fusions.py"),
        ("notes.txt/../notes", "there is no file"),
        ("./notes.txt", "no Python file"),
        ("https://example.com/x.py", "there is no file"),
        ("", "''"),
        ("mine.more", "there is no module"),
        ("json.py", "another module 'json'.*rename the file"),
        ("other/mine.py", "twice.*registered already.*mine.Twice"),
        ("sum.py", "'sum' is registered already, as fpn_plugin.pyramid.fusion.Sum"),
        ("broken.py", r"broken.py\", line 2.*\n.*1 / 0\n.*\nZeroDivisionError"),
        ("syntax.py", "syntax.py.*line 1.*\n.*\n.*\nSyntaxError"),
        ("leaves.py", "SystemExit: 3"),
        ("needs.py", "No module named 'not_installed'"),
    ],
)
def test_what_cannot_be_imported(name: str, expected: str, own_folder: Path) -> None:
    write({"mine.py": FUSION, "other/mine.py": FUSION, "my-fusions.py": "", "notes.txt": ""})
    write({"sum.py": FUSION.replace("twice", "sum"), "json.py": "", "syntax.py": "x = = 1"})
    write({"broken.py": "def f():\n    return 1 / 0\nf()", "leaves.py": "raise SystemExit(3)"})
    write({"needs.py": "import not_installed", "pack/x.txt": ""})
    if name == "other/mine.py":
        write({"other/other_mine.py": FUSION})
        name, expected = "other/other_mine.py", expected
        plugins.load(["mine"])
    with pytest.raises((ValueError, ImportError), match=f"(?s)--import {name}.*{expected}"):
        load("--import", name)


def test_a_config_imports_nothing_unless_it_is_trusted(own_folder: Path) -> None:
    """Nor does its `_BASE_`, nor a run's own config.yaml."""
    write({"evil/evil.py": "open('ran', 'w')\n" + FUSION, "other/evil.py": FUSION})
    base, child = f"_BASE_: {TREES}\nIMPORTS: [evil.py]\n", "_BASE_: evil/base.yaml\n"
    write({"evil/base.yaml": base, "child.yaml": child})
    file, key = str(own_folder / "evil" / "evil.py"), '--trust-imports.*IMPORTS "\\[\\]"'
    for config in ("evil/base.yaml", "child.yaml"):
        with pytest.raises(
            ValueError, match=f"{config}: IMPORTS: {file}: .*--import {file} .*{key}"
        ):
            load(config=config)
    assert not Path("ran").exists()
    assert load("IMPORTS", "[]", config="child.yaml").IMPORTS == []
    with own_imports():  # another file of that name, as after a move: that one alone
        moved = load("--import", "other/evil.py", *TWICE, config="child.yaml")
        assert moved.IMPORTS == [str(own_folder / "other" / "evil.py")]
    assert not Path("ran").exists()
    write({"gone.yaml": base.replace("evil.py", "gone.py")})
    with pytest.raises(ValueError, match="add --import of where gone.py is now"):
        load(config="gone.yaml")
    with pytest.raises(ValueError, match="gone.py: there is no file .*if it has moved"):
        load("--trust-imports", config="gone.yaml")
    assert load("--trust-imports", *TWICE, config="child.yaml").IMPORTS == [file]
    assert Path("ran").exists()


@pytest.mark.parametrize("value", ["evil.py", "[1]", "{a: 1}", "null"])
def test_imports_is_a_list_of_names(value: str, own_folder: Path) -> None:
    write({"c.yaml": f"_BASE_: {TREES}\nIMPORTS: {value}\n"})
    with pytest.raises(ValueError, match="c.yaml.*IMPORTS"):
        load("--trust-imports", config="c.yaml")


def test_files_add_to_the_imports_below_them(own_folder: Path) -> None:
    write({"a.py": FUSION, "sub/b.py": "", "a.yaml": f"_BASE_: {TREES}\nIMPORTS: [a.py]\n"})
    write({"sub/b.yaml": "_BASE_: ../a.yaml\nIMPORTS: [b.py]\n"})
    names = [str(own_folder / "a.py"), str(own_folder / "sub" / "b.py")]
    assert load("--trust-imports", config="sub/b.yaml").IMPORTS == names


def test_an_override_of_the_command_line_is_the_users_own(own_folder: Path) -> None:
    write({"mine.py": FUSION})
    assert load("IMPORTS", "['mine.py']", *TWICE).IMPORTS == [str(own_folder / "mine.py")]


def test_a_study_passes_imports_on_and_its_file_is_not_trusted(own_folder: Path) -> None:
    write({"mine.py": FUSION, "sub/theirs.py": ""})
    run = {"MODEL.FPN.FUSE_TYPE": "twice"}
    study = {"output": "out", "base": str(TREES), "runs": {"a": run}}
    write({"study.yaml": yaml.safe_dump(study)})
    plugins.load(["mine.py"])
    (planned,) = plan_runs(read_study(Path("study.yaml")))
    assert planned.arguments()[:2] == ["--import", str(own_folder / "mine.py")]
    study["runs"] = {"a": {**run, "IMPORTS": ["theirs.py"]}}
    write({"sub/study.yaml": yaml.safe_dump(study)})
    with pytest.raises(ValueError, match=f"runs.a: .*IMPORTS: {own_folder}/sub/theirs.py"):
        plan_runs(read_study(Path("sub/study.yaml")))


def test_a_started_process_imports_the_same_first(own_folder: Path) -> None:
    """By unpickling what `launch_ranks` sends before everything else."""
    write({"mine.py": FUSION, "parts/theirs.py": "x = 1", "c.yaml": "IMPORTS: [parts/theirs.py]"})
    load("--import", "mine", "--trust-imports", config="c.yaml")
    sent = pickle.dumps((plugins.Loaded(), FUSIONS.get("twice")))
    path, loaded = list(sys.path), dict(plugins._loaded)
    for name in ("mine", "theirs"):
        del sys.modules[name]
    del FUSIONS._objects["twice"]
    plugins._loaded.clear()
    plugins.trust(False)
    sys.path[:] = path
    _, fusion = pickle.loads(sent)
    assert FUSIONS.get("twice") is fusion and plugins._loaded == loaded and plugins._trusted


def install(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What installing a package with an entry point leaves."""
    folder = Path(f"site/{name}-1.0.dist-info")
    write({f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"})
    write({f"{folder}/entry_points.txt": f"[{plugins.GROUP}]\nmine = {value}\n"})
    monkeypatch.syspath_prepend(str(folder.parent.resolve()))


@pytest.mark.parametrize("value", ["installed_fusions", "installed_fusions:register"])
def test_installed_packages_offer_theirs(
    value: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = FUSION
    if ":" in value:
        body = "def register():\n" + "".join(f"    {line}\n" for line in FUSION.splitlines())
    write({"site/installed_fusions.py": body})
    install("installed", value, monkeypatch)
    assert load(*TWICE).IMPORTS == []  # it is there wherever it is installed


def test_a_broken_installed_package_is_named(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write({"site/broken_package.py": "1 / 0"})
    install("broken", "broken_package", monkeypatch)
    with pytest.raises(
        ImportError, match="(?s)package 'broken'.*broken_package.*ZeroDivisionError"
    ):
        load()


def test_in_python_a_config_imports_nothing_either(own_folder: Path) -> None:
    write({"mine.py": FUSION})
    cfg = zoo_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "IMPORTS", ["mine.py"])
    for refuse in (resolve_config, Trainer):
        with pytest.raises(ValueError, match=r"IMPORTS: mine.py: .*plugins.load\(\['mine.py'\]\)"):
            refuse(cfg)
    sys.path.append(str(own_folder))
    __import__("mine")  # the user's own script does
    assert resolve_config(cfg).IMPORTS == [str(own_folder / "mine.py")]


@pytest.mark.parametrize(
    "key",
    [
        *(
            "MODEL.FPN.TOPOLOGY",
            "MODEL.FPN.FUSE_TYPE",
            "MODEL.FPN.UPSAMPLE",
            "MODEL.FPN.DOWNSAMPLE",
        ),
        *("MODEL.FPN.BLOCK", "MODEL.FPN.LATERAL", "MODEL.FPN.NORM", "MODEL.FPN.ACTIVATION"),
        *("MODEL.BOTTOM_UP.NAME", "MODEL.BACKBONE.NAME", "MODEL.META_ARCHITECTURE"),
        *("MODEL.ROI_HEADS.NAME", "MODEL.RPN.HEAD_NAME", "MODEL.ROI_BOX_HEAD.NAME"),
        *("MODEL.PROPOSAL_GENERATOR.NAME", "MODEL.ANCHOR_GENERATOR.NAME"),
    ],
)
def test_the_error_for_an_unknown_name_says_how_to_add_it(key: str) -> None:
    cfg = zoo_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", key, "my_own")
    if key != "MODEL.BACKBONE.NAME":
        cfg.MODEL.BACKBONE.NAME = "build_pyramid_backbone"
    with pytest.raises((KeyError, ValueError), match=f"{key}: .*my_own.*{HOW_TO_ADD}"):
        build_model(resolve_config(cfg))


def test_so_does_that_of_an_unknown_dataset() -> None:
    with pytest.raises(KeyError, match=HOW_TO_ADD):
        require_registered("my_own")


def test_a_cell_of_a_notebook_may_run_again() -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    with own_imports():
        for _ in range(2):
            exec(FUSION, scope)
        assert FUSIONS.get("twice") is scope["Twice"]
