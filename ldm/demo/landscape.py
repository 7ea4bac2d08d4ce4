"""Paints a scene: sky and light first, then the land from far to near, then what stands on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ldm.demo.drawing import land, objects
from ldm.demo.drawing.setting import Setting
from ldm.demo.drawing.sky import paint_sky

if TYPE_CHECKING:
    from ldm.demo.scenes import Scene

_LANDS = {
    "mountains": land.mountains,
    "hills": land.hills,
    "desert": land.desert,
    "sea": land.sea,
}
_OBJECTS = {
    "pines": objects.pines,
    "house": objects.house,
    "cactuses": objects.cactuses,
    "sailboat": objects.sailboat,
}


def _fall_off(setting: Setting) -> None:
    """Darkens the picture away from the side on which the light stands."""
    if setting.has_light:
        away = np.hypot(setting.canvas.x - setting.light_x, 0.12)  # without an edge at the light
        setting.canvas.pixels *= 1.18 - 0.65 * away


def paint(scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
    """Paints the scene.

    Args:
        scene: what to show.
        rng: decides everything the scene's attributes leave open.
        size: edge length in pixels.

    Returns:
        uint8 (size, size, 3), RGB.
    """
    setting = Setting(scene, rng, size)
    paint_sky(setting)
    _LANDS[scene.place](setting)
    if scene.object != "none":
        _OBJECTS[scene.object](setting)
    _fall_off(setting)
    return setting.canvas.to_uint8()
