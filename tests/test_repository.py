"""What the repository promises about itself: its pages say what is there, and nothing local is committed."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from helpers import own_imports

from fpn_plugin import add_fpn_config, resolve_config, yaml_files
from fpn_plugin.cli.main import COMMANDS, main
from fpn_plugin.config.defaults import ARGS
from fpn_plugin.config.files import find_config_file, keys, merge_config_file
from fpn_plugin.pyramid.topologies import TOPOLOGIES

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", ROOT / "datasets" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[Any]:
    """The code blocks of all pages in a language, each named by its page."""
    return [
        pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, (tag, code) in enumerate(BLOCK.findall(page.read_text()))
        if tag == language
    ]


def test_every_topology_is_in_the_readmes_catalogue() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name for name in TOPOLOGIES.names() if f"\n| `{name}` |" not in readme] == []


# but what reads what a command of its page writes: tests/tools/test_extending_page.py runs both
RUNNING = [code for code in blocks("python") if not code.values[0].startswith("# run_")]


@pytest.mark.parametrize("code", RUNNING)
def test_the_python_of_the_pages_runs(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with own_imports():
        exec(compile(code, "page.md", "exec"), {"__name__": "page", "__file__": "page.py"})


@pytest.mark.parametrize("code", blocks("yaml"))
def test_the_configs_of_the_pages_build(code: str, tmp_path: Path) -> None:
    path = tmp_path / "page.yaml"
    path.write_text(code.replace("_BASE_: ", f"_BASE_: {ROOT}/configs/quickstart/"))
    cfg = get_cfg()
    add_fpn_config(cfg)
    merge_config_file(cfg, str(path))
    cfg.MODEL.DEVICE, cfg.MODEL.BOTTOM_UP.WEIGHTS = "cpu", ""
    assert build_backbone(resolve_config(cfg)).output_shape()


def commands() -> list[Any]:
    """The lines of the pages that run `fpn`, or a file of tools/ that is the same."""
    found = []
    for page in PAGES:
        for tag, code in BLOCK.findall(page.read_text()):
            for line in code.replace("\\\n", " ").splitlines() if tag in ("", "bash", "sh") else ():
                line = re.sub(r"^(\$ |PYTHONPATH=\S+ )", "", line)
                if line.startswith("fpn "):
                    words = shlex.split(line, comments=True)
                    found.append(pytest.param(words[1:], id=f"{page.stem}-{len(found)}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_the_commands_of_the_pages_parse(words: list[str]) -> None:
    name, *arguments = words
    if name.startswith("-"):
        with pytest.raises(SystemExit, match="^0$"):
            main(words)
        return
    args = vars(COMMANDS[name].parse_args(arguments))
    pairs = [opt for opt in args.get("opts") or [] if "=" not in opt]
    cfg = get_cfg()
    add_fpn_config(cfg)
    known = keys(cfg)
    assert [key for key in pairs[::2] if key not in known and not key.startswith(f"{ARGS}.")] == []
    config = args.get("config_file") or ""
    for file in [config] if isinstance(config, str) else config:
        # names in capitals, and mine, stand for the reader's own
        if file and not re.match(r"[A-Z]+(\.yaml|/)|mine|.*/config\.yaml$", file):
            assert find_config_file(file)


def test_there_are_commands_in_the_pages() -> None:
    assert len(commands()) > 30
    assert {word.values[0][0] for word in commands()} >= set(COMMANDS) - {"convert"}


def test_every_file_in_the_pages_commands_and_links_exists() -> None:
    missing, seen = [], 0
    for page in PAGES:
        text = page.read_text()
        commands = [
            line for tag, code in BLOCK.findall(text) if not tag for line in code.splitlines()
        ]
        words = [word for line in commands for word in line.split()]
        paths = {
            ROOT / word for word in words if re.match(r"(tools|configs|datasets/\w+\.py)", word)
        }
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
        paths |= {page.parent / link for link in links if not link.startswith("http")}
        missing += [
            f"{page.name}: {path}" for path in paths if not any(path.parent.glob(path.name))
        ]
        seen += len(paths)
    assert seen > 60 and missing == []


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


# What reads a file by running what is in it, or lets it land anywhere; and where it is safe
UNSAFE_CALLS = {
    "torch.load": lambda call: "weights_only=True" in call,
    "pickle.load": None,
    "pickle.loads": ("fpn_plugin/data/shared_records.py",),  # what it has written itself
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
    "LazyConfig.load": ("fpn_plugin/modeling/python_config.py",),  # Python, as the README says
    # what the user names; the others import names that are in their source
    "import_module": (
        "fpn_plugin/plugins.py",
        "fpn_plugin/cli/demo.py",
        "fpn_plugin/evaluation/build.py",
        "tools/checkout.py",
    ),
    "__import__": None,
    "exec_module": None,
    "run_path": ("setup.py", "tools/checkout.py"),  # the version
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
            fine = allowed(call) if callable(allowed) else name in (allowed or ())
            if not fine and not (key == "eval" and "." in called):  # a module's eval()
                found.append(f"{name}: {call}")
    return found


def test_files_are_only_read_by_what_runs_none_of_their_code() -> None:
    """What a strange file can do is decided in few places: checkpoint/plain.py, yaml_files.py."""
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
        "importlib.import_module(name)",
    ],
)
def test_unsafe_calls_are_seen(source: str) -> None:
    assert unsafe_calls(source, "x.py")


def test_the_yaml_loader_is_a_safe_one() -> None:
    """`unsafe_calls` trusts its name."""
    assert issubclass(yaml_files._Loader, yaml.SafeLoader)
