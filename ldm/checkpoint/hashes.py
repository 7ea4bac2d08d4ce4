"""Short hashes by which files and weights are known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def model_hash(path: Path) -> str:
    """Eight hexadecimal digits of a checkpoint: of its 64 KiB after the first MiB.

    Web UIs write it into pictures; of a folder it is its largest file's.
    Source: AUTOMATIC1111/stable-diffusion-webui, model_hash.
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


def weights_key(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Eight hexadecimal digits that change with any weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights, key=lambda pair: pair[0]):
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]
