"""Numbered files of a folder, in which any number of programs can write at one time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ldm.errors import InputError
from ldm.util import part_of


def next_path(folder: str | Path, name: str) -> Path:
    """The first free numbered file name: one above the highest number in use.

    Args:
        folder: where; it need not exist.
        name: a pattern such as ``grid-{:04}.png``.
    """
    before, after = re.split(r"{:0\d+}", name)
    pattern = re.compile(re.escape(before) + r"(\d{1,18})" + re.escape(after), re.ASCII)
    files = os.listdir(folder) if Path(folder).is_dir() else ()
    taken = [int(match[1]) for file in files if (match := pattern.fullmatch(file))]
    return Path(folder) / name.format(max(taken, default=-1) + 1)


class Numbers:
    """Numbered files of a folder; any number of programs can write there at one time.

    Numbers in use are counted once. A file claims its number by appearing under it; where another
    program was quicker, it gets the next free one.

    Args:
        folder: made with the first file.
        name: a pattern such as ``grid-{:04}.png``.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self._digits = slice(len(name.split("{")[0]), -len(name.split("}")[1]) or None)
        self._next: int | None = None

    @property
    def next(self) -> int:
        """The number of the next file, if nobody else is quicker."""
        if self._next is None:
            self._next = self._free()
        return self._next

    def save(self, write: Callable[[Path], object], number: int | None = None) -> Path:
        """Write a file under the next number, or under a given one if that is free.

        Args:
            write: writes to the path that it gets.
            number: wanted.

        Returns:
            Where it is.

        Raises:
            InputError: the file cannot be written there.
        """
        number = self.next if number is None else number
        make_folder(self.folder)
        while True:
            path = self.folder / self.name.format(number)
            try:
                with part_of(path, exclusive=True) as part:
                    write(part)
            except FileExistsError:
                number = max(number + 1, self._free())
                continue
            self._next = max(number + 1, self._next or 0)
            return path

    def _free(self) -> int:
        return int(next_path(self.folder, self.name).name[self._digits])


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        InputError: that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from None
