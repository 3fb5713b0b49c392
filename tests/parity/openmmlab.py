"""mmdet, mmyolo and mmseg without the compiled operators of mmcv, as far as their necks need none."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock


class _NoOperators(ModuleType):
    """Has every operator; each raises when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"mmcv-lite has no compiled {name}")

        return refuse


def neck(module: str, name: str) -> Any:
    """A class of mmdet or mmyolo.

    Args:
        module: where it is, e.g. "mmdet.models.necks".
    """
    sys.modules.setdefault("mmcv._ext", _NoOperators("mmcv._ext"))
    with mock.patch("mmcv.__version__", "2.0.1"):  # mmyolo asks for less than 2.1
        return getattr(importlib.import_module(module), name)


def file_of(package: str, path: str) -> ModuleType:
    """A file of a package, without the modules around it, which need more than it does."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / path
    file_spec = importlib.util.spec_from_file_location(f"{package}_{file.stem}", file)
    assert file_spec is not None and file_spec.loader is not None
    sys.modules.setdefault("mmcv._ext", _NoOperators("mmcv._ext"))
    loaded = importlib.util.module_from_spec(file_spec)
    sys.modules[file_spec.name] = loaded  # where dataclasses look their annotations up
    file_spec.loader.exec_module(loaded)
    return loaded
