"""Arrays on disk that take long to fill: gone on with after a stop, named once they are whole."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import InputError, escaped
from ldm.text import read_json
from ldm.util import locked, written_whole

KEPT_EVERY = 30.0
"""Seconds after which it is noted how far an array is."""


def grow(
    path: Path,
    settings: str,
    shape: tuple[int, ...],
    dtype: Any,
    rows: Callable[[int], Iterable[np.ndarray]],
    before: int | None = None,
) -> None:
    """Fill an array row by row; what an earlier call left unfinished is kept.

    Args:
        path: .npy file to be; until it is whole its name ends in ``.partial``.
        settings: what the rows depend on; rows of other settings are not gone on with.
        shape: of the array.
        dtype: of the array.
        rows: all rows from a number on, in order.
        before: `change_of` the file that the caller found not to do; None: there was none.

    Raises:
        InputError: the disk has too little room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent, wait=True):
        if change_of(path) != before:
            return  # another process has just made it
        unfinished, counter = (
            path.with_name(f"{path.name}.partial"),
            path.with_name(f"{path.name}.count"),
        )
        start = _n_done(counter, settings) if unfinished.exists() else 0
        mode: Any = "r+" if start else "w+"
        array = np.lib.format.open_memmap(unfinished, mode, dtype, shape)
        _reserve(unfinished, path, is_new=start == 0)
        noted = time.monotonic()
        for index, row in enumerate(rows(start), start):
            array[index] = row
            if time.monotonic() - noted >= KEPT_EVERY:
                noted = time.monotonic()
                array.flush()
                with written_whole(counter, "w") as file:
                    json.dump({"done": index + 1, "settings": settings}, file)
        array.flush()
        os.replace(unfinished, path)
        counter.unlink(missing_ok=True)


def whole_array(path: Path) -> np.ndarray | None:
    """The array of a file, mapped; None where there is no such file, or it is damaged."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None


def _reserve(file: Path, path: Path, is_new: bool) -> None:
    """Take the room on the disk now: where it is short later, the system ends the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    with file.open("r+b") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        except OSError as error:  # some disks cannot reserve
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                return
            size = file.stat().st_size / 1e9
            if is_new:
                file.unlink()
            raise InputError(
                f"{escaped(path)} needs {size:.1f} GB: {error.strerror}; make room"
            ) from None


def change_of(path: Path) -> int | None:
    """When a file was last changed, in nanoseconds; None: there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def _n_done(counter: Path, settings: str) -> int:
    try:
        state = read_json(counter)
    except InputError:  # new, or damaged
        return 0
    done = state.get("done")
    return done if state.get("settings") == settings and isinstance(done, int) else 0
