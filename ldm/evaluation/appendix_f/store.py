"""The folder of a sweep: finished pictures with their measures, and what they were made with.

A picture and its row of measures are one PNG file, written whole or not at all, so that neither is
ever there without the other, and a run can end at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.evaluation.appendix_f.files import write_text
from ldm.evaluation.appendix_f.plan import Batch, Setting
from ldm.images import Picture, Pixels, load_rgb
from ldm.images import read_settings as settings_of_picture

Row = dict[str, Any]


class Store:
    """Results in a folder.

    Args:
        folder: made when the first file is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._about = self.folder / "about.json"

    def claim(self, about: Mapping[str, Any], prompts: Sequence[str]) -> None:
        """Note what all pictures of the folder have in common; a later run must have the same.

        Args:
            about: everything that decides about pictures besides setting, size and prompt.
            prompts: a later run may have more or fewer of them, in the same order.

        Raises:
            InputError: the folder was begun with something else; nothing was changed.
        """
        wanted = {"about": dict(about), "prompts": list(prompts)}
        if self._about.exists():
            there = json.loads(self._about.read_text(encoding="utf-8"))
            for name in sorted({*there["about"], *about}):
                before, now = there["about"].get(name), about.get(name)
                if before != now:
                    raise InputError(
                        f"{name} {now}: the pictures in {self.folder} were made with {before}; "
                        "choose another --outdir, or give what it was"
                    )
            for i, (before, now) in enumerate(zip(there["prompts"], prompts, strict=False)):
                if before != now:
                    raise InputError(
                        f"prompt {i} {now!r}: the pictures in {self.folder} were made with "
                        f"{before!r}; choose another --outdir"
                    )
            if len(prompts) <= len(there["prompts"]):
                return
        write_text(self._about, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")

    def remove_leftovers(self) -> None:
        """Remove what was being written when an earlier run was killed."""
        for path in self.folder.rglob(".*.part"):
            path.unlink(missing_ok=True)

    def path(self, setting: Setting, size: int, number: int) -> Path:
        """Where a picture lies."""
        return self.folder / "pictures" / str(size) / setting.folder / f"{number:05}.png"

    def rows(self, setting: Setting, batch: Batch) -> list[Row] | None:
        """The measures of a batch's pictures; None unless all are there, made in this batch."""
        found = []
        for number in batch.numbers:
            path = self.path(setting, batch.size, number)
            if not path.exists():
                return None
            row = settings_of_picture(path)["measures"]
            if row["batch"] != [batch.first, len(batch.pictures)]:
                return None
            found.append(row)
        return found

    def add(
        self,
        setting: Setting,
        batch: Batch,
        pixels: Sequence[Pixels],
        about: Sequence[Mapping[str, Any]],
        rows: Sequence[Row],
    ) -> None:
        """Write a batch's pictures, (H, W, 3) each, with their settings and measures."""
        place = [batch.first, len(batch.pictures)]
        for number, picture, made, row in zip(batch.numbers, pixels, about, rows, strict=True):
            notes = {"setting": setting.name, "measures": {**row, "batch": place}}
            Picture(picture, {**made, **notes}).save(self.path(setting, batch.size, number))

    def pixels(self, setting: Setting, size: int, number: int) -> Pixels:
        """A finished picture, (H, W, 3)."""
        return load_rgb(self.path(setting, size, number))
