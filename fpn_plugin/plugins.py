"""A user's own code: the modules and files that `--import`, the key `IMPORTS` and installed
packages name are imported here, and nowhere else.

Only what the user has named is run: on a command line, by :func:`load`, or by installing a package
that has the entry-point group `fpn_plugin.plugins`. What stands in a file (`IMPORTS` of a config,
the record in a checkpoint) is imported only after :func:`trust`; without it, it must be there
already: see :func:`require`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import shlex
import sys
import textwrap
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, Iterable, NamedTuple, Sequence

from fpn_plugin.registry import close_name

logger = logging.getLogger(__name__)

GROUP = "fpn_plugin.plugins"
KEY = "IMPORTS"
_FLAG = "--import"


class _Import(NamedTuple):
    """What was imported here.

    Attributes:
        module: its name in `sys.modules`.
        by_user: whether the user has named it, and not only a file that the user trusts.
    """

    module: str
    by_user: bool


# by what a config records: absolute paths of files, names of modules
_loaded: dict[str, _Import] = {}
_has_installed = False  # whether the entry points were loaded
_trusted = False


def load(names: Iterable[str] = (), where: str = "fpn_plugin.plugins.load") -> None:
    """Import a user's own code, so that its topologies, fusions, datasets, ... have names.

    What installed packages offer under the entry-point group `fpn_plugin.plugins` is imported too.
    Importing again changes nothing.

    Args:
        names: names of modules, in the current folder or on Python's path, and paths of .py files.
        where: what named them, for messages.

    Raises:
        ValueError: naming it, if it is no module and no file.
        ImportError: with the traceback of its own code, if it fails while it is imported.
    """
    _load_installed()
    for name in names:
        _import(name, where, by_user=True)


def trust(trusted: bool = True) -> None:
    """Let :func:`require` import what files name."""
    global _trusted
    _trusted = trusted


def is_trusted() -> bool:
    """Whether files may name what is run: see :func:`trust`."""
    return _trusted


def named_modules() -> tuple[str, ...]:
    """The modules that the user has named, or installed under the group of entry points."""
    _load_installed()
    installed = [entry.module for entry in importlib.metadata.entry_points(group=GROUP)]
    return (*installed, *(imported.module for imported in _loaded.values() if imported.by_user))


def named() -> list[str]:
    """What the user has named so far, as a config records it: files by their absolute paths."""
    return [name for name, imported in _loaded.items() if imported.by_user]


def require(names: Any, where: str = KEY) -> list[str]:
    """See to it that what a file names is imported: by the user already, or now if files are
    trusted.

    Args:
        names: the value of the key `IMPORTS`.
        where: the file, for messages.

    Returns:
        what the config shall record: these, and what the user has named.

    Raises:
        ValueError: naming what is not imported, and how to allow it.
        ImportError: as :func:`load` does.
    """
    _load_installed()
    place = where if where == KEY else f"{where}: {KEY}"
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{place}: {names!r} is no list of modules and files ([my_pyramids.py])")
    found = {name: _find_loaded(name) for name in names}
    missing = [name for name, imported in found.items() if not imported]
    if missing and not _trusted:
        raise ValueError(_refusal(place, missing))
    for name in missing:
        found[name] = _import(name, place, by_user=False)
    return list(dict.fromkeys([*found.values(), *named()]))


def named_by_overrides(opts: Sequence[str]) -> list[str]:
    """What the `KEY VALUE` pairs of a command line name in `IMPORTS`; a value that is no list is
    left to the config, which refuses it."""
    values = [value for key, value in zip(opts[::2], opts[1::2]) if key == KEY]
    try:
        names = ast.literal_eval(values[-1]) if values else []
    except (SyntaxError, ValueError):
        return []
    is_list = isinstance(names, (list, tuple))
    return [str(name) for name in names] if is_list else []


def flags(names: Iterable[str]) -> list[str]:
    """The flags by which a command that is started imports the same."""
    return [word for name in names for word in (_FLAG, name)]


def beside(name: Any, file: str) -> Any:
    """A name that a file holds: a relative path is relative to that file."""
    if not isinstance(name, str) or not _is_path(name) or "://" in file:
        return name
    folder = os.path.dirname(os.path.abspath(file))
    return os.path.normpath(os.path.join(folder, os.path.expanduser(name)))


class Loaded:
    """What this process has imported, for one that it starts.

    That one imports the same when it unpickles this: send it before anything that needs it.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_again, (dict(_loaded), _trusted)


