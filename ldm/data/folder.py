"""A user's own pictures and captions as a training set."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.errors import InputError, escaped, shown
from ldm.images import fit, load_rgb
from ldm.text import check_kind, check_text, parse_json, read_text, split_lines
from ldm.util import file_stamp

MAX_LISTING = 2**30  # bytes
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
# Endings of pictures that are not read, which a folder may hold as well.
OTHERS = frozenset({".avif", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jxl", ".tif", ".tiff"})

logger = logging.getLogger(__name__)


class FolderPictures(Dataset):
    """Pictures of a folder with a caption each, resized and cropped to a square.

    Captions stand in `metadata.jsonl` (one `{"file_name": ..., "text": ...}` a line), or, where the
    folder has none, beside each picture: `name.png` with `name.txt`. An item is
    `{first_stage_key: float32 (size, size, 3) in [-1, 1], "caption": str}`.

    Args:
        folder: where the pictures are; subfolders are searched too.
        size: edge length of the items, in pixels.
        first_stage_key: the item's key for the picture.
        flip: whether to mirror half of the items; not for captions that say left or right.

    Attributes:
        version: changes with any of the files, so that nothing made of others is taken for theirs.

    Raises:
        InputError: the folder is missing or has no picture, a picture has no caption, or a
            caption is no text in UTF-8.
    """

    def __init__(
        self, folder: str, size: int = 512, first_stage_key: str = "image", flip: bool = False
    ) -> None:
        self.size = size
        self.first_stage_key = first_stage_key
        self.flip = flip
        root = Path(folder)
        if not root.is_dir():
            raise InputError(f"{escaped(folder)}: there is no such folder")
        listing = root / "metadata.jsonl"
        self.items = _listed(listing) if listing.is_file() else _beside(root)
        if not self.items:
            known = ", ".join(sorted(SUFFIXES))
            raise InputError(f"{escaped(folder)}: no pictures in it ({known})")
        files = [file_stamp(path, escaped(path)) for path, _ in self.items]
        self.version = hashlib.sha256(repr(files).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One picture with its caption."""
        path, caption = self.items[index]
        pixels = fit(load_rgb(path), self.size, self.size)
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels[:, ::-1]
        return {
            self.first_stage_key: pixels.astype(np.float32) / 127.5 - 1.0,
            "caption": caption,
        }


def _beside(root: Path) -> list[tuple[Path, str]]:
    items = []
    others = []
    for path in sorted(root.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(root).parts):  # a system's own
            continue
        if path.suffix.lower() in OTHERS:
            others.append(path)
        if path.suffix.lower() not in SUFFIXES:
            continue
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise InputError(
                f"{escaped(path)}: no caption; write one into {escaped(text.name)} or "
                "metadata.jsonl"
            )
        items.append((path, check_text(read_text(text).strip(), escaped(text))))
    if others:
        logger.warning(
            "%s: %d picture%s left out, such as %s; read are %s",
            *(escaped(root), len(others), " is" if len(others) == 1 else "s are"),
            *(escaped(others[0].name), ", ".join(sorted(SUFFIXES))),
        )
    return items


def _listed(listing: Path) -> list[tuple[Path, str]]:
    items = []
    for number, line in enumerate(split_lines(read_text(listing, MAX_LISTING)), start=1):
        if not line.strip():
            continue
        where = f"{escaped(listing)}, line {number}"
        entry = parse_json(line, where)
        if not {"file_name", "text"} <= entry.keys():
            raise InputError(f'{where}: not of the form {{"file_name": ..., "text": ...}}')
        name = check_kind(entry["file_name"], str, f"{where}: file_name")
        caption = check_kind(entry["text"], str, f"{where}: text")
        path = listing.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{where}: file_name {shown(name)} leads out of the folder")
        if not path.is_file():
            raise InputError(f"{where}: there is no {escaped(path)}")
        items.append((path, caption))
    return items
