"""Captioned landscape pictures drawn from a seed: what scenes can show, and how that is said.

A scene is six categorical attributes. `render` draws it (see `ldm.demo.landscape`), `caption`
names it, and `is_held_out` reserves some combinations of attributes that training never sees.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Literal, TypeVar

import numpy as np

from ldm.demo.landscape import paint

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "place": ("mountains", "hills", "desert", "sea"),
    "time": ("noon", "sunset", "dawn", "night", "overcast"),
    "light_position": ("left", "centre", "right", "none"),
    "sky": ("plain", "clouds", "stars"),
    "ground": ("bare", "snow"),
    "object": ("none", "sailboat", "pines", "house", "cactuses"),
}
"""Every attribute with the values it can take, in the order of the classifier's labels."""

Split = Literal["train", "held_out", "all"]
_T = TypeVar("_T")

_OBJECTS = {
    "mountains": ("none", "pines", "house"),
    "hills": ("none", "pines", "house"),
    "desert": ("none", "cactuses", "house"),
    "sea": ("none", "sailboat"),
}
_HELD_OUT_SHARE = 0.12


@dataclass(frozen=True)
class Scene:
    """What a picture shows; the values of each attribute are listed in `ATTRIBUTES`."""

    place: str = "hills"
    time: str = "noon"
    light_position: str = "left"
    sky: str = "plain"
    ground: str = "bare"
    object: str = "none"


def attributes(scene: Scene) -> dict[str, str]:
    """Returns the scene's attributes by name, in the order of `ATTRIBUTES`."""
    return asdict(scene)


def mirror(scene: Scene) -> Scene:
    """Returns the scene that the horizontally flipped picture shows."""
    flipped = {"left": "right", "right": "left"}.get(scene.light_position, scene.light_position)
    return replace(scene, light_position=flipped)


def _makes_sense(scene: Scene) -> bool:
    overcast = scene.time == "overcast"
    return (
        (scene.light_position == "none") == overcast
        and (scene.sky == "plain" or not overcast)
        and (scene.sky != "stars" or scene.time == "night")
        and (scene.ground == "bare" or scene.place in ("mountains", "hills"))
        and scene.object in _OBJECTS[scene.place]
    )


@cache
def all_scenes(split: Split = "all") -> tuple[Scene, ...]:
    """Returns every combination of attributes that makes sense, in a fixed order, of one split."""
    scenes = (Scene(*values) for values in product(*ATTRIBUTES.values()))
    wanted = {"all": (False, True), "train": (False,), "held_out": (True,)}[split]
    return tuple(s for s in scenes if _makes_sense(s) and is_held_out(s) in wanted)


def is_held_out(scene: Scene) -> bool:
    """Returns whether training never sees this combination of attributes, nor its mirror image."""
    side = "side" if scene.light_position in ("left", "right") else scene.light_position
    key = "/".join(["0", *attributes(replace(scene, light_position=side)).values()])
    return zlib.crc32(key.encode()) / 2**32 < _HELD_OUT_SHARE


def sample_scene(rng: np.random.Generator, split: Split = "all") -> Scene:
    """Draws a scene, one attribute after the other, each uniformly among what is still possible.

    Args:
        rng: the source of randomness.
        split: which combinations may be drawn.
    """
    scenes = all_scenes(split)
    for name in ATTRIBUTES:
        values = sorted({getattr(s, name) for s in scenes})
        value = values[rng.integers(len(values))]
        scenes = tuple(s for s in scenes if getattr(s, name) == value)
    return scenes[0]


def render(scene: Scene, rng: np.random.Generator, size: int = 256) -> np.ndarray:
    """Draws the scene.

    Args:
        scene: what to show.
        rng: decides everything the attributes leave open; the same state gives the same picture
            at any size.
        size: edge length in pixels.

    Returns:
        uint8 (size, size, 3), RGB.
    """
    return paint(scene, rng, size)


