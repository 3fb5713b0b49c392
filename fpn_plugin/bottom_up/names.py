"""Names of networks (`MODEL.BOTTOM_UP.NAME`), checked before anything is built."""

from __future__ import annotations

from detectron2.modeling import BACKBONE_REGISTRY

from fpn_plugin.bottom_up import timm, torchvision
from fpn_plugin.bottom_up.detectron2 import BUILDERS
from fpn_plugin.registry import HOW_TO_ADD, close_name, unknown_name

NAME = "MODEL.BOTTOM_UP.NAME"
_REQUIRE_MODEL = {"timm": timm.require_model, "torchvision": torchvision.require_model}
_OF_LIBRARIES = [f"{library}/<model>" for library in _REQUIRE_MODEL]


def check_network_name(name: str) -> None:
    """Check that there is a network of that name.

    Raises:
        KeyError: if there is none, with the nearest that there is.
        ImportError: if the network's library is not installed.
        ValueError: for a tag of timm's weights that does not exist.
    """
    library, slash, model = name.partition("/")
    known = {key for key, _ in BACKBONE_REGISTRY} | {builder.__name__ for builder in BUILDERS}
    if slash and library in _REQUIRE_MODEL:
        _REQUIRE_MODEL[library](model)
    elif name not in known:
        meant = ""
        if slash and (close := close_name(library, list(_REQUIRE_MODEL))):
            meant = f"{close}/{model}"
        elif torchvision.has_model(name):  # without its library
            meant = f"torchvision/{name}"
        raise unknown_name(NAME, name, [*known, *_OF_LIBRARIES], meant, HOW_TO_ADD)
