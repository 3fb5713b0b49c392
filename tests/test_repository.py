"""What the repository promises about itself: README and registries agree, and nothing local is committed."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

from fpn_plugin import add_fpn_config, config_files
from fpn_plugin.pyramid.blocks import ACTIVATIONS
from fpn_plugin.pyramid.compose import EXTRA_LEVELS
from fpn_plugin.pyramid.pyramid import REGISTRIES
from fpn_plugin.pyramid.topologies import TOPOLOGIES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def leaves(node: CfgNode, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in node.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key}
    return found


def test_every_key_of_ours_is_in_the_readme() -> None:
    plain, with_ours = get_cfg(), get_cfg()
    add_fpn_config(with_ours)
    ours = leaves(with_ours) - leaves(plain)
    # two keys that Detectron2 itself reads, and only lacks a default for
    ours -= {"DATASETS.TRAIN_REPEAT_FACTOR", "DATALOADER.RANDOM_SUBSET_RATIO"}
    assert len(ours) > 15
    rows = set(re.findall(r"^\| `([A-Z_.]+(?:\.\*)?)` \|", README, re.MULTILINE))
    assert {
        key for key in ours if key not in rows and f"{key.rpartition('.')[0]}.*" not in rows
    } == set()


def row(key: str) -> str:
    return next(line for line in README.splitlines() if line.startswith(f"| `{key}` |"))


@pytest.mark.parametrize(
    "key, names",
    [
        ("MODEL.FPN.FUSE_TYPE", REGISTRIES["fuse"].names()),
        ("MODEL.FPN.UPSAMPLE", REGISTRIES["up"].names()),
        ("MODEL.FPN.DOWNSAMPLE", REGISTRIES["down"].names()),
        ("MODEL.FPN.LATERAL", REGISTRIES["block"].names()),
        ("MODEL.FPN.ACTIVATION", [name for name in ACTIVATIONS.names() if name]),
        ("MODEL.FPN.EXTRA_LEVELS", EXTRA_LEVELS),
    ],
)
def test_every_registered_name_is_in_the_readme(key: str, names: list[str]) -> None:
    assert [name for name in names if f"`{name}`" not in row(key)] == []


def test_every_topology_is_in_the_readmes_catalogue() -> None:
    assert [name for name in TOPOLOGIES.names() if f"\n| `{name}` |" not in README] == []


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_the_python_in_the_readme_runs(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})


def test_every_file_and_option_in_the_readmes_commands_exists() -> None:
    commands = [line for language, code in BLOCKS if not language for line in code.splitlines()]
    paths = {
        word
        for line in commands
        for word in line.split()
        if re.match(r"(tools|configs|datasets)/", word)
    }
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [
        link for link in links if not link.startswith("http") and not (ROOT / link).exists()
    ] == []


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in done.stdout.split() if (ROOT / name).is_file()]
    assert len(files) > 100  # without git the tests below would look at nothing
    return files


def test_no_registry_and_no_place_of_one_machine_is_committed() -> None:
    forbidden = re.compile(r"pypi\.org|pythonhosted|index-url|/root/|/home/\w+/|/tmp/")
    here = Path(__file__)
    found = []
    for path in tracked():
        if path != here and path.suffix not in (".png", ".jpg"):
            found += [
                f"{path}: {hit}" for hit in forbidden.findall(path.read_text(errors="ignore"))
            ]
    assert found == []


def test_the_lock_has_a_hash_for_everything() -> None:
    for name in ("requirements.txt", "tools/requirements-uv.txt"):
        entries = re.split(r"\n(?=[a-z])", (ROOT / name).read_text())
        pinned = [entry for entry in entries if "==" in entry]
        assert pinned and all("--hash=sha256:" in entry for entry in pinned)


def test_tools_stay_short_and_modules_readable() -> None:
    lengths = {
        path: len(path.read_text().splitlines()) for path in tracked() if path.suffix == ".py"
    }
    tools = {str(path): n for path, n in lengths.items() if path.parent.name == "tools"}
    modules = {str(path): n for path, n in lengths.items() if "fpn_plugin" in path.parts}
    assert len(tools) > 3 and len(modules) > 20
    # setup_env.py has no package to put its logic into: it runs before anything is installed
    assert {p: n for p, n in tools.items() if n > 85 and not p.endswith("setup_env.py")} == {}
    assert {p: n for p, n in modules.items() if n > 300} == {}


# What reads a file by running what is in it, or lets it land anywhere; and where it is safe
UNSAFE_CALLS = {
    "torch.load": lambda call: "weights_only=True" in call,
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "yaml.load": lambda call: call.endswith((", _Loader)", ", Loader=_Loader)")),
    "yaml.unsafe_load": None,
    "yaml.full_load": None,
    "numpy.load": None,
    "np.load": None,
    "eval": None,
    "exec": None,
    "os.system": None,
    "DetectionCheckpointer": None,
    "merge_from_file": None,
    "load_yaml_with_base": None,
    "extractall": None,
    "extract": None,
    "unpack_archive": None,
    "LazyConfig.load": "fpn_plugin/engine/lazy.py",  # Python, as the README says
}


def unsafe_calls(source: str, name: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, call = ast.unparse(node.func), ast.unparse(node)
        for key, allowed in UNSAFE_CALLS.items():
            if called != key and not called.endswith(f".{key}"):
                continue
            fine = allowed(call) if callable(allowed) else name == allowed
            if not fine and not (key == "eval" and "." in called):  # a module's eval()
                found.append(f"{name}: {call}")
    return found


def test_files_are_only_read_by_what_runs_none_of_their_code() -> None:
    """What a strange file can do is decided in few places: plain_files.py, config_files.py."""
    paths = [p for p in tracked() if p.suffix == ".py" and "tests" not in p.parts]
    assert len(paths) > 100
    calls = [
        call
        for path in paths
        for call in unsafe_calls(path.read_text(), str(path.relative_to(ROOT)))
    ]
    assert calls == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.load(f)",
        "yaml.load(f, yaml.Loader)",
        "DetectionCheckpointer(m).load(f)",
        "cfg.merge_from_file(f)",
        "zipfile.ZipFile(f).extractall(to)",
        "eval(text)",
    ],
)
def test_unsafe_calls_are_seen(source: str) -> None:
    assert unsafe_calls(source, "x.py")


def test_the_yaml_loader_is_a_safe_one() -> None:
    """`unsafe_calls` trusts its name."""
    assert issubclass(config_files._Loader, yaml.SafeLoader)
