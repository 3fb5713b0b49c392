"""The wheel works by itself: in a folder that has nothing, with the wheel's content alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fpn_plugin.cli.main import COMMANDS
from fpn_plugin.version import __version__

ROOT = Path(__file__).parents[2]
CODE = """
import json
from argparse import Namespace
import fpn_plugin
from fpn_plugin.cli.demo import CONFIGS
from fpn_plugin.cli.main import COMMANDS
from fpn_plugin.config.files import find_config_file
from fpn_plugin.config import load_config
from fpn_plugin.modeling.python_config import read_python_config
from fpn_plugin.paths import configs_dir, makers_dir
from fpn_plugin.study.config import read_study
from pathlib import Path

names = [
    "COCO-InstanceSegmentation/mask_rcnn_R_50_BiFPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
    *CONFIGS.values(),
]
print(json.dumps({
    "version": fpn_plugin.__version__,
    "commands": list(COMMANDS),
    "data": [load_config(Namespace(config_file=name, opts=[])).DATASETS.TRAIN for name in names],
    "lazy": read_python_config("lazy/faster_rcnn_trees_FPN.py").train.device,
    "runs": [str(config.file) for config in read_study(Path("studies/trees.yaml")).configs],
    "folders": [str(configs_dir()), str(makers_dir()), fpn_plugin.__path__[0]],
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is unpacked into."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    command += ["build", "--build-base", str(folder / "build")]
    command += ["bdist_wheel", "--dist-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            archive.extract(name, folder / "site")
    return folder / "site"


def test_the_wheel_has_the_configs_and_the_makers_and_nothing_of_a_users(installed: Path) -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for folder, suffixes in (("configs", {".yaml", ".py"}), ("datasets", {".py"})):
        expected = {name for name in done.stdout.split() if name.startswith(f"{folder}/")}
        expected = {name for name in expected if Path(name).suffix in suffixes}
        root = installed / "fpn_plugin"
        found = {p.relative_to(root).as_posix() for p in (root / folder).rglob("*") if p.is_file()}
        assert found == expected and found
    entries = next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    assert "[console_scripts]\nfpn = fpn_plugin.cli.main:main" in entries
    assert {path.name for path in installed.iterdir()} == {
        "fpn_plugin",
        f"fpn_plugin-{__version__}.dist-info",
    }


def test_configs_are_found_from_a_folder_that_has_nothing(installed: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["version"] == __version__ and values["commands"] == list(COMMANDS)
    own = [["trees_train"], ["cells_train"], ["scenes_train"]]
    assert values["data"] == [["coco_2017_train"], ["coco_2017_train"], *own]
    assert values["lazy"] and values["runs"]
    assert all(path.startswith(str(installed)) for path in values["runs"] + values["folders"])
    assert not list(tmp_path.iterdir())
