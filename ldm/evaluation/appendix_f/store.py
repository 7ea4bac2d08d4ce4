"""The folder of an experiment: finished pictures, what was measured of them, and what made them.

A picture and its distances to the unmerged one are one PNG file, written whole or not at all, so
that neither is ever there without the other. What networks say of finished pictures lies beside
them, a file for each batch, and can be added at any time.
"""

from __future__ import annotations

import json
import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.errors import InputError
from ldm.evaluation.appendix_f.plan import Batch, Setting
from ldm.images import Picture, Pixels, load_rgb
from ldm.images import read_settings as settings_of_picture
from ldm.numbered import make_folder
from ldm.text import read_json
from ldm.util import remove_leftovers, written_whole

Row = dict[str, Any]

logger = logging.getLogger(__name__)


class Store:
    """Results in a folder.

    Args:
        folder: made when the first file is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._about = self.folder / "about.json"
        self._common: Mapping[str, Any] = {}

    def claim(self, about: Mapping[str, Any], prompts: Sequence[str]) -> None:
        """Note what all pictures of the folder have in common; a later run must have the same.

        Pictures that say of themselves that they were made otherwise count as missing.

        Args:
            about: everything that decides about pictures besides setting, size and prompt.
            prompts: a later run may have more or fewer of them, in the same order.

        Raises:
            InputError: the folder was begun with something else; nothing was changed.
        """
        self._common = dict(about)
        there = self._claimed()
        if there is not None:
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
        self.write_json("about.json", {"about": dict(about), "prompts": list(prompts)})

    def _claimed(self) -> dict[str, Any] | None:
        """What the folder was begun with; None where it is new, or its note is damaged."""
        if not self._about.exists():
            return None
        try:
            found = read_json(self._about)
            if isinstance(found.get("about"), dict) and isinstance(found.get("prompts"), list):
                return found
        except InputError as error:
            logger.warning("%s", error)
        logger.warning("%s is damaged and written anew", self._about)
        return None

    def remove_leftovers(self) -> None:
        """Remove what was being written when an earlier run was killed."""
        for folder in (self.folder, *self.folder.rglob("*/")):
            if folder.is_dir():
                remove_leftovers(folder)

    def write_json(self, name: str, content: Any) -> Path:
        """Write a file of the folder, whole or not at all."""
        return self.write_text(name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Likewise, of any text."""
        path = self.folder / name
        make_folder(path.parent)
        with written_whole(path, "w") as file:
            file.write(text)
        return path

    # --- pictures -------------------------------------------------------------------------------

    def path(self, setting: Setting, size: int, number: int) -> Path:
        """Where a picture lies."""
        return self.folder / "pictures" / str(size) / setting.folder / f"{number:05}.png"

    def rows(self, setting: Setting, batch: Batch) -> list[Row] | None:
        """What was measured when a batch was drawn; None unless all of it is there and whole."""
        found = []
        for number, (prompt, seed) in zip(batch.numbers, batch.pictures, strict=True):
            path = self.path(setting, batch.size, number)
            if not path.exists():
                return None
            try:
                made = settings_of_picture(path)
            except InputError as error:
                logger.warning("%s; it is drawn anew", error)
                return None
            row = made.get("measures")
            expected = {**self._common, **setting.sampling, "prompt": prompt, "seed": seed}
            is_own = all(made.get(name, value) == value for name, value in expected.items())
            place = [batch.first, len(batch.pictures)]
            if not isinstance(row, dict) or row.get("batch") != place or not is_own:
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

    def remove(self, batch: Batch) -> None:
        """Remove a batch's pictures of all settings, also of those that a plan leaves out."""
        for number in batch.numbers:
            for path in self.folder.glob(f"pictures/{batch.size}/*/{number:05}.png"):
                path.unlink(missing_ok=True)

    def pixels(self, setting: Setting, size: int, number: int) -> Pixels:
        """A finished picture, (H, W, 3)."""
        return load_rgb(self.path(setting, size, number))

    # --- what networks say of them --------------------------------------------------------------

    def judged(self, setting: Setting, batch: Batch) -> dict[str, NDArray[Any]]:
        """What networks said of a batch's pictures, as they are now: name -> (n, ...)."""
        try:
            found = read_arrays(self._beside(setting, batch))
        except ValueError:  # new, or damaged
            return {}
        is_current = np.array_equal(found.pop("pictures", ()), self._marks(setting, batch))
        return found if is_current else {}

    def add_judged(
        self, setting: Setting, batch: Batch, values: Mapping[str, NDArray[Any]]
    ) -> None:
        """Keep what networks say of a batch's pictures, beside what is known."""
        path = self._beside(setting, batch)
        make_folder(path.parent)
        marks = self._marks(setting, batch)
        everything = {**self.judged(setting, batch), **values, "pictures": marks}
        with written_whole(path) as file:
            np.savez(file, **everything)  # type: ignore[arg-type]

    def _beside(self, setting: Setting, batch: Batch) -> Path:
        name = f"{batch.first:05}-{len(batch.pictures)}.npz"
        return self.folder / "judged" / str(batch.size) / setting.folder / name

    def _marks(self, setting: Setting, batch: Batch) -> NDArray[np.int64]:
        """Check sums of the batch's files, which change where one was replaced."""
        files = (self.path(setting, batch.size, number) for number in batch.numbers)
        return np.array([zlib.crc32(file.read_bytes()) for file in files], dtype=np.int64)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file.

    Raises:
        ValueError: there is no such file, it is damaged, or something else.
    """
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from None
    except (NotImplementedError, zipfile.BadZipFile, zlib.error) as error:  # of a damaged archive
        raise ValueError(str(error)) from None
