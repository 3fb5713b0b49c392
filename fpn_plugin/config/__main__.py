"""Print the page of config keys: `python -m fpn_plugin.config > docs/config.md`."""

from fpn_plugin.config.defaults import page

print(page(), end="")
