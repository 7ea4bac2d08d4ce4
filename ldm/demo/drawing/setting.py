"""What all parts of one picture share: the canvas, the palette and where the light stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ldm.demo.drawing.canvas import Array, Canvas
from ldm.demo.drawing.palette import PALETTES

if TYPE_CHECKING:
    from ldm.demo.scenes import Scene

DISC = 0.055
"""Radius of the sun and the moon."""

_LIGHT_X = {"left": (0.17, 0.28), "centre": (0.45, 0.55), "right": (0.72, 0.83), "none": (0.5, 0.5)}
_LOW_SUN_Y = {"mountains": 0.28, "hills": 0.32, "desert": 0.36, "sea": 0.40}


class Setting:
    """One picture in the making.

    Attributes:
        scene: what to show.
        rng: decides everything the scene leaves open.
        canvas: what is painted on.
        palette: the colours of the scene's time of day.
        horizon: height at which the sky ends, 0..1 from the top.
        light_x, light_y: centre of the sun or the moon.
        has_light: whether there is one to see.
    """

    def __init__(self, scene: Scene, rng: np.random.Generator, size: int) -> None:
        self.scene = scene
        self.rng = rng
        self.canvas = Canvas(size)
        self.palette = PALETTES[scene.time]
        self.horizon = 0.50 + 0.05 * rng.random()
        self.light_x = float(rng.uniform(*_LIGHT_X[scene.light_position]))
        low = scene.time in ("sunset", "dawn")
        self.light_y = float(
            _LOW_SUN_Y[scene.place] + rng.uniform(-0.02, 0.02) if low else rng.uniform(0.11, 0.17)
        )
        self.has_light = scene.light_position != "none"

    def lit(self, albedo: Array, facing: Array | float) -> Array:
        """Returns the colour of a surface that faces the light by `facing` (0..1)."""
        return albedo * (self.palette.ambient + self.palette.light * facing)

    def side(self, x: float) -> float:
        """Returns where light on something at `x` comes from: -1 left, 1 right, 0 if diffuse."""
        return float(np.clip(4.0 * (self.light_x - x), -1.0, 1.0)) if self.has_light else 0.0

    def clear_of_light(self, ridge: Array) -> Array:
        """Returns `ridge` lowered where it would hide a low sun."""
        if not self.has_light:
            return ridge
        x = self.canvas.x[0]
        floor = self.light_y + DISC + 0.025
        dip = np.exp(-(((x - self.light_x) / 0.10) ** 4))
        return ridge + dip * np.maximum(floor - ridge, 0.0)
