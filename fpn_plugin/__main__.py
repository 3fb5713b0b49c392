"""`python -m fpn_plugin`: the same as the command `fpn`."""

import sys

from fpn_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
