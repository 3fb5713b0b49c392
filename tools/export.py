#!/usr/bin/env python3
"""`fpn export`, from a checkout."""

import sys

from fpn_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
