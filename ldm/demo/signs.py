"""A second subject, foreign to the demo's landscapes: painted words on patterned grounds.

Whether an order of merging methods is the landscapes' own is seen on a model of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

WORDS = ("BUS", "CAFE", "FISH", "ICE", "PARK", "SUN", "TEA", "ZOO")
COLOURS = {
    "black": (25, 25, 30), "blue": (40, 80, 190), "green": (30, 130, 70),
    "red": (200, 40, 45), "white": (245, 245, 240), "yellow": (245, 210, 60),
}  # fmt: skip
PATTERNS = ("stripes", "checks", "dots", "rings")
PLACES = {"at the top": 0.25, "in the middle": 0.5, "at the bottom": 0.75}
SMOOTHING = 2  # pictures are drawn so many times larger


@dataclass(frozen=True)
class Sign:
    """What a picture shows; `ground` has two colours, neither of them the ink's."""

    word: str
    ink: str
    ground: tuple[str, str]
    pattern: str
    place: str

    @property
    def caption(self) -> str:
        """The sign in words."""
        ground = f"{self.ground[0]} and {self.ground[1]} {self.pattern}"
        return f"the word {self.word} in {self.ink} letters {self.place}, on {ground}"

    @property
    def attributes(self) -> dict[str, str]:
        """What the caption says, by name."""
        return {
            "word": self.word,
            "ink": self.ink,
            "first": self.ground[0],
            "second": self.ground[1],
            "pattern": self.pattern,
            "place": self.place,
        }


def sign_of(index: int, seed: int) -> Sign:
    """Sign number `index` of the set that `seed` names."""
    rng = np.random.default_rng((seed, index, 2))
    ink, *ground = rng.choice(list(COLOURS), 3, replace=False).tolist()
    word, pattern, place = (str(rng.choice(list(c))) for c in (WORDS, PATTERNS, PLACES))
    return Sign(word, ink, (ground[0], ground[1]), pattern, place)


def draw_sign(sign: Sign, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a sign, uint8 (size, size, 3); `rng` decides about scale, angle and shades."""
    side = size * SMOOTHING
    y, x = np.mgrid[0:side, 0:side] / side
    angle, n = rng.uniform(0, np.pi), rng.uniform(2.5, 4)
    u = n * (x * np.cos(angle) + y * np.sin(angle))
    v = n * (y * np.cos(angle) - x * np.sin(angle))
    inside = {
        "stripes": u % 1 < 0.5,
        "checks": (u % 1 < 0.5) ^ (v % 1 < 0.5),
        "dots": (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.09,
        "rings": n * np.hypot(x - 0.5, y - 0.5) % 1 < 0.5,
    }[sign.pattern]
    shades = [np.array(COLOURS[c]) * rng.uniform(0.85, 1.0) for c in (*sign.ground, sign.ink)]
    picture = Image.fromarray(np.where(inside[..., None], *shades[:2]).astype(np.uint8))
    height = side * rng.uniform(0.3, 0.36)
    draw = ImageDraw.Draw(picture)
    draw.text(
        (side / 2, side * (PLACES[sign.place] + rng.uniform(-0.03, 0.03))),
        sign.word,
        fill=tuple(int(c) for c in shades[2]),
        font=ImageFont.load_default(height),
        anchor="mm",
        stroke_width=round(height / 14),
        stroke_fill=tuple(int(c) for c in shades[2]),
    )
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))


class RenderedSigns(Dataset):
    """Captioned pictures of signs, drawn on demand: the same ones at every reading.

    An item is ``{"image": float32 (H, W, 3) in [-1, 1], "caption": str, "scene": dict}``, the
    last with the sign's attributes.

    Args:
        n_pictures: how many pictures the set has.
        size: edge length in pixels.
        seed: which pictures; sets with different seeds share none.
    """

    def __init__(self, n_pictures: int, size: int = 128, seed: int = 0) -> None:
        self.n_pictures, self.size, self.seed = n_pictures, size, seed

    def __len__(self) -> int:
        """How many pictures there are."""
        return self.n_pictures

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One picture with its caption."""
        if not 0 <= index < self.n_pictures:
            raise IndexError(index)
        sign = sign_of(index, self.seed)
        picture = draw_sign(sign, np.random.default_rng((self.seed, index, 3)), self.size)
        image = picture.astype(np.float32) / 127.5 - 1
        return {"image": image, "caption": sign.caption, "scene": sign.attributes}


class SignCaptions(Dataset):
    """Captions of signs without their pictures: ``{"caption": str, "scene": dict}``.

    Args:
        n_captions: how many the set has.
        seed: which signs.
    """

    def __init__(self, n_captions: int, seed: int = 0) -> None:
        self.n_captions, self.seed = n_captions, seed

    def __len__(self) -> int:
        """How many captions there are."""
        return self.n_captions

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One caption with its sign's attributes."""
        if not 0 <= index < self.n_captions:
            raise IndexError(index)
        sign = sign_of(index, self.seed)
        return {"caption": sign.caption, "scene": sign.attributes}
