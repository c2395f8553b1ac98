"""`python -m rocketkv.cli`: the same as the command `rocketkv`."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
