"""Short hashes by which files are known, as the web UIs write them into pictures."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any


def model_hash(path: Path) -> str:
    """Eight hexadecimal digits of a checkpoint: of its 64 KiB after the first MiB.

    Source: AUTOMATIC1111/stable-diffusion-webui, model_hash; of a folder, its largest file.
    """
    if path.is_dir():
        path = max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    with path.open("rb") as file:
        if path.stat().st_size > 0x110000:
            file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def named(path: Path) -> dict[str, Any]:
    """A small file's name, and the first 12 digits of its SHA-256."""
    about = path.stat()
    return {"name": path.stem, "hash": _digest(path, about.st_mtime_ns, about.st_size)}


@lru_cache(64)
def _digest(path: Path, changed: int, size: int) -> str:
    """The digits; of a file that was not changed meanwhile, those known."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
