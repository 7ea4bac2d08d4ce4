"""Numbered files of a folder, in which any number of programs can write at one time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ldm.errors import InputError
from ldm.util import part_of


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
        before, after = (re.escape(part) for part in re.split(r"{:0\d+}", name))
        self._taken = re.compile(rf"{before}(\d{{1,18}}){after}", re.ASCII)
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
        """One above the highest number in use."""
        files = os.listdir(self.folder) if self.folder.is_dir() else ()
        taken = [int(match[1]) for file in files if (match := self._taken.fullmatch(file))]
        return max(taken, default=-1) + 1


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        InputError: that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from None
