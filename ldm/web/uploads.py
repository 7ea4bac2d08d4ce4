"""Pictures that come from outside: read through files that do not stay."""

from __future__ import annotations

import base64
import binascii
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm.errors import InputError
from ldm.images import Mask, Pixels, load_mask, load_rgb

MOST = 64 * 2**20  # bytes of an upload
KEPT = 24  # uploads that the page may still show
_HEAD = re.compile(r"data:image/[\w.+-]{1,20};base64,")


@contextmanager
def file_of(text: object, name: str) -> Iterator[Path]:
    """A picture in base64, perhaps as a data URL, as a file, as long as the context lasts.

    Args:
        text: as it came.
        name: what to call it in messages.

    Raises:
        InputError: it is not base64, or too large; or what reading it raises, under its name.
    """
    if not isinstance(text, str) or not text:
        raise InputError(f"{name}: allowed is a picture in base64")
    if len(text) > MOST * 4 // 3:
        raise InputError(f"{name}: larger than {MOST // 2**20} MiB")
    try:
        code = "".join(_HEAD.sub("", text, count=1).split())  # some writers break the lines
        data = base64.b64decode(code, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{name}: not base64") from None
    with tempfile.TemporaryDirectory(prefix="ldm-picture-") as folder:
        path = Path(folder) / "picture"
        path.write_bytes(data)
        with named(path, name):
            yield path


@contextmanager
def named(path: str | Path, name: str) -> Iterator[None]:
    """Let errors inside speak of a name instead of a path."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from None


def picture_of(text: object, name: str) -> Pixels:
    """Pixels (H, W, 3) of a picture in base64; see `file_of`."""
    with file_of(text, name) as path:
        return load_rgb(path)


def mask_of(text: object, name: str) -> Mask:
    """A mask (H, W) of a picture in base64, True where it is white; see `file_of`."""
    with file_of(text, name) as path:
        return load_mask(path)


def tidy(folder: Path) -> None:
    """Remove old uploads from gradio's folder; the newest stay, which a page may still show."""
    files = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file():
                files.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(files, reverse=True)[KEPT:]:
        with suppress(OSError):
            path.unlink()
            path.parent.rmdir()
