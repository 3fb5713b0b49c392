"""Which `fpn_plugin` the files of this folder run: this checkout's, or an installed one of the same
version. Where none is installed, it is this checkout's, also in the processes that it starts."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_command(name: str) -> int:
    """Run a command of `fpn` with the arguments of this process.

    Returns:
        its exit code.
    """
    use_package()
    from fpn_plugin.cli.main import main  # only now

    return main([name, *sys.argv[1:]])


def use_package() -> None:
    """Let Python find `fpn_plugin`, or end the process if it would be one of another version."""
    spec = importlib.util.find_spec("fpn_plugin")  # imports nothing
    if spec is None or not spec.origin:
        sys.path.insert(0, str(ROOT))
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        return
    package = Path(spec.origin).resolve().parent
    if package == ROOT / "fpn_plugin":
        return
    own, installed = version_of(ROOT / "fpn_plugin"), version_of(package)
    tool = Path(sys.argv[0]).name
    if own == installed:
        print(
            f"{tool}: running fpn_plugin {installed} of {package}, not of {ROOT}", file=sys.stderr
        )
        return
    print(
        f"{tool} is of fpn_plugin {own} in {ROOT},\n"
        f"but this Python has fpn_plugin {installed} in {package}.\n"
        f"Install this one ({sys.executable} -m pip install -e {ROOT}), or run the other one's"
        " command, fpn",
        file=sys.stderr,
    )
    sys.exit(2)


def version_of(package: Path) -> str:
    """What a package says in its version.py."""
    file = package / "version.py"
    if not file.is_file():
        return "(older, without a version)"
    return str(runpy.run_path(str(file))["__version__"])