def _load_again(imports: dict[str, _Import], trusted: bool) -> Loaded:
    _load_installed()
    for name, imported in imports.items():
        _import_module(imported.module, name, _FLAG)  # its folder is on Python's path already
    _loaded.update(imports)
    trust(trusted)
    return Loaded()


def _load_installed() -> None:
    global _has_installed
    if _has_installed:
        return
    _has_installed = True  # first: what is imported may come here itself
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            found = entry.load()
            if entry.attr:
                found()
        except (Exception, SystemExit) as error:
            _has_installed = False
            package = entry.dist.name if entry.dist else ""
            raise ImportError(
                f"the installed package {package!r} fails in its entry point {entry.name!r} of the"
                f" group {GROUP} ({entry.value}); mend it, or uninstall it:\n{_trace(error)}"
            ) from error


def _import(name: str, where: str, by_user: bool) -> str:
    """Import a module or a file.

    Returns:
        the name that a config records.
    """
    path = _find_file(name, where)
    known = _module_of(path) if path else _module_of_spec(name)
    module, root = _module_name(path, name) if path else (name, "")
    if known is None:
        if root and root not in sys.path:
            sys.path.append(root)  # last, so that it hides nothing; started processes get it too
        if path:
            _refuse_other(module, path, name, where)
        _import_module(module, name, where)
    else:
        module = known.__name__
    recorded = str(path or name)
    by_user = by_user or recorded in named()
    if module != "__main__":  # which a started process has by another name
        _loaded[recorded] = _Import(module, by_user)
    return recorded


def _import_module(module: str, name: str, where: str) -> None:
    importlib.invalidate_caches()  # the file may be younger than what Python has noted
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(_not_found(name, where)) from None
        raise _failure(name, where, error) from error
    except (Exception, SystemExit) as error:
        raise _failure(name, where, error) from error


def _failure(name: str, where: str, error: BaseException) -> ImportError:
    return ImportError(f"{where} {name}: it fails while it is imported:\n{_trace(error)}")


def _trace(error: BaseException) -> str:
    """The traceback of the user's own code."""
    trace = traceback.TracebackException.from_exception(error)
    trace.stack[:] = [
        frame
        for frame in trace.stack
        if frame.filename not in (__file__, importlib.__file__)
        and not frame.filename.startswith("<frozen importlib")
    ]
    lines = "".join([*trace.stack.format(), *trace.format_exception_only()])
    return textwrap.indent(lines.rstrip("\n"), "  ")  # told from the frames of a traceback itself


def _is_path(name: str) -> bool:
    return name.endswith(".py") or "/" in name or os.sep in name or name.startswith("~")


def _find_file(name: str, where: str) -> Path | None:
    """The file that a name stands for; None for a module that is not in the current folder.

    Raises:
        ValueError: for the path of no Python file.
    """
    if _is_path(name):
        path = Path(os.path.abspath(os.path.expanduser(name)))
        if not path.is_file():
            raise ValueError(_not_found(name, where))
        if path.suffix != ".py":
            raise ValueError(f"{where} {name}: it is no Python file, whose name ends in .py")
        return path
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(_not_found(name, where))
    stem = Path.cwd().joinpath(*name.split("."))
    return next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()), None)


