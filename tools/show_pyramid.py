#!/usr/bin/env python3
"""`fpn show`, from a checkout."""

import sys

from checkout import run_command

if __name__ == "__main__":
    sys.exit(run_command("show"))
