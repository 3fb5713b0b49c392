"""A config: its keys, reading it, resolving what it leaves open, and checking it."""

from fpn_plugin.config.defaults import add_fpn_config
from fpn_plugin.config.resolve import load_config, resolve_config
from fpn_plugin.config.settings import PyramidSettings, extra_levels_for
from fpn_plugin.config.validate import validate_config

__all__ = [
    "PyramidSettings",
    "add_fpn_config",
    "extra_levels_for",
    "load_config",
    "resolve_config",
    "validate_config",
]
