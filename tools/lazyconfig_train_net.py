#!/usr/bin/env python3
"""`fpn train`, from a checkout, by the name that Detectron2 has for Python configs."""

import sys

from fpn_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
