#!/usr/bin/env python3
"""`fpn predict`, from a checkout."""

import sys

from fpn_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
