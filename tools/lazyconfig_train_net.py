#!/usr/bin/env python3
"""`fpn train`, from a checkout, by the name that Detectron2 has for Python configs."""

import sys

from checkout import run_command

if __name__ == "__main__":
    sys.exit(run_command("train"))
