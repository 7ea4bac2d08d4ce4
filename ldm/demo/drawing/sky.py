"""The sky: its gradient, the glow around the light, stars, clouds, the sun or the moon."""

from __future__ import annotations

import numpy as np

from ldm.demo.drawing.canvas import Array, colour, smoothstep
from ldm.demo.drawing.setting import DISC, Setting


def paint_sky(setting: Setting) -> None:
    """Fills the canvas with the sky and all that is in it."""
    c, p = setting.canvas, setting.palette
    t = np.clip(c.y / (setting.horizon + 0.04), 0.0, 1.0)
    lower = smoothstep(0.35, 1.0, t)
    tint = 1.0 + 0.02 * setting.rng.standard_normal((3, 1, 1), dtype=np.float32)
    shades = p.zenith + smoothstep(0.0, 0.75, t) * (p.middle - p.zenith)
    c.pixels[:] = (shades + lower * (p.horizon - shades)) * tint
    if setting.scene.time == "overcast":
        veil = c.fbm(setting.rng, 2, 5, 5, 0.55) * (1.1 - t)
        c.blend(p.cloud, 0.8 * smoothstep(0.0, 1.6, veil))
        c.blend(p.cloud_shade, 0.8 * smoothstep(0.0, 1.6, -veil))
    if setting.has_light:
        distance = np.sqrt((c.x - setting.light_x) ** 2 + (c.y - setting.light_y) ** 2)
        halo = 0.50 * np.exp(-((distance / 0.12) ** 2)) + 0.42 * np.exp(-distance / 0.26)
        c.blend(p.glow, halo)
    if setting.scene.sky == "stars":
        _stars(setting)
    if setting.scene.sky == "clouds":
        _clouds(setting)
    if setting.has_light:
        _disc(setting, distance)


def _disc(setting: Setting, distance: Array) -> None:
    """The sun, or the moon with its marks."""
    c = setting.canvas
    face = setting.palette.disc
    if setting.scene.time == "night":
        box = c.box(
            setting.light_x - 0.06,
            setting.light_y - 0.06,
            setting.light_x + 0.06,
            setting.light_y + 0.06,
        )
        marks = c.fbm(setting.rng, 24, 24, 2, band=box[0])[:, box[1]]
        coverage = np.clip((DISC - distance[box]) * c.size + 0.5, 0.0, 1.0)
        c.blend(face * (0.96 - 0.16 * smoothstep(-0.2, 1.2, marks)), coverage, box)
    else:
        c.blend(face, np.clip((DISC - distance) * c.size + 0.5, 0.0, 1.0))


def _stars(setting: Setting) -> None:
    """Small spots, none close to the moon."""
    c, rng = setting.canvas, setting.rng
    n = 70
    x, y = rng.random(n), rng.random(n) ** 1.2 * (setting.horizon - 0.02)
    brightness = 0.45 + 0.55 * rng.random(n) ** 2
    radius = 0.0040 + 0.0045 * brightness**2
    brightness *= np.hypot(x - setting.light_x, y - setting.light_y) > 2.0 * DISC
    reach = max(2, int(np.ceil(0.02 * c.size)))
    offsets = np.arange(-reach, reach + 1)
    columns = (x * c.size).astype(int)[:, None] + offsets
    rows = (y * c.size).astype(int)[:, None] + offsets
    # a star fainter than a pixel keeps its light, spread over that pixel
    width = np.maximum(radius, 0.55 / c.size)
    peak = brightness * np.minimum(1.0, 2.2 * (radius / width) ** 2)
    across = np.exp(-((((columns + 0.5) / c.size - x[:, None]) / width[:, None]) ** 2))
    down = np.exp(-((((rows + 0.5) / c.size - y[:, None]) / width[:, None]) ** 2))
    spots = (peak[:, None, None] * down[:, :, None] * across[:, None, :]).astype(np.float32)
    sheet = np.zeros((c.size, c.size), np.float32)
    places = (
        np.clip(rows, 0, c.size - 1)[:, :, None],
        np.clip(columns, 0, c.size - 1)[:, None, :],
    )
    np.maximum.at(sheet, np.broadcast_arrays(*places), spots)
    c.blend(colour(0.97, 0.97, 1.0), np.minimum(sheet, 1.0))


def _clouds(setting: Setting) -> None:
    """Drifting fractal clouds that leave the sun or the moon free."""
    c, p, rng = setting.canvas, setting.palette, setting.rng
    shape = c.fbm(rng, 3, 9, 5, 0.5)
    fade = smoothstep(0.0, 0.06, c.y) * smoothstep(
        setting.horizon - 0.08, setting.horizon - 0.22, c.y
    )
    near = np.sqrt((c.x - setting.light_x) ** 2 + ((c.y - setting.light_y) * 1.3) ** 2)
    clear = smoothstep(0.07, 0.17, near)
    sky_rows = max(1, int(0.36 * c.size))
    # the threshold is a quantile of the shape itself, so that every cloudy sky has clouds
    edge = float(np.quantile((shape * clear)[:sky_rows], 0.62))
    density = smoothstep(edge, edge + 1.1, shape) * fade * clear
    thick = smoothstep(edge + 0.2, edge + 1.7, np.roll(shape, -max(1, c.size // 40), axis=0))
    tone = p.cloud + (0.85 * thick) * (p.cloud_shade - p.cloud)
    c.blend(tone, 0.95 * np.sqrt(density))
