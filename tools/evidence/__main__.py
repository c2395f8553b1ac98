"""`make evidence`, or `python tools/evidence`: see program.py."""

import sys
from pathlib import Path

# Python puts the program's folder first on the path: its package takes the place.
sys.path[:1] = [str(Path(__file__).resolve().parents[1])]

from evidence.program import main  # noqa: E402

raise SystemExit(main())
