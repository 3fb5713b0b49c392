"""The commands of `fpn`: one module each, with its command line and what it runs."""
