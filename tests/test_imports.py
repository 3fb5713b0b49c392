"""Imports inside `fpn_plugin` run one way: from each room to the rooms below it.

All imports count, those inside of functions too. They are read from the source, so that nothing has
to be installed or executed.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = {"compat", "registry", "paths", "plugins", "version", "yaml_files"}
# What each room may import beside itself, from the ground up.
ROOMS: dict[str, set[str]] = {room: set() for room in sorted(GROUND)}
ROOMS["plugins"] = {"registry"}
ROOMS["pyramid"] = {"compat", "registry"}
ROOMS["bottom_up"] = {"registry", "paths"}
ROOMS["report"] = GROUND
ROOMS["checkpoint"] = GROUND | {"bottom_up"}
ROOMS["config"] = GROUND | {"pyramid", "checkpoint", "bottom_up"}
ROOMS["data"] = GROUND | {"checkpoint"}
ROOMS["evaluation"] = GROUND | {"checkpoint", "data"}
ROOMS["modeling"] = ROOMS["config"] | {"config", "data", "evaluation"}
ROOMS["visualize"] = ROOMS["modeling"] | {"modeling", "data", "report"}
ROOMS["engine"] = ROOMS["visualize"] | {"visualize"}
ROOMS["export"] = ROOMS["benchmark"] = ROOMS["engine"] | {"engine"}
ROOMS["compare"] = ROOMS["benchmark"] | {"benchmark"}
ROOMS["study"] = ROOMS["compare"] | {"compare"}
ROOMS["cli"] = ROOMS["study"] | {"study", "export"}
ROOMS["__main__"] = {"cli"}
# A module that needs one of these is imported where it is used: matplotlib takes half a second, the
# others are extras.
OPTIONAL = {
    "matplotlib",
    "timm",
    "faster_coco_eval",
    "nncf",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "submitit",
}


class Import(NamedTuple):
    """`importer` imports `imported`, both dotted; hidden: inside of a function."""

    importer: str
    imported: str
    hidden: bool


def read_imports(root: Path) -> tuple[set[str], list[Import]]:
    """The modules of the package below `root`, and all imports in them."""
    files = {dotted(path, root): path for path in sorted((root / "fpn_plugin").rglob("*.py"))}
    imports = []
    for name, path in files.items():
        tree = ast.parse(path.read_text())
        hidden = {id(node) for function in functions(tree) for node in ast.walk(function)}
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(tree):
            imports += [
                Import(name, target, id(node) in hidden)
                for target in targets(node, package, set(files))
            ]
    return set(files), imports


def dotted(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def functions(tree: ast.AST) -> Iterator[ast.AST]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return (node for node in ast.walk(tree) if isinstance(node, kinds))


def targets(node: ast.AST, package: str, modules: set[str]) -> list[str]:
    """The modules that a statement imports; `import_module` of a literal name counts."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, base] if base else parents)
        names = [f"{base}.{alias.name}" for alias in node.names]
        return [name if name in modules else base for name in names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        literal = node.args[0]
        if isinstance(literal, ast.JoinedStr):  # f"fpn_plugin.bottom_up.{library}": any of them
            prefix = getattr(literal.values[0], "value", "")
            return [name for name in sorted(modules) if name.startswith(prefix) and prefix]
        return [literal.value] if isinstance(literal, ast.Constant) else []
    return []


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "the package itself"


def upward(imports: list[Import]) -> list[str]:
    """Imports of rooms that are not below the importer's."""
    return [
        f"{importer} imports {imported}"
        for importer, imported, _ in imports
        if imported.startswith("fpn_plugin") and importer != "fpn_plugin"
        if room(imported) != room(importer) and room(imported) not in ROOMS[room(importer)]
    ]


def circle(imports: list[Import]) -> list[str]:
    """A circle of files, or nothing. A package's `__init__` is a file like others."""
    graph: dict[str, set[str]] = {}
    for importer, imported, _ in imports:
        if imported.startswith("fpn_plugin"):
            graph.setdefault(importer, set()).add(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def hidden(imports: list[Import]) -> list[str]:
    """Imports inside of functions of modules of ours that need nothing optional."""
    needs: dict[str, set[str]] = {}
    for importer, imported, is_hidden in imports:
        if not is_hidden:
            needs.setdefault(importer, set()).add(imported)

    def is_optional(module: str, seen: frozenset[str] = frozenset()) -> bool:
        below = needs.get(module, set()) - seen
        return any(name.split(".")[0] in OPTIONAL for name in below) or any(
            is_optional(name, seen | below) for name in below if name.startswith("fpn_plugin")
        )

    return [
        f"{importer} hides its import of {imported}"
        for importer, imported, is_hidden in imports
        if is_hidden and imported.startswith("fpn_plugin") and not is_optional(imported)
    ]


MODULES, IMPORTS = read_imports(ROOT)


def test_all_modules_are_read_and_in_a_room() -> None:
    assert len(MODULES) > 80 and len(IMPORTS) > 500
    assert {room(module) for module in MODULES - {"fpn_plugin"}} == set(ROOMS)


def test_no_import_runs_upward() -> None:
    assert upward(IMPORTS) == []


def test_no_circle_of_files() -> None:
    assert circle(IMPORTS) == []


def test_the_order_of_rooms_has_no_circle() -> None:
    graphlib.TopologicalSorter(ROOMS).prepare()


def test_no_module_of_ours_is_imported_inside_of_a_function() -> None:
    assert hidden(IMPORTS) == []


@pytest.mark.parametrize(
    "source, check",
    [
        ("from fpn_plugin.engine import trainer", upward),
        ("from ..engine.trainer import Trainer", upward),
        ("def f():\n    import fpn_plugin.study.plan", upward),
        ("import fpn_plugin", upward),
        ("from . import other", circle),
        ("def f():\n    from fpn_plugin.pyramid.other import x", circle),
        ("import importlib\nimportlib.import_module('fpn_plugin.pyramid.other')", circle),
        ("f = lambda: __import__('importlib').import_module('fpn_plugin.registry')", hidden),
    ],
)
def test_a_wrong_import_is_seen(source: str, check: object, tmp_path: Path) -> None:
    folder = tmp_path / "fpn_plugin" / "pyramid"
    folder.mkdir(parents=True)
    for path in (folder.parent, folder):
        (path / "__init__.py").touch()
    (folder / "other.py").write_text("from fpn_plugin.pyramid import graph")
    (folder / "graph.py").write_text(source)
    assert callable(check) and check(read_imports(tmp_path)[1])


def test_an_optional_module_may_be_imported_inside_of_a_function() -> None:
    needed = [Import("a", "fpn_plugin.b", True), Import("fpn_plugin.b", "fpn_plugin.c", False)]
    assert hidden(needed)
    assert not hidden([*needed, Import("fpn_plugin.c", "matplotlib.pyplot", False)])
