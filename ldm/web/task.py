"""What is to be drawn: a task of the server, complete and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ldm.images import Pixels
from ldm.masks import Mask
from ldm.modules.tome.config import ToMeWish
from ldm.settings import Settings
from ldm.web.queue import Job
from ldm.web.report import Report


@dataclass(frozen=True)
class Draw:
    """Pictures of one choice of settings.

    Attributes:
        settings: what and how.
        tome: what is asked of Token Merging.
        label: what they are among a job's.
        is_plain: in a grid: the unmerged one that others are compared with.
    """

    settings: Settings
    tome: ToMeWish
    label: str = ""
    is_plain: bool = False


@dataclass(frozen=True)
class Guide:
    """A ControlNet and what it reads; see Pipeline.set_control.

    Attributes:
        net: a name among ``models/controlnet``.
        picture: (H, W, 3).
        strength: 0 to 2.
        finds_edges: let it read the picture's Canny edges.
    """

    net: str
    picture: Pixels
    strength: float = 1.0
    finds_edges: bool = False


@dataclass(frozen=True)
class Grid:
    """A picture of pictures: which draws, row by row."""

    n_columns: int
    cells: tuple[int, ...]
    unmerged: tuple[int, ...]  # the draw that each cell is compared with


@dataclass(frozen=True)
class Task:
    """What to draw.

    Attributes:
        model: its name among the runner's models.
        draws: one after the other.
        init: img2img and inpainting: the picture to start from, (H, W, 3).
        mask: inpainting: where to paint, (H, W) of any size.
        init_name: what the user calls the picture, for the notes.
        vae: a name among ``models/vae``; empty: the model's own.
        is_pair: the two draws are the same, with and without merging.
        grid: how to show all draws in one picture.
        guide: what guides their layout; None: what the program was started with.
    """

    model: str
    draws: tuple[Draw, ...]
    init: Pixels | None = None
    mask: Mask | None = None
    init_name: str = ""
    vae: str = ""
    is_pair: bool = False
    grid: Grid | None = None
    guide: Guide | None = None

    @property
    def n_pictures(self) -> int:
        """How many it will be."""
        return sum(draw.settings.n_samples * draw.settings.n_iter for draw in self.draws)


DrawJob: TypeAlias = "Job[Task, Report]"