def _not_found(name: str, where: str) -> str:
    if _is_path(name):
        path = Path(os.path.abspath(os.path.expanduser(name)))
        looked, folder = f"there is no file {path}", path.parent
        if path.is_dir():
            looked = f"{path} is a folder; give a .py file in it"
            folder = path
    else:
        looked, folder = f"there is no module of that name in {Path.cwd()}", Path.cwd()
        looked += " or on Python's path; a file elsewhere is given by its path, path/to/file.py"
    files = {file.stem: file for file in folder.glob("*.py")} if folder.is_dir() else {}
    close = files.get(close_name(Path(name).stem or name, list(files)))
    hint = f" (did you mean {os.path.relpath(close)}?)" if close else ""
    advice = "" if where == _FLAG else f"; if it has moved, give {_FLAG} of where it is now"
    return f"{where} {name or repr(name)}: {looked}{hint}{advice}"


def _module_name(path: Path, name: str) -> tuple[str, str]:
    """The name by which a file is imported, and the folder that must be on Python's path: the
    folder above all packages that it is in."""
    if not _is_path(name):
        return name, str(Path.cwd())
    parts, root = [path.stem], path.parent
    while (root / "__init__.py").is_file():
        parts, root = [root.name, *parts], root.parent
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts), str(root)


def _refuse_other(module: str, path: Path, name: str, where: str) -> None:
    """Refuse a file with the name of another module, which would be imported in its place."""
    other: Any = sys.modules.get(module)
    if other is None:
        try:
            importlib.invalidate_caches()
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError, AttributeError):
            spec = None  # importing it says why
        if spec is not None and not _is_same(spec.origin, path):
            other = spec
    if other is not None:
        origin = getattr(other, "origin", None) or getattr(other, "__file__", None) or "built in"
        raise ValueError(
            f"{where} {name}: there is another module {module!r} ({origin}); rename the file"
        )


def _is_same(origin: str | None, path: Path) -> bool:
    return origin is not None and os.path.realpath(origin) == os.path.realpath(path)


def _module_of(path: Path) -> ModuleType | None:
    """The module that was imported from a file, under whatever name."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(file, str) and file.endswith(path.name) and _is_same(file, path):
            return module
    return None


def _module_of_spec(name: str) -> ModuleType | None:
    """The module that was imported under a name, or from the file that the name leads to."""
    if name in sys.modules:
        return sys.modules[name]
    try:
        spec = importlib.util.find_spec(name)
    except Exception:  # importing it says why
        return None
    is_file = spec is not None and spec.origin and os.path.isfile(spec.origin)
    return _module_of(Path(str(spec.origin))) if spec is not None and is_file else None


def _find_loaded(name: str) -> str:
    """What was imported for a name that a file holds, without running anything; "" for nothing.

    A run's folder may have moved, or its user: a file that the user has named stands for one of the
    same name elsewhere.
    """
    if not _is_path(name):
        if name in sys.modules:
            return name
        stem = Path.cwd().joinpath(*name.split("."))
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file() and _module_of(path):
                return str(path)
    elif _module_of(Path(os.path.expanduser(name))):
        return os.path.abspath(os.path.expanduser(name))
    moved = next((other for other in named() if _stem(other) == _stem(name)), "")
    if moved:
        logger.info("%s %s: taking %s, which %s names", KEY, name, moved, _FLAG)
    return moved


def _stem(name: str) -> str:
    return Path(name).stem if _is_path(name) else name.rpartition(".")[2]


def _refusal(place: str, missing: Sequence[str]) -> str:
    present = [name for name in missing if not _is_path(name) or os.path.isfile(name)]
    words = shlex.join(flags(present))
    if gone := [os.path.basename(name) for name in missing if name not in present]:
        words += f"{' ' if words else ''}{_FLAG} of where {', '.join(gone)} is now"
    return (
        f"{place}: {', '.join(missing)}: that is code, which runs only if you say so: add"
        f" {words} (this alone), --trust-imports (all that the files name), or"
        f' {KEY} "[]" (none of it); in Python call fpn_plugin.plugins.load({list(missing)!r}) first'
    )
