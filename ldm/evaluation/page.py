"""Pages that are one file, which loads nothing from elsewhere."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

HEAD = Path(__file__).with_suffix(".html")


def filled(template: Path, data: Any) -> str:
    """A page's HTML: the common head, and a template that finds the data in its script DATA."""
    text = json.dumps(data).replace("<", "\\u003c")  # a prompt cannot end the script
    parts = (path.read_text(encoding="utf-8") for path in (HEAD, template))
    return "".join(parts).replace(">DATA<", f">{text}<")


def data_url(kind: str, content: bytes) -> str:
    """A picture's file as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
