"""plotly.js as pages embed it: packed, and allowed by its hash in the page's content security policy."""

from __future__ import annotations

import base64
import gzip
import hashlib
from pathlib import Path

PLOTLY = Path(__file__).parent / "plotly-basic.min.js"  # npm's plotly.js-basic-dist-min: scatter, bar and pie


def packed_plotly() -> tuple[str, str]:
    """Return plotly.js as gzip in Base64, and its source for a policy."""
    plotly = PLOTLY.read_text(encoding="utf-8")
    return base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode(), script_hash(plotly)


def script_hash(script: str) -> str:
    """Return a script's source for a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
