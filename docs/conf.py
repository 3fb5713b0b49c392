"""The documentation as one site: `make docs`."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

project = "FPN Plugin"
copyright = "the authors of FPN Plugin, Apache-2.0"
release = version = importlib.metadata.version("fpn_plugin")

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"FPN Plugin {release}"
exclude_patterns = ["examples", "data"]

# Pages: Markdown that also reads well in the repository
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The reference, from the docstrings
apidoc_modules = [
    {
        "path": str(ROOT / "fpn_plugin"),
        "destination": "api",
        "separate_modules": True,
        "module_first": True,
        "exclude_patterns": [str(ROOT / "fpn_plugin" / name) for name in ("cli*", "__main__.py")],
    }
]
napoleon_use_ivar = True  # the attributes of dataclasses are described once
autodoc_default_options = {"ignore-module-all": True}  # each name where it is defined
autodoc_inherit_docstrings = False  # Detectron2's have their own site
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

# What stays as it is: a role, or code in double backticks; code, and whether letters follow it
CODE = re.compile(r"(:\w+(?::\w+)*:`[^`]+`|``[^`]+``)|`([^`]+)`(?=(\w?))")

# Pages that stand beside docs/ in the repository, and what includes them here
INCLUDED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "datasets/README.md": "datasets.md",
}
LINK = re.compile(r"\[([^][]*)\]\((?!https?:|#)([^)#\s]+)([^)]*)\)")


def follow_links(text: str, folder: Path) -> str:
    """A page of the repository with its links as the site has them.

    Args:
        folder: where the page stands, which its links are relative to.
    """

    def follow(link: re.Match[str]) -> str:
        text, target, anchor = link[1], (folder / link[2]).resolve(), link[3]
        path = target.relative_to(ROOT).as_posix()
        if target.is_dir():
            return text  # nothing of it is on the site
        inside = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
        return f"[{text}]({INCLUDED.get(path, inside)}{anchor})"

    return LINK.sub(follow, text)


def read_page(app: Any, name: str, source: list[str]) -> None:
    source[0] = follow_links(source[0], ROOT / "docs")


def read_included(app: Any, path: Path, page: str, source: list[str]) -> None:
    source[0] = follow_links(source[0], (ROOT / "docs" / path).resolve().parent)


def mark_code(app: Any, kind: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings have code in single backticks, as Markdown does."""

    def mark(code: re.Match[str]) -> str:
        return code[1] or f"``{code[2]}``" + ("\\ " if code[3] else "")  # `ROIAlign`s

    lines[:] = CODE.sub(mark, "\n".join(lines)).split("\n")


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", mark_code, priority=400)  # before napoleon
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
