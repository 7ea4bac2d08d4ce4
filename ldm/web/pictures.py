"""The finished pictures below the page's folder, by names that cannot leave it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ldm.errors import InputError, shown

NAME = re.compile(r"samples/\d{5,12}\.png|grid-\d{4,12}\.png")


class Pictures:
    """What lies in a folder of results.

    Args:
        folder: with ``samples/00000.png`` and ``grid-0000.png``; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._seen: tuple[int, ...] = ()
        self._names: list[str] = []

    def names(self, most: int) -> list[str]:
        """The newest, newest first. The folder is read where something changed in it."""
        places = [(self.folder, ""), (self.folder / "samples", "samples/")]
        seen = tuple(path.stat().st_mtime_ns for path, _ in places if path.is_dir())
        if seen != self._seen:
            found = []
            for path, prefix in places:
                if path.is_dir():
                    for entry in os.scandir(path):
                        if NAME.fullmatch(prefix + entry.name):
                            found.append((entry.stat().st_mtime_ns, prefix + entry.name))
            self._names = [name for _, name in sorted(found, reverse=True)]
            self._seen = seen
        return self._names[:most]

    def path(self, name: str) -> Path:
        """Where a picture lies.

        Raises:
            InputError: that is no name of a picture, or there is none of that name.
        """
        path = self.folder / name if NAME.fullmatch(name) else None
        if path is None or path.is_symlink() or not path.is_file():
            raise InputError(f"there is no picture {shown(name)}")
        return path

    def delete(self, name: str) -> None:
        """Remove a picture for good."""
        self.path(name).unlink(missing_ok=True)
