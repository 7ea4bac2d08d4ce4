"""The land from far to near: mountains, hills, desert and sea."""

from __future__ import annotations

import numpy as np

from ldm.demo.drawing.canvas import smoothstep
from ldm.demo.drawing.palette import GRASS, ROCK, SAND, SNOW, WATER
from ldm.demo.drawing.setting import DISC, Setting


def _mist(setting: Setting, top: float, bottom: float, strength: float) -> None:
    """Lays a bank of haze between two heights."""
    c = setting.canvas
    c.blend(
        setting.palette.haze,
        strength * smoothstep(top, bottom, c.y) * smoothstep(bottom + 0.12, bottom, c.y),
    )


def mountains(setting: Setting) -> None:
    """Two ranges of peaks behind a meadow."""
    for n_peaks, top, bottom, haze in ((6, 0.27, 0.36, 0.56), (5, 0.32, 0.46, 0.20)):
        spread = (np.arange(n_peaks) + 0.5 + setting.rng.uniform(-0.3, 0.3, n_peaks)) / n_peaks
        for x in setting.rng.permutation(spread):
            _peak(setting, float(x * 1.1 - 0.05), float(setting.rng.uniform(top, bottom)), haze)
        _mist(setting, 0.46, 0.62, 0.35 if setting.scene.time != "dawn" else 0.75)
    _meadow(setting, 0.62, 0.022, 0.10)
    _meadow(setting, 0.70, 0.018, 0.0)


def _peak(setting: Setting, x: float, y: float, haze: float) -> None:
    """One mountain with its top at (x, y): a face towards the light and one away from it."""
    c, rng, snowy = setting.canvas, setting.rng, setting.scene.ground == "snow"
    slope = float(rng.uniform(0.75, 1.15))
    if setting.has_light:
        reach = max(abs(x - setting.light_x) - 0.075, 0.0)
        y = max(y, setting.light_y + DISC + 0.03 - 0.8 * slope * reach)
    away = np.abs(c.x[0] - x)
    crags = 0.010 * c.profile(rng, 12, 4) * smoothstep(0.0, 0.06, away)
    ridge = y + slope * away * (1.0 - 0.35 * away) + crags
    band = c.band(float(ridge.min()), 0.78)
    drop = c.y[band] - y
    rough = c.fbm(rng, 8, 8, 4, 0.6, band)
    spur = rng.uniform(-0.25, 0.25)
    fall = c.x - x + spur * drop + rough * (0.012 + 0.11 * np.maximum(drop, 0.0))
    side = setting.side(x)
    facing = 0.48 + np.clip(side * 30.0 * fall, -0.40, 0.48) + 0.10 * rough
    grit = c.noise(rng, 60, 80, band)
    albedo = ROCK * (1.0 + 0.09 * rough + 0.08 * grit)
    if snowy:
        line = 0.17 + 0.045 * rough - 0.05 * np.abs(fall)
        white = smoothstep(0.015, -0.015, drop - line) * smoothstep(1.9, 1.3, rough)
        albedo = albedo + white * (SNOW - albedo)
    else:
        green = smoothstep(0.10, 0.24, drop + 0.04 * rough)
        albedo = albedo + (0.7 * green) * (GRASS[2] * (0.9 + 0.1 * rough) - albedo)
    paint = setting.lit(albedo, np.clip(facing, 0.05, 1.0))
    veil = haze * (0.6 + 0.4 * smoothstep(0.0, 0.25, drop))
    paint += veil * (setting.palette.haze - paint)
    c.blend(paint, c.below(ridge, band), (band, slice(None)))


def _meadow(setting: Setting, top: float, swing: float, haze: float) -> None:
    """One fold of grass or snow whose upper edge undulates around `top`."""
    c, rng, snowy = setting.canvas, setting.rng, setting.scene.ground == "snow"
    wave = c.profile(rng, 3, 2, 0.3)
    ridge = setting.clear_of_light(top + swing * wave)
    band = c.band(float(ridge.min()))
    y = c.y[band]
    depth = np.clip((y - ridge) / 0.20, 0.0, 1.0)
    near = smoothstep(0.45, 1.0, y)
    patches = c.fbm(rng, 3, 9, 3, band=band)
    blades = c.noise(rng, 124, 76, band) + 0.7 * c.noise(rng, 64, 40, band)
    facing = 0.74 - 0.36 * depth + 0.09 * patches
    if setting.has_light:
        lean = np.clip(np.gradient(wave) * c.size * 0.25, -1.0, 1.0) * -setting.side(0.5)
        warm = np.exp(-(((c.x - setting.light_x) / 0.3) ** 2))
        facing = facing + 0.20 * lean * (1.0 - depth) + 0.20 * warm - 0.08
    if snowy:
        albedo = SNOW * (0.95 - 0.08 * depth + 0.022 * patches + 0.005 * blades * near)
        facing = 0.58 + 0.8 * (facing - 0.6)
    else:
        grass = GRASS[int(rng.integers(len(GRASS)))]
        albedo = grass * (1.05 - 0.12 * depth + 0.10 * patches + (0.04 + 0.10 * near) * blades)
    paint = setting.lit(albedo, np.clip(facing, 0.05, 1.0))
    paint += haze * (setting.palette.haze - paint)
    c.blend(paint, c.below(ridge, band), (band, slice(None)))


