#!/usr/bin/env python3
"""`fpn train-lazy`, from a checkout."""

import sys

from fpn_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train-lazy", *sys.argv[1:]]))
