"""Paints a scene: sky and light first, then the land from far to near, then what stands on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ldm.data.canvas import Array, Canvas, colour, smoothstep

if TYPE_CHECKING:
    from ldm.data.scenes import Scene

_LIGHT_X = {"left": (0.17, 0.28), "centre": (0.45, 0.55), "right": (0.72, 0.83), "none": (0.5, 0.5)}
_DISC = 0.055  # radius of the sun and the moon
_FRONT = {"mountains": 0.70, "hills": 0.72, "desert": 0.74, "sea": 0.62}  # where objects may stand, top
_LOW_SUN_Y = {"mountains": 0.28, "hills": 0.32, "desert": 0.36, "sea": 0.40}


@dataclass(frozen=True)
class Palette:
    """The colours of one time of day; land is `albedo * (ambient + light * how much it faces the light)`."""

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


_PALETTES = {
    "noon": Palette(
        zenith=colour(0.16, 0.40, 0.78), middle=colour(0.38, 0.63, 0.90), horizon=colour(0.74, 0.87, 0.95),
        haze=colour(0.66, 0.79, 0.91), light=colour(0.72, 0.67, 0.56), ambient=colour(0.46, 0.50, 0.56),
        disc=colour(1.0, 0.97, 0.62), glow=colour(0.86, 0.93, 0.96),
        cloud=colour(1.0, 1.0, 1.0), cloud_shade=colour(0.74, 0.80, 0.88),
    ),
    "sunset": Palette(
        zenith=colour(0.24, 0.17, 0.42), middle=colour(0.80, 0.33, 0.32), horizon=colour(1.0, 0.66, 0.26),
        haze=colour(0.82, 0.40, 0.30), light=colour(0.78, 0.44, 0.24), ambient=colour(0.35, 0.28, 0.40),
        disc=colour(1.0, 0.93, 0.60), glow=colour(1.0, 0.56, 0.16),
        cloud=colour(1.0, 0.62, 0.42), cloud_shade=colour(0.42, 0.20, 0.34),
    ),
    "dawn": Palette(
        zenith=colour(0.44, 0.60, 0.84), middle=colour(0.82, 0.76, 0.88), horizon=colour(1.0, 0.85, 0.80),
        haze=colour(0.88, 0.80, 0.86), light=colour(0.56, 0.45, 0.42), ambient=colour(0.50, 0.50, 0.60),
        disc=colour(1.0, 0.98, 0.84), glow=colour(1.0, 0.72, 0.54),
        cloud=colour(1.0, 0.95, 0.95), cloud_shade=colour(0.74, 0.64, 0.78),
    ),
    "night": Palette(
        zenith=colour(0.02, 0.03, 0.10), middle=colour(0.05, 0.08, 0.22), horizon=colour(0.13, 0.19, 0.38),
        haze=colour(0.11, 0.16, 0.31), light=colour(0.34, 0.42, 0.58), ambient=colour(0.20, 0.26, 0.42),
        disc=colour(0.97, 0.97, 0.90), glow=colour(0.36, 0.45, 0.72),
        cloud=colour(0.36, 0.41, 0.56), cloud_shade=colour(0.10, 0.13, 0.24),
    ),
    "overcast": Palette(
        zenith=colour(0.52, 0.56, 0.61), middle=colour(0.64, 0.67, 0.71), horizon=colour(0.77, 0.79, 0.80),
        haze=colour(0.62, 0.66, 0.69), light=colour(0.24, 0.24, 0.23), ambient=colour(0.52, 0.54, 0.56),
        disc=colour(0.8, 0.8, 0.8), glow=colour(0.0, 0.0, 0.0),
        cloud=colour(0.80, 0.81, 0.83), cloud_shade=colour(0.44, 0.47, 0.52),
    ),
}  # fmt: skip

_ROCK = colour(0.52, 0.47, 0.43)
_SNOW = colour(1.02, 1.04, 1.08)
_GRASS = (colour(0.33, 0.52, 0.19), colour(0.42, 0.56, 0.20), colour(0.28, 0.48, 0.22))
_SAND = (colour(0.93, 0.72, 0.44), colour(0.90, 0.66, 0.40), colour(0.96, 0.78, 0.50))
_WATER = colour(0.05, 0.24, 0.36)


class _Painter:
    """One picture in the making."""

    def __init__(self, scene: Scene, rng: np.random.Generator, size: int) -> None:
        self.scene = scene
        self.rng = rng
        self.canvas = Canvas(size)
        self.palette = _PALETTES[scene.time]
        self.horizon = 0.50 + 0.05 * rng.random()
        self.light_x = float(rng.uniform(*_LIGHT_X[scene.light_position]))
        low = scene.time in ("sunset", "dawn")
        self.light_y = float(_LOW_SUN_Y[scene.place] + rng.uniform(-0.02, 0.02) if low else rng.uniform(0.11, 0.17))
        self.has_light = scene.light_position != "none"

    def lit(self, albedo: Array, facing: Array | float) -> Array:
        """Returns the colour of a surface that faces the light by `facing` (0..1)."""
        return albedo * (self.palette.ambient + self.palette.light * facing)

    def side(self, x: float) -> float:
        """Returns from which side light falls on something at `x`: -1 left .. 1 right, 0 when diffuse."""
        return float(np.clip(4.0 * (self.light_x - x), -1.0, 1.0)) if self.has_light else 0.0

    # --- sky -----------------------------------------------------------------------------------------

    def sky(self) -> None:
        c, p = self.canvas, self.palette
        t = np.clip(c.y / (self.horizon + 0.04), 0.0, 1.0)
        lower = smoothstep(0.35, 1.0, t)
        tint = 1.0 + 0.02 * self.rng.standard_normal((3, 1, 1), dtype=np.float32)
        shades = p.zenith + smoothstep(0.0, 0.75, t) * (p.middle - p.zenith)
        c.pixels[:] = (shades + lower * (p.horizon - shades)) * tint
        if self.scene.time == "overcast":
            veil = c.fbm(self.rng, 2, 5, 5, 0.55) * (1.1 - t)
            c.blend(p.cloud, 0.8 * smoothstep(0.0, 1.6, veil))
            c.blend(p.cloud_shade, 0.8 * smoothstep(0.0, 1.6, -veil))
        if self.has_light:
            distance = np.sqrt((c.x - self.light_x) ** 2 + (c.y - self.light_y) ** 2)
            halo = 0.50 * np.exp(-((distance / 0.11) ** 2)) + 0.38 * np.exp(-distance / 0.20)
            c.blend(p.glow, halo)
        if self.scene.sky == "stars":
            self.stars()
        if self.scene.sky == "clouds":
            self.clouds()
        if self.has_light:
            self.disc(distance)

    def disc(self, distance: Array) -> None:
        c = self.canvas
        face = self.palette.disc
        if self.scene.time == "night":
            box = c.box(self.light_x - 0.06, self.light_y - 0.06, self.light_x + 0.06, self.light_y + 0.06)
            marks = c.fbm(self.rng, 24, 24, 2, band=box[0])[:, box[1]]
            coverage = np.clip((_DISC - distance[box]) * c.size + 0.5, 0.0, 1.0)
            c.blend(face * (0.96 - 0.16 * smoothstep(-0.2, 1.2, marks)), coverage, box)
        else:
            c.blend(face, np.clip((_DISC - distance) * c.size + 0.5, 0.0, 1.0))

    def stars(self) -> None:
        c, rng = self.canvas, self.rng
        n = 130
        x, y = rng.random(n), rng.random(n) ** 1.2 * (self.horizon - 0.02)
        brightness = 0.35 + 0.65 * rng.random(n) ** 3
        radius = 0.0030 + 0.0032 * brightness**2
        brightness *= np.hypot(x - self.light_x, y - self.light_y) > 2.0 * _DISC
        reach = max(2, int(np.ceil(0.012 * c.size)))
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
        places = np.clip(rows, 0, c.size - 1)[:, :, None], np.clip(columns, 0, c.size - 1)[:, None, :]
        np.maximum.at(sheet, np.broadcast_arrays(*places), spots)
        c.blend(colour(0.97, 0.97, 1.0), np.minimum(sheet, 1.0))

    def clouds(self) -> None:
        c, p, rng = self.canvas, self.palette, self.rng
        shape = c.fbm(rng, 3, 9, 5, 0.5)
        fade = smoothstep(0.0, 0.06, c.y) * smoothstep(self.horizon - 0.08, self.horizon - 0.22, c.y)
        near = np.sqrt((c.x - self.light_x) ** 2 + ((c.y - self.light_y) * 1.3) ** 2)
        clear = smoothstep(0.07, 0.17, near)
        sky_rows = max(1, int(0.36 * c.size))
        # the threshold is a quantile of the shape itself, so that every cloudy sky has clouds
        edge = float(np.quantile((shape * clear)[:sky_rows], 0.62))
        density = smoothstep(edge, edge + 1.1, shape) * fade * clear
        thick = smoothstep(edge + 0.2, edge + 1.7, np.roll(shape, -max(1, c.size // 40), axis=0))
        tone = p.cloud + (0.85 * thick) * (p.cloud_shade - p.cloud)
        c.blend(tone, 0.95 * np.sqrt(density))

    # --- land ----------------------------------------------------------------------------------------

    def clear_of_light(self, ridge: Array) -> Array:
        """Returns `ridge` lowered where it would hide a low sun."""
        if not self.has_light:
            return ridge
        x = self.canvas.x[0]
        floor = self.light_y + _DISC + 0.025
        dip = np.exp(-(((x - self.light_x) / 0.10) ** 4))
        return ridge + dip * np.maximum(floor - ridge, 0.0)

    def mist(self, top: float, bottom: float, strength: float) -> None:
        c = self.canvas
        c.blend(self.palette.haze, strength * smoothstep(top, bottom, c.y) * smoothstep(bottom + 0.12, bottom, c.y))

    def mountains(self) -> None:
        for n_peaks, top, bottom, haze in ((6, 0.27, 0.36, 0.56), (5, 0.32, 0.46, 0.20)):
            spread = (np.arange(n_peaks) + 0.5 + self.rng.uniform(-0.3, 0.3, n_peaks)) / n_peaks
            for x in self.rng.permutation(spread):
                self.peak(float(x * 1.1 - 0.05), float(self.rng.uniform(top, bottom)), haze)
            self.mist(0.46, 0.62, 0.35 if self.scene.time != "dawn" else 0.75)
        self.meadow(0.62, 0.022, 0.10)
        self.meadow(0.70, 0.018, 0.0)

    def peak(self, x: float, y: float, haze: float) -> None:
        """One mountain with its top at (x, y): a face towards the light and one away from it."""
        c, rng, snowy = self.canvas, self.rng, self.scene.ground == "snow"
        slope = float(rng.uniform(0.75, 1.15))
        if self.has_light:
            reach = max(abs(x - self.light_x) - 0.075, 0.0)
            y = max(y, self.light_y + _DISC + 0.03 - 0.8 * slope * reach)
        away = np.abs(c.x[0] - x)
        crags = 0.010 * c.profile(rng, 12, 4) * smoothstep(0.0, 0.06, away)
        ridge = y + slope * away * (1.0 - 0.35 * away) + crags
        band = c.band(float(ridge.min()), 0.78)
        drop = c.y[band] - y
        rough = c.fbm(rng, 8, 8, 4, 0.6, band)
        spur = rng.uniform(-0.25, 0.25)
        fall = c.x - x + spur * drop + rough * (0.012 + 0.11 * np.maximum(drop, 0.0))
        side = self.side(x)
        facing = 0.48 + np.clip(side * 30.0 * fall, -0.40, 0.48) + 0.10 * rough
        grit = c.noise(rng, 60, 80, band)
        albedo = _ROCK * (1.0 + 0.09 * rough + 0.08 * grit)
        if snowy:
            line = 0.17 + 0.045 * rough - 0.05 * np.abs(fall)
            white = smoothstep(0.015, -0.015, drop - line) * smoothstep(1.9, 1.3, rough)
            albedo = albedo + white * (_SNOW - albedo)
        else:
            green = smoothstep(0.10, 0.24, drop + 0.04 * rough)
            albedo = albedo + (0.7 * green) * (_GRASS[2] * (0.9 + 0.1 * rough) - albedo)
        paint = self.lit(albedo, np.clip(facing, 0.05, 1.0))
        veil = haze * (0.6 + 0.4 * smoothstep(0.0, 0.25, drop))
        paint += veil * (self.palette.haze - paint)
        c.blend(paint, c.below(ridge, band), (band, slice(None)))

    def meadow(self, top: float, swing: float, haze: float) -> None:
        """One fold of grass or snow whose upper edge undulates around `top`."""
        c, rng, snowy = self.canvas, self.rng, self.scene.ground == "snow"
        wave = c.profile(rng, 3, 2, 0.3)
        ridge = self.clear_of_light(top + swing * wave)
        band = c.band(float(ridge.min()))
        y = c.y[band]
        depth = np.clip((y - ridge) / 0.20, 0.0, 1.0)
        near = smoothstep(0.45, 1.0, y)
        patches = c.fbm(rng, 3, 9, 3, band=band)
        blades = c.noise(rng, 124, 76, band) + 0.7 * c.noise(rng, 64, 40, band)
        facing = 0.74 - 0.36 * depth + 0.09 * patches
        if self.has_light:
            lean = np.clip(np.gradient(wave) * c.size * 0.25, -1.0, 1.0) * -self.side(0.5)
            warm = np.exp(-(((c.x - self.light_x) / 0.3) ** 2))
            facing = facing + 0.20 * lean * (1.0 - depth) + 0.20 * warm - 0.08
        if snowy:
            albedo = _SNOW * (0.95 - 0.08 * depth + 0.022 * patches + 0.005 * blades * near)
            facing = 0.58 + 0.8 * (facing - 0.6)
        else:
            grass = _GRASS[int(rng.integers(len(_GRASS)))]
            albedo = grass * (1.05 - 0.12 * depth + 0.10 * patches + (0.04 + 0.10 * near) * blades)
        paint = self.lit(albedo, np.clip(facing, 0.05, 1.0))
        paint += haze * (self.palette.haze - paint)
        c.blend(paint, c.below(ridge, band), (band, slice(None)))

    def hills(self) -> None:
        tops = (0.44, 0.51, 0.58, 0.67)
        for i, top in enumerate(tops):
            self.meadow(top + 0.01 * self.rng.standard_normal(), 0.030 - 0.003 * i, 0.55 * (1.0 - i / 3.0) ** 1.2)
            if i < 3:
                self.mist(top, top + 0.10, 0.25 if self.scene.time != "dawn" else 0.5)

    def desert(self) -> None:
        for i, top in enumerate((0.49, 0.55, 0.62, 0.71)):
            self.dune(top + 0.01 * self.rng.standard_normal(), 0.028, 0.5 * (1.0 - i / 3.0))

    def dune(self, top: float, swing: float, haze: float) -> None:
        """One row of dunes: every crest line has a side in the light and one in shadow."""
        c, rng = self.canvas, self.rng
        n_crests = int(rng.integers(2, 4))
        crests = (np.arange(n_crests) + rng.uniform(0.2, 0.8, n_crests)) / n_crests
        widths = rng.uniform(0.18, 0.32, n_crests)
        heights = swing * rng.uniform(1.2, 2.6, n_crests)
        rises = heights[:, None] * np.exp(-(np.abs((c.x - crests[:, None]) / widths[:, None]) ** 1.4))
        ridge = top + swing - rises.max(axis=0) + 0.004 * c.profile(rng, 6, 2)
        ridge = self.clear_of_light(ridge.astype(np.float32))
        band = c.band(float(ridge.min()))
        y = c.y[band]
        depth = np.clip((y - ridge) / 0.22, 0.0, 1.0)
        side = self.side(0.5) or 1.0
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
        facing = (0.88 - 0.78 * shadow * self.has_light) * (1.0 - 0.28 * depth)
        near = smoothstep(0.55, 1.0, y)
        drift = c.noise(rng, 3, 5, band)
        tilt = rng.uniform(-30.0, 30.0)
        ripples = np.sin((y * 330.0 + drift * 3.2 + c.x * tilt) * (1.15 - 0.45 * near))
        grain = c.noise(rng, 124, 124, band)
        sand = _SAND[int(rng.integers(len(_SAND)))]
        albedo = sand * (1.0 + 0.035 * grain + 0.05 * near * ripples + 0.04 * drift)
        paint = self.lit(albedo, np.clip(facing, 0.0, 1.0))
        paint += haze * (self.palette.haze - paint)
        c.blend(paint, c.below(ridge, band), (band, slice(None)))

    def sea(self) -> None:
        c, p, rng = self.canvas, self.palette, self.rng
        depth = np.clip((c.y - self.horizon) / (1.0 - self.horizon), 0.0, 1.0)
        # rows of waves crowd towards the horizon as in perspective
        rows = (np.log1p(12.0 * depth[:, 0]) / np.log(13.0)).astype(np.float32)
        swell = c.warped_noise(rng, 5, 26, rows)
        waves = c.warped_noise(rng, 18, 44, rows)
        small = c.warped_noise(rng, 56, 90, rows)
        ripples = (1.0 - 0.35 * depth) * small + 0.7 * depth * waves + 0.5 * swell
        reflect = 0.78 - 0.50 * depth
        sky = p.horizon + np.sqrt(depth) * (p.middle - p.horizon)
        water = self.lit(_WATER, 0.9) * 1.1
        paint = water + np.clip(reflect + 0.10 * ripples * (0.3 + depth), 0.0, 1.0) * (0.92 * sky - water)
        if self.has_light:
            width = 0.035 + 0.13 * depth
            column = np.exp(-(((c.x - self.light_x) / width) ** 2))
            glitter = column * smoothstep(-0.5, 1.1, ripples + 0.9 * column - 0.5)
            strength = 0.95 if self.scene.time in ("sunset", "dawn") else 0.7
            bright = p.disc + 0.35 * (p.glow - p.disc)
            paint = paint + (strength * glitter) * (bright - paint)
        c.blend(paint, c.below(np.full(c.size, self.horizon, np.float32)))
        c.blend(p.haze, 0.45 * np.exp(-(((c.y - self.horizon) / 0.012) ** 2)) * np.ones_like(c.x))

    # --- objects -------------------------------------------------------------------------------------

    def shadow(self, x: float, y: float, width: float) -> None:
        c = self.canvas
        lean = -0.5 * self.side(x) * width
        box = c.box(x - 2.5 * width, y - 0.05, x + 2.5 * width, y + 0.05)
        spread = ((c.x[:, box[1]] - x - lean) / (1.3 * width)) ** 2 + ((c.y[box[0]] - y) / 0.016) ** 2
        c.blend(self.palette.ambient * 0.25, 0.55 * np.exp(-spread), box)

    def pines(self) -> None:
        n = int(self.rng.integers(4, 7))
        start = self.rng.uniform(0.06, 0.30)
        x = start + (np.arange(n) + self.rng.uniform(-0.25, 0.25, n)) * self.rng.uniform(0.09, 0.13)
        base = self.rng.uniform(0.80, 0.93, n)
        if self.rng.random() < 0.5:
            x = 1.0 - x
        for i in np.argsort(base):
            self.pine(float(x[i]), float(base[i]), float(self.rng.uniform(0.24, 0.36) * (base[i] + 0.1)))

    def pine(self, x: float, base: float, height: float) -> None:
        c, rng, side = self.canvas, self.rng, self.side(x)
        width = 0.21 * height
        self.shadow(x, base, width)
        bark = self.lit(colour(0.36, 0.25, 0.17), 0.4)
        c.polygon([(x - 0.1 * width, base), (x + 0.1 * width, base), (x + 0.1 * width, base - 0.2 * height), (x - 0.1 * width, base - 0.2 * height)], bark)
        green = colour(0.13, 0.34, 0.19) * float(rng.uniform(0.85, 1.2))
        n_tiers = 5
        for i in range(n_tiers):
            low = base - height * (0.12 + 0.155 * i)
            high = low - height * 0.30 if i < n_tiers - 1 else base - height
            half = width * (1.0 - 0.17 * i)
            droop = 0.03 * height
            for direction in (-1.0, 1.0):
                facing = 0.38 + 0.34 * direction * side - 0.05 * (n_tiers - 1 - i)
                paint = self.lit(green, max(facing, 0.02))
                c.polygon([(x, high), (x + direction * half, low + droop), (x + direction * 0.45 * half, low - 0.2 * droop), (x, low)], paint)
                if self.scene.ground == "snow":
                    white = self.lit(_SNOW, 0.55 + 0.3 * direction * side)
                    c.polygon([(x, high), (x + direction * 0.72 * half, low - 0.06 * height), (x, low - 0.13 * height)], white, 0.8)

    def house(self) -> None:
        c, rng = self.canvas, self.rng
        width = float(rng.uniform(0.19, 0.23))
        turn = 1.0 if rng.random() < 0.5 else -1.0
        x = 0.5 + turn * float(rng.uniform(-0.33, 0.18))
        base = float(rng.uniform(0.83, 0.90))
        wall, rise = 0.62 * width, 0.50 * width
        deep = 0.75 * width
        red = colour(0.78, 0.13, 0.10)
        side = self.side(x)

        def place(across: float, up: float) -> tuple[float, float]:
            return x + turn * across, base - up

        self.shadow(x + turn * 0.3 * deep, base + 0.004, 1.0 * width)
        front_light, flank_light = 0.55 - 0.25 * side * turn, 0.5 + 0.35 * side * turn
        half = 0.5 * width
        lift = 0.05 * width
        c.polygon([place(half, 0), place(half + deep, lift), place(half + deep, lift + wall * 0.94), place(half, wall)], self.lit(red * 0.86, flank_light))
        c.polygon([place(-half, 0), place(half, 0), place(half, wall), place(-half, wall)], self.lit(red, front_light))
        c.polygon([place(-half, wall), place(half, wall), place(0, wall + rise)], self.lit(red, front_light))
        roof = self.lit(colour(0.72, 0.78, 0.90) if self.scene.ground == "snow" else colour(0.30, 0.22, 0.21), 0.45 + 0.3 * side * turn)
        eave = 0.07 * width
        c.polygon([place(half * 0.45, wall + rise * 0.6), place(half * 0.75, wall + rise * 0.6), place(half * 0.75, wall + rise * 1.25), place(half * 0.45, wall + rise * 1.25)], self.lit(colour(0.45, 0.30, 0.26), 0.4)) if rng.random() < 0.5 else None
        c.polygon([place(0, wall + rise + eave * 0.6), place(deep * 0.96, wall + rise * 0.98 + eave * 0.6), place(half + deep + eave, wall * 0.88 + lift), place(half + eave, wall - eave)], roof)
        c.polygon([place(0, wall + rise + eave * 0.6), place(0, wall + rise - eave * 0.9), place(-half - eave, wall - eave * 1.6), place(-half - eave * 1.3, wall - eave * 0.4)], roof * 0.85)
        dark = self.scene.time in ("night", "sunset", "dawn")
        pane = colour(1.0, 0.85, 0.42) if dark else self.lit(colour(0.55, 0.72, 0.85), 0.5)
        frame = self.lit(colour(0.95, 0.93, 0.88), 0.5)
        self.panel(place, -0.30 * width, 0.0, 0.22 * width, 0.44 * width, self.lit(colour(0.33, 0.20, 0.13), 0.4), frame)
        self.panel(place, 0.10 * width, 0.20 * width, 0.25 * width, 0.26 * width, pane, frame)
        self.panel(place, half + 0.28 * deep, 0.22 * width, 0.26 * width, 0.24 * width, pane, frame)

    def panel(self, place, left: float, low: float, width: float, height: float, paint: Array, frame: Array) -> None:  # noqa: ANN001
        """A door or window with a frame around it."""
        rim = 0.12 * width
        for grow, fill in ((rim, frame), (0.0, paint)):
            foot = 0.0 if low == 0.0 else grow
            self.canvas.polygon([place(left - grow, low - foot), place(left + width + grow, low - foot), place(left + width + grow, low + height + grow), place(left - grow, low + height + grow)], fill)

    def cactuses(self) -> None:
        n = int(self.rng.integers(2, 4))
        slots = self.rng.permutation(np.linspace(0.17, 0.83, n)) + self.rng.uniform(-0.07, 0.07, n)
        base = np.sort(self.rng.uniform(0.79, 0.93, n))
        for x, y in zip(slots, base, strict=True):
            self.cactus(float(x), float(y), float(self.rng.uniform(0.26, 0.36)) * float(y))

    def cactus(self, x: float, base: float, height: float) -> None:
        c, rng, side = self.canvas, self.rng, self.side(x)
        radius = 0.085 * height
        green = colour(0.25, 0.50, 0.24) * float(rng.uniform(0.9, 1.15))
        lit, dark = self.lit(green, 0.95 if self.has_light else 0.6), self.lit(green, 0.12 if self.has_light else 0.3)
        self.shadow(x, base, 2.2 * radius)
        for direction in (-1.0, 1.0):
            start = height * float(rng.uniform(0.32, 0.50))
            reach, up = direction * 0.25 * height, height * float(rng.uniform(0.22, 0.34))
            elbow = (x + reach, base - start)
            c.capsule((x, base - start), elbow, 0.72 * radius, lit, dark, side or 0.3)
            c.capsule(elbow, (x + reach, base - start - up), 0.75 * radius, lit, dark, side or 0.3)
        c.capsule((x, base - 0.5 * radius), (x, base - height + radius), radius, lit, dark, side or 0.3)

    def sailboat(self) -> None:
        c, rng = self.canvas, self.rng
        free = [v for v in np.linspace(0.2, 0.8, 13) if not self.has_light or abs(v - self.light_x) > 0.2]
        x = float(free[int(rng.integers(len(free)))])
        base = float(rng.uniform(0.66, 0.78))
        height = float(rng.uniform(0.30, 0.38))
        way = 1.0 if rng.random() < 0.5 else -1.0
        side = self.side(x)
        white = colour(1.0, 0.99, 0.95)
        main, jib = self.lit(white, 0.75 - 0.2 * side * way), self.lit(white, 0.75 + 0.2 * side * way)
        hull = self.lit(colour(0.50, 0.20, 0.14), 0.6)
        deck = self.lit(colour(0.86, 0.70, 0.48), 0.6)
        half, draught = 0.30 * height, 0.10 * height
        for flip, opacity in ((-0.55, 0.42), (1.0, 1.0)):

            def place(across: float, up: float, flip: float = flip) -> tuple[float, float]:
                return x + way * across, base - flip * up

            fore, aft, foot = 0.03 * height, -0.02 * height, draught * 1.5
            c.polygon([place(aft, foot), place(aft - 0.27 * height, foot + 0.01 * height), place(aft, height)], main, opacity)
            c.polygon([place(fore, foot + 0.02 * height), place(fore + 0.23 * height, foot), place(fore, 0.86 * height)], jib, opacity)
            c.polygon([place(aft, draught), place(fore, draught), place(fore * 0.3, height * 1.02), place(aft * 0.3, height * 1.02)], self.lit(colour(0.35, 0.24, 0.16), 0.5), opacity)
            c.polygon([place(-half, draught), place(half * 1.15, draught * 1.2), place(half * 0.75, 0.0), place(-half * 0.8, 0.0)], hull, opacity)
            c.polygon([place(-half, draught), place(half * 1.15, draught * 1.2), place(half * 1.08, draught * 0.92), place(-half * 0.97, draught * 0.72)], deck, opacity)


def paint(scene: Scene, rng: np.random.Generator, size: int) -> Array:
    """Paints the scene.

    Args:
        scene: what to show.
        rng: decides everything the scene's attributes leave open.
        size: edge length in pixels.

    Returns:
        uint8 (size, size, 3), RGB.
    """
    painter = _Painter(scene, rng, size)
    painter.sky()
    getattr(painter, scene.place)()
    if scene.object != "none":
        getattr(painter, scene.object)()
    return painter.canvas.to_uint8()
