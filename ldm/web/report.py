"""What is known of a job while it runs and afterwards: progress, lines, pictures, a preview."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Line:
    """A line that stays; ``kind`` is empty, tome, warning or error."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Shown:
    """A finished picture: its name below the folder of results, and what it is among the job's."""

    name: str
    label: str = ""


@dataclass
class Report:
    """Filled by the runner, read by the page and the API.

    Attributes:
        title: the job in a few words.
        seed: of its first picture.
        n_pictures: how many it will be.
        n_at_once: pictures under way, which are drawn together.
        text: what is being done.
        share: of all, from 0 to 1.
        step: of the picture under way, and of how many.
        lines: what is said of it, each once.
        pictures: finished ones; the first two are a pair to compare where ``is_pair``.
        infos: the settings of each of them.
        preview: of the picture under way, a WebP.
        n_previews: how many there were.
    """

    title: str
    seed: int = 0
    n_pictures: int = 1
    is_pair: bool = False
    n_at_once: int = 1
    text: str = ""
    share: float = 0.0
    step: tuple[int, int] = (0, 0)
    lines: list[Line] = field(default_factory=list)
    pictures: list[Shown] = field(default_factory=list)
    infos: list[dict[str, Any]] = field(default_factory=list)
    preview: bytes | None = None
    n_previews: int = 0
    _since: float | None = None

    def say(self, text: str, kind: str = "") -> None:
        """Add a line, if it was not said before."""
        line = Line(text, kind)
        if line not in self.lines:
            self.lines.append(line)

    def start(self) -> None:
        """The time left is counted from here on."""
        if self._since is None:
            self._since = time.monotonic()

    @property
    def seconds_left(self) -> float | None:
        """An estimate; None before there is one."""
        if self._since is None or self.share <= 0:
            return None
        return (time.monotonic() - self._since) * (1 - self.share) / self.share


def duration(seconds: float) -> str:
    """A time to wait, in whole seconds or minutes."""
    if seconds < 100:
        return f"{math.ceil(seconds)} s"
    return f"{round(seconds / 60)} min"
