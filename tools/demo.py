#!/usr/bin/env python3
"""`fpn demo`, from a checkout."""

import sys

from fpn_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