def hills(setting: Setting) -> None:
    """Rolling hills, paler with distance."""
    tops = (0.44, 0.51, 0.58, 0.67)
    for i, top in enumerate(tops):
        _meadow(
            setting,
            top + 0.01 * setting.rng.standard_normal(),
            0.030 - 0.003 * i,
            0.55 * (1.0 - i / 3.0) ** 1.2,
        )
        if i < 3:
            _mist(setting, top, top + 0.10, 0.25 if setting.scene.time != "dawn" else 0.5)


def desert(setting: Setting) -> None:
    """Rows of dunes, paler with distance."""
    for i, top in enumerate((0.49, 0.55, 0.62, 0.71)):
        _dune(setting, top + 0.01 * setting.rng.standard_normal(), 0.028, 0.5 * (1.0 - i / 3.0))


def _dune(setting: Setting, top: float, swing: float, haze: float) -> None:
    """One row of dunes: every crest line has a side in the light and one in shadow."""
    c, rng = setting.canvas, setting.rng
    n_crests = int(rng.integers(2, 4))
    crests = (np.arange(n_crests) + rng.uniform(0.2, 0.8, n_crests)) / n_crests
    widths = rng.uniform(0.18, 0.32, n_crests)
    heights = swing * rng.uniform(1.2, 2.6, n_crests)
    rises = heights[:, None] * np.exp(-(np.abs((c.x - crests[:, None]) / widths[:, None]) ** 1.4))
    ridge = top + swing - rises.max(axis=0) + 0.004 * c.profile(rng, 6, 2)
    ridge = setting.clear_of_light(ridge.astype(np.float32))
    band = c.band(float(ridge.min()))
    y = c.y[band]
    depth = np.clip((y - ridge) / 0.22, 0.0, 1.0)
    side = setting.side(0.5) or 1.0
    side = 1.0 if side > 0 else -1.0
    shadow = np.zeros((1, 1), np.float32)
    for crest, height in zip(crests, heights, strict=True):
        down = np.maximum(y - (top + swing - height), 0.0)
        bend, phase = rng.uniform(-1.6, 1.6), rng.uniform(0.0, 6.0)
        line = crest + bend * down + 0.016 * (np.sin(down * 45.0 + phase) - np.sin(phase))
        behind = (line - c.x) * side
        reach = np.float32(0.10 + 1.5 * height)
        cast = smoothstep(-0.004, 0.004, behind) * smoothstep(reach, 0.0, behind)
        shadow = np.maximum(shadow, cast * smoothstep(0.20, 0.04, down))
    facing = (0.88 - 0.78 * shadow * setting.has_light) * (1.0 - 0.28 * depth)
    near = smoothstep(0.55, 1.0, y)
    drift = c.noise(rng, 3, 5, band)
    tilt = rng.uniform(-30.0, 30.0)
    ripples = np.sin((y * 330.0 + drift * 3.2 + c.x * tilt) * (1.15 - 0.45 * near))
    grain = c.noise(rng, 124, 124, band)
    sand = SAND[int(rng.integers(len(SAND)))]
    albedo = sand * (1.0 + 0.035 * grain + 0.05 * near * ripples + 0.04 * drift)
    paint = setting.lit(albedo, np.clip(facing, 0.0, 1.0))
    paint += haze * (setting.palette.haze - paint)
    c.blend(paint, c.below(ridge, band), (band, slice(None)))


def sea(setting: Setting) -> None:
    """Water that mirrors the sky, with a glittering path under the light."""
    c, p, rng = setting.canvas, setting.palette, setting.rng
    depth = np.clip((c.y - setting.horizon) / (1.0 - setting.horizon), 0.0, 1.0)
    # rows of waves crowd towards the horizon as in perspective
    rows = (np.log1p(12.0 * depth[:, 0]) / np.log(13.0)).astype(np.float32)
    swell = c.warped_noise(rng, 5, 26, rows)
    waves = c.warped_noise(rng, 18, 44, rows)
    small = c.warped_noise(rng, 56, 90, rows)
    ripples = (1.0 - 0.35 * depth) * small + 0.7 * depth * waves + 0.5 * swell
    reflect = 0.78 - 0.50 * depth
    sky = p.horizon + np.sqrt(depth) * (p.middle - p.horizon)
    water = setting.lit(WATER, 0.9) * 1.1
    paint = water + np.clip(reflect + 0.10 * ripples * (0.3 + depth), 0.0, 1.0) * (
        0.92 * sky - water
    )
    if setting.has_light:
        width = 0.035 + 0.13 * depth
        column = np.exp(-(((c.x - setting.light_x) / width) ** 2))
        glitter = column * smoothstep(-0.5, 1.1, ripples + 0.9 * column - 0.5)
        strength = 0.95 if setting.scene.time in ("sunset", "dawn") else 0.7
        bright = p.disc + 0.35 * (p.glow - p.disc)
        paint = paint + (strength * glitter) * (bright - paint)
    c.blend(paint, c.below(np.full(c.size, setting.horizon, np.float32)))
    c.blend(p.haze, 0.45 * np.exp(-(((c.y - setting.horizon) / 0.012) ** 2)) * np.ones_like(c.x))
