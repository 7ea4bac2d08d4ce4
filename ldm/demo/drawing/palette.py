"""Colours: of the sky and the light at each time of day, and of what the land is made of."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.demo.drawing.canvas import Array, colour


@dataclass(frozen=True)
class Palette:
    """The colours of one time of day, each (3, 1, 1).

    Attributes:
        zenith, middle, horizon: the sky from top to bottom.
        haze: what distance fades into.
        light, ambient: land looks `albedo * (ambient + light * facing)`.
        disc, glow: the sun or the moon, and the sky around it.
        cloud, cloud_shade: clouds in the light and at their thickest.
    """

    zenith: Array
    middle: Array
    horizon: Array
    haze: Array
    light: Array
    ambient: Array
    disc: Array
    glow: Array
    cloud: Array
    cloud_shade: Array


PALETTES = {
    "noon": Palette(
        zenith=colour(0.16, 0.40, 0.78),
        middle=colour(0.38, 0.63, 0.90),
        horizon=colour(0.74, 0.87, 0.95),
        haze=colour(0.66, 0.79, 0.91),
        light=colour(0.72, 0.67, 0.56),
        ambient=colour(0.46, 0.50, 0.56),
        disc=colour(1.0, 0.97, 0.62),
        glow=colour(0.86, 0.93, 0.96),
        cloud=colour(1.0, 1.0, 1.0),
        cloud_shade=colour(0.74, 0.80, 0.88),
    ),
    "sunset": Palette(
        zenith=colour(0.24, 0.17, 0.42),
        middle=colour(0.80, 0.33, 0.32),
        horizon=colour(1.0, 0.66, 0.26),
        haze=colour(0.82, 0.40, 0.30),
        light=colour(0.78, 0.44, 0.24),
        ambient=colour(0.35, 0.28, 0.40),
        disc=colour(1.0, 0.93, 0.60),
        glow=colour(1.0, 0.56, 0.16),
        cloud=colour(1.0, 0.62, 0.42),
        cloud_shade=colour(0.42, 0.20, 0.34),
    ),
    "dawn": Palette(
        zenith=colour(0.44, 0.60, 0.84),
        middle=colour(0.82, 0.76, 0.88),
        horizon=colour(1.0, 0.85, 0.80),
        haze=colour(0.88, 0.80, 0.86),
        light=colour(0.56, 0.45, 0.42),
        ambient=colour(0.50, 0.50, 0.60),
        disc=colour(1.0, 0.98, 0.84),
        glow=colour(1.0, 0.72, 0.54),
        cloud=colour(1.0, 0.95, 0.95),
        cloud_shade=colour(0.74, 0.64, 0.78),
    ),
    "night": Palette(
        zenith=colour(0.02, 0.03, 0.10),
        middle=colour(0.05, 0.08, 0.22),
        horizon=colour(0.13, 0.19, 0.38),
        haze=colour(0.11, 0.16, 0.31),
        light=colour(0.34, 0.42, 0.58),
        ambient=colour(0.20, 0.26, 0.42),
        disc=colour(0.97, 0.97, 0.90),
        glow=colour(0.36, 0.45, 0.72),
        cloud=colour(0.36, 0.41, 0.56),
        cloud_shade=colour(0.10, 0.13, 0.24),
    ),
    "overcast": Palette(
        zenith=colour(0.52, 0.56, 0.61),
        middle=colour(0.64, 0.67, 0.71),
        horizon=colour(0.77, 0.79, 0.80),
        haze=colour(0.62, 0.66, 0.69),
        light=colour(0.24, 0.24, 0.23),
        ambient=colour(0.52, 0.54, 0.56),
        disc=colour(0.8, 0.8, 0.8),
        glow=colour(0.0, 0.0, 0.0),
        cloud=colour(0.80, 0.81, 0.83),
        cloud_shade=colour(0.44, 0.47, 0.52),
    ),
}

ROCK = colour(0.52, 0.47, 0.43)
SNOW = colour(1.02, 1.04, 1.08)
GRASS = (colour(0.33, 0.52, 0.19), colour(0.42, 0.56, 0.20), colour(0.28, 0.48, 0.22))
SAND = (colour(0.93, 0.72, 0.44), colour(0.90, 0.66, 0.40), colour(0.96, 0.78, 0.50))
WATER = colour(0.05, 0.24, 0.36)
