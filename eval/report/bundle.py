"""A page that loads nothing else: its template, style and script in one file, with plotly.js packed.

Its content security policy allows two scripts only, by their hashes: the page's own, and plotly.js, which that unpacks.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_HERE = Path(__file__).parent
PLOTLY = _HERE / "plotly-basic.min.js"  # npm's plotly.js-basic-dist-min: scatter, bar and pie


def render(folder: Path, **fields: Any) -> str:
    """Render the page of a folder that has `page.html.j2`, `page.css` and `page.js`; all text in it is escaped.

    The script may call `unpack()`, which resolves when plotly.js has run.

    Args:
        folder: the folder.
        fields: names that the template reads, beside `style`, `script`, `plotly` and `hashes`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plotly = PLOTLY.read_text(encoding="utf-8")
    script = "\n".join(path.read_text(encoding="utf-8") for path in (_HERE / "unpack.js", folder / "page.js"))
    return environment.get_template("page.html.j2").render(
        plotly=base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode(),
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        hashes=[_script_hash(plotly), _script_hash(script)],
        **fields,
    )


def _script_hash(script: str) -> str:
    """Return a script's source for a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