_PLACES = {
    ("mountains", "bare"): (
        ("in", "the mountains"),
        ("in", "rocky mountains"),
        ("in", "high mountains"),
    ),
    ("mountains", "snow"): (
        ("in", "snowy mountains"),
        ("in", "mountains covered in snow"),
        ("in", "mountains with snow"),
    ),
    ("hills", "bare"): (
        ("on", "green hills"),
        ("on", "grassy hills"),
        ("among", "rolling green hills"),
    ),
    ("hills", "snow"): (
        ("on", "snowy hills"),
        ("on", "hills covered in snow"),
        ("among", "white snowy hills"),
    ),
    ("desert", "bare"): (
        ("in", "the desert"),
        ("in", "a sandy desert"),
        ("in", "a desert with sand dunes"),
    ),
    ("sea", "bare"): (("on", "the sea"), ("on", "a calm sea"), ("on", "the blue sea")),
}
_OBJECT_PHRASES = {
    "sailboat": ("a sailboat", "a white sailboat", "a small sailboat"),
    "pines": ("pine trees", "a few pine trees", "tall pine trees"),
    "house": ("a red house", "a small red house", "a red house with a window"),
    "cactuses": ("cactuses", "tall cactuses", "a few cactuses"),
}
_TIMES = {
    "noon": ("at noon", "at midday", "in the middle of the day"),
    "sunset": ("at sunset", "during sunset", "in the light of the sunset"),
    "dawn": ("at dawn", "at sunrise", "in the early morning"),
    "night": ("at night", "during the night", "in the dark night"),
    "overcast": ("under an overcast sky", "on an overcast day", "under a grey overcast sky"),
}
_LIGHTS = {
    "noon": ("the sun high", "a high sun", "the sun", "the bright sun"),
    "sunset": ("the sun low", "a low sun", "the sun", "the orange sun"),
    "dawn": ("the sun low", "a low sun", "the sun", "the pale sun"),
    "night": ("the moon", "a full moon", "the bright moon", "a white moon"),
}
_POSITIONS = {
    "left": ("on the left", "on the left side", "to the left"),
    "centre": ("in the centre", "in the center", "in the middle"),
    "right": ("on the right", "on the right side", "to the right"),
}
_SKIES = {
    "plain": ("", "", "", "a clear sky"),
    "clouds": ("a few clouds", "clouds in the sky", "white clouds", "a cloudy sky"),
    "stars": ("stars in the sky", "a starry sky", "many stars", "bright stars"),
}
_OPENINGS = ("", "", "", "a picture of ", "a landscape with ")


def _choose(options: Sequence[_T], rng: np.random.Generator | None) -> _T:
    return options[0 if rng is None else int(rng.integers(len(options)))]


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Returns a caption that names every attribute that differs from its default.

    Args:
        scene: what to describe.
        rng: chooses words and their order; None gives the canonical phrasing.
    """
    preposition, place = _choose(_PLACES[scene.place, scene.ground], rng)
    subject = place
    if scene.object != "none":
        subject = f"{_choose(_OBJECT_PHRASES[scene.object], rng)} {preposition} {place}"
    time = _choose(_TIMES[scene.time], rng)
    details = []
    if scene.light_position != "none":
        details.append(
            f"{_choose(_LIGHTS[scene.time], rng)} {_choose(_POSITIONS[scene.light_position], rng)}"
        )
    sky = "" if scene.time == "overcast" else _choose(_SKIES[scene.sky], rng)
    if sky:
        details.append(sky)
    if rng is None:
        return ", ".join([f"{subject} {time}", *details])
    if len(details) == 2 and rng.random() < 0.3:
        details.reverse()
    bare, subject = subject, _choose(_OPENINGS, rng) + subject
    if not details:
        return _choose((f"{subject} {time}", f"{time}, {subject}", f"{subject}, {time}"), rng)
    listed = ", ".join(details)
    forms = (
        f"{subject} {time}, {listed}",
        f"{subject} {time}, {listed}",
        f"{time}, {subject}, {listed}",
        f"{subject} {time} with {_listed(details)}",
        f"{subject}, {listed}, {time}",
        f"{_listed(details)} over {bare} {time}",
    )
    return _choose(forms, rng)


def _all_phrases() -> list[str]:
    tables = (_OBJECT_PHRASES, _TIMES, _LIGHTS, _POSITIONS, _SKIES)
    places = [f"{preposition} {place}" for row in _PLACES.values() for preposition, place in row]
    phrases = [phrase for table in tables for row in table.values() for phrase in row]
    return [*places, *phrases, *_OPENINGS, "and with over"]


VOCABULARY: frozenset[str] = frozenset(re.findall(r"[^\W_]+", " ".join(_all_phrases()).lower()))
"""Every word, in lower case, that captions can use."""
