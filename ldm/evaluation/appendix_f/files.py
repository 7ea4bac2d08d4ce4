"""Files of results, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from ldm.errors import InputError


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; missing folders are made.

    Raises:
        InputError: the file cannot be written there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary.exists():
            temporary.unlink()
