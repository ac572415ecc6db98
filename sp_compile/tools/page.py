"""A report as one HTML page that needs nothing else: `render(report.to_dict())`.

`page.html` is its frame and style; `page.js` draws the data, which stands in the page as JSON. The content security
policy of the page forbids every request, and every script but that one.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

_FOLDER = Path(__file__).parent


def render(report: Mapping[str, Any]) -> str:
    """The page for `Report.to_dict()`.

    Raises ValueError for a number that JSON lacks, NaN or an infinity.
    """
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(report, allow_nan=False, separators=(",", ":"))
    return Template((_FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{report['model']} over {report['sp_size']} ranks"),
        digest=f"sha256-{digest}",
        # In a script element only `<` can end it or open a comment; in JSON it stands inside strings alone.
        report=data.replace("<", "\\u003c"),
        script=script,
    )
