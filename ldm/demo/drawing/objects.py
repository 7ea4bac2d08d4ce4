"""What stands on the land: pine trees, a house, cactuses, a sailboat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ldm.demo.drawing.canvas import Array, Point, colour
from ldm.demo.drawing.palette import SNOW
from ldm.demo.drawing.setting import Setting

Place = Callable[[float, float], Point]
"""Maps (across, up) on an object to a point of the picture."""


def _shadow(setting: Setting, x: float, y: float, width: float) -> None:
    """A soft shadow on the ground, on the side away from the light."""
    c = setting.canvas
    lean = -0.5 * setting.side(x) * width
    box = c.box(x - 2.5 * width, y - 0.05, x + 2.5 * width, y + 0.05)
    across = (c.x[:, box[1]] - x - lean) / (1.3 * width)
    down = (c.y[box[0]] - y) / 0.016
    c.blend(setting.palette.ambient * 0.25, 0.55 * np.exp(-(across**2 + down**2)), box)


def pines(setting: Setting) -> None:
    """A row of pine trees, the far ones first."""
    rng = setting.rng
    n = int(rng.integers(4, 7))
    start = rng.uniform(0.06, 0.30)
    x = start + (np.arange(n) + rng.uniform(-0.25, 0.25, n)) * rng.uniform(0.09, 0.13)
    base = rng.uniform(0.80, 0.93, n)
    if rng.random() < 0.5:
        x = 1.0 - x
    for i in np.argsort(base):
        height = rng.uniform(0.24, 0.36) * (base[i] + 0.1)
        _pine(setting, float(x[i]), float(base[i]), float(height))


def _pine(setting: Setting, x: float, base: float, height: float) -> None:
    """Tiers of branches, each with a half towards the light and one away from it."""
    c, side = setting.canvas, setting.side(x)
    width = 0.21 * height
    _shadow(setting, x, base, width)
    left, right, top = x - 0.1 * width, x + 0.1 * width, base - 0.2 * height
    bark = setting.lit(colour(0.36, 0.25, 0.17), 0.4)
    c.polygon([(left, base), (right, base), (right, top), (left, top)], bark)
    green = colour(0.13, 0.34, 0.19) * float(setting.rng.uniform(0.85, 1.2))
    n_tiers = 5
    for i in range(n_tiers):
        low = base - height * (0.12 + 0.155 * i)
        high = low - height * 0.30 if i < n_tiers - 1 else base - height
        half = width * (1.0 - 0.17 * i)
        droop = 0.03 * height
        for way in (-1.0, 1.0):
            tip = (x + way * half, low + droop)
            notch = (x + way * 0.45 * half, low - 0.2 * droop)
            facing = 0.38 + 0.34 * way * side - 0.05 * (n_tiers - 1 - i)
            c.polygon([(x, high), tip, notch, (x, low)], setting.lit(green, max(facing, 0.02)))
            if setting.scene.ground == "snow":
                edge = (x + way * 0.72 * half, low - 0.06 * height)
                white = setting.lit(SNOW, 0.55 + 0.3 * way * side)
                c.polygon([(x, high), edge, (x, low - 0.13 * height)], white, 0.8)


def house(setting: Setting) -> None:
    """A red house seen from a corner: gable front, flank, roof, perhaps a chimney."""
    rng = setting.rng
    width = float(rng.uniform(0.19, 0.23))
    turn = 1.0 if rng.random() < 0.5 else -1.0
    x = 0.5 + turn * float(rng.uniform(-0.33, 0.18))
    base = float(rng.uniform(0.83, 0.90))
    side = setting.side(x) * turn
    wall, rise, deep = 0.62 * width, 0.50 * width, 0.75 * width
    half, lift, eave = 0.5 * width, 0.05 * width, 0.07 * width
    top = wall + rise

    def place(across: float, up: float) -> Point:
        return x + turn * across, base - up

    def fill(paint: Array, *corners: Point) -> None:
        setting.canvas.polygon([place(*corner) for corner in corners], paint)

    _shadow(setting, x + turn * 0.3 * deep, base + 0.004, width)
    red = colour(0.78, 0.13, 0.10)
    front = setting.lit(red, 0.55 - 0.25 * side)
    flank = setting.lit(red * 0.86, 0.5 + 0.35 * side)
    far = half + deep
    fill(flank, (half, 0), (far, lift), (far, lift + wall * 0.94), (half, wall))
    fill(front, (-half, 0), (half, 0), (half, wall), (-half, wall))
    fill(front, (-half, wall), (half, wall), (0, top))
    if rng.random() < 0.5:
        brick = setting.lit(colour(0.45, 0.30, 0.26), 0.4)
        left, right, low, high = half * 0.45, half * 0.75, wall + rise * 0.6, wall + rise * 1.25
        fill(brick, (left, low), (right, low), (right, high), (left, high))
    snowy = setting.scene.ground == "snow"
    tiles = colour(0.72, 0.78, 0.90) if snowy else colour(0.30, 0.22, 0.21)
    roof = setting.lit(tiles, 0.45 + 0.3 * side)
    ridge = (0, top + eave * 0.6)
    far_ridge = (deep * 0.96, wall + rise * 0.98 + eave * 0.6)
    far_eave = (far + eave, wall * 0.88 + lift)
    fill(roof, ridge, far_ridge, far_eave, (half + eave, wall - eave))
    outer = (-half - eave * 1.3, wall - eave * 0.4)
    fill(roof * 0.85, ridge, (0, top - eave * 0.9), (-half - eave, wall - eave * 1.6), outer)

    is_lamp_on = setting.scene.time in ("night", "sunset", "dawn")
    pane = colour(1.0, 0.85, 0.42) if is_lamp_on else setting.lit(colour(0.55, 0.72, 0.85), 0.5)
    wood = setting.lit(colour(0.33, 0.20, 0.13), 0.4)
    _panel(setting, place, (-0.30 * width, 0.0), (0.22 * width, 0.44 * width), wood)
    _panel(setting, place, (0.10 * width, 0.20 * width), (0.25 * width, 0.26 * width), pane)
    flank_window = (half + 0.28 * deep, 0.22 * width)
    _panel(setting, place, flank_window, (0.26 * width, 0.24 * width), pane)


def _panel(setting: Setting, place: Place, corner: Point, extent: Point, paint: Array) -> None:
    """A window, or at the foot of the wall a door, in a pale frame."""
    (left, low), (width, height) = corner, extent
    rim = 0.12 * width
    frame = setting.lit(colour(0.95, 0.93, 0.88), 0.5)
    for grow, fill in ((rim, frame), (0.0, paint)):
        right, top = left + width + grow, low + height + grow
        foot = low if low == 0.0 else low - grow
        corners = [(left - grow, foot), (right, foot), (right, top), (left - grow, top)]
        setting.canvas.polygon([place(*point) for point in corners], fill)


def cactuses(setting: Setting) -> None:
    """Two or three cactuses, the far ones first."""
    rng = setting.rng
    n = int(rng.integers(2, 4))
    x = rng.permutation(np.linspace(0.17, 0.83, n)) + rng.uniform(-0.07, 0.07, n)
    base = np.sort(rng.uniform(0.79, 0.93, n))
    for i in range(n):
        height = float(rng.uniform(0.26, 0.36)) * float(base[i])
        _cactus(setting, float(x[i]), float(base[i]), height)


def _cactus(setting: Setting, x: float, base: float, height: float) -> None:
    """A column with an arm on either side."""
    c, rng = setting.canvas, setting.rng
    side = setting.side(x) or 0.3
    radius = 0.085 * height
    green = colour(0.25, 0.50, 0.24) * float(rng.uniform(0.9, 1.15))
    lit = setting.lit(green, 0.95 if setting.has_light else 0.6)
    dark = setting.lit(green, 0.12 if setting.has_light else 0.3)
    _shadow(setting, x, base, 2.2 * radius)
    for way in (-1.0, 1.0):
        start = height * float(rng.uniform(0.32, 0.50))
        up = height * float(rng.uniform(0.22, 0.34))
        elbow = (x + way * 0.25 * height, base - start)
        c.capsule((x, base - start), elbow, 0.72 * radius, lit, dark, side)
        c.capsule(elbow, (elbow[0], base - start - up), 0.75 * radius, lit, dark, side)
    c.capsule((x, base - 0.5 * radius), (x, base - height + radius), radius, lit, dark, side)


def sailboat(setting: Setting) -> None:
    """A boat with two sails beside the light's path on the water, and its reflection."""
    rng = setting.rng
    spots = np.linspace(0.2, 0.8, 13)
    free = [v for v in spots if not setting.has_light or abs(v - setting.light_x) > 0.2]
    x = float(free[int(rng.integers(len(free)))])
    base = float(rng.uniform(0.66, 0.78))
    height = float(rng.uniform(0.30, 0.38))
    way = 1.0 if rng.random() < 0.5 else -1.0
    side = setting.side(x) * way
    white = colour(1.0, 0.99, 0.95)
    main, jib = setting.lit(white, 0.75 - 0.2 * side), setting.lit(white, 0.75 + 0.2 * side)
    mast = setting.lit(colour(0.35, 0.24, 0.16), 0.5)
    hull = setting.lit(colour(0.50, 0.20, 0.14), 0.6)
    deck = setting.lit(colour(0.86, 0.70, 0.48), 0.6)
    half, draught = 0.30 * height, 0.10 * height
    fore, aft, foot, tip = 0.03 * height, -0.02 * height, draught * 1.5, 1.02 * height
    stern, bow = (-half, draught), (half * 1.15, draught * 1.2)
    parts: list[tuple[Array, list[Point]]] = [
        (main, [(aft, foot), (aft - 0.27 * height, foot + 0.01 * height), (aft, height)]),
        (jib, [(fore, foot + 0.02 * height), (fore + 0.23 * height, foot), (fore, 0.86 * height)]),
        (mast, [(aft, draught), (fore, draught), (fore * 0.3, tip), (aft * 0.3, tip)]),
        (hull, [stern, bow, (half * 0.75, 0.0), (-half * 0.8, 0.0)]),
        (deck, [stern, bow, (half * 1.08, draught * 0.92), (-half * 0.97, draught * 0.72)]),
    ]
    for flip, opacity in ((-0.55, 0.42), (1.0, 1.0)):
        for paint, corners in parts:
            points = [(x + way * across, base - flip * up) for across, up in corners]
            setting.canvas.polygon(points, paint, opacity)
