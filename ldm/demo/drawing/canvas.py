"""Drawing primitives of the scene renderer: smooth noise, ridges and anti-aliased shapes.

Everything is in relative coordinates (x to the right, y downwards, both 0..1), so a drawing means
the same at every picture size. Edges are anti-aliased analytically: coverage is the signed distance
from the edge in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Array = np.ndarray
Point = tuple[float, float]

_NOISE_GAIN = (
    1.445  # brings one dimension of cubic B-spline interpolated white noise back to unit variance
)
_OVERSAMPLING = 4


def colour(red: float, green: float, blue: float) -> Array:
    """Returns one colour as a float32 array (3, 1, 1), components nominally 0..1."""
    return np.array([red, green, blue], np.float32).reshape(3, 1, 1)


def smoothstep(low: float, high: float, value: Array) -> Array:
    """Returns 0 below `low`, 1 above `high` and a smooth cubic between; `low` may exceed `high`."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def spline_weights(coordinates: Array, cells: int) -> Array:
    """Returns the weights of a cubic B-spline.

    Args:
        coordinates: where to read, (n,), 0..1.
        cells: how many cells the lattice has; it holds cells + 3 values.

    Returns:
        float32 (n, cells + 3).
    """
    position = np.clip(coordinates, 0.0, 1.0).astype(np.float64) * cells
    index = np.minimum(position.astype(np.int64), cells - 1)
    t = position - index
    basis = np.stack(
        [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1
    )
    weights = np.zeros((len(position), cells + 3), np.float32)
    weights[np.arange(len(position))[:, None], index[:, None] + np.arange(4)] = basis / 6.0
    return weights


@lru_cache(maxsize=128)
def _pixel_weights(size: int, cells: int) -> Array:
    """Returns `spline_weights` averaged over the area of each of `size` pixels."""
    count = size * _OVERSAMPLING
    fine = spline_weights((np.arange(count) + 0.5) / count, cells)
    return fine.reshape(size, _OVERSAMPLING, -1).mean(axis=1)


class Canvas:
    """A square picture under construction.

    Attributes:
        size: edge length in pixels.
        x: horizontal pixel centres, float32 (1, size).
        y: vertical pixel centres, float32 (size, 1).
        pixels: float32 (3, size, size), nominally 0..1.
    """

    def __init__(self, size: int) -> None:
        centres = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.size = size
        self.x = centres[None, :]
        self.y = centres[:, None]
        self.pixels = np.zeros((3, size, size), np.float32)

    def blend(self, paint: Array, coverage: Array, box: tuple[slice, slice] | None = None) -> None:
        """Lays `paint` (3, h, w) over the picture, or over `box`, by `coverage` (h, w)."""
        target = self.pixels if box is None else self.pixels[:, box[0], box[1]]
        target += coverage * (paint - target)

    def noise(
        self, rng: np.random.Generator, columns: int, rows: int, band: slice = slice(None)
    ) -> Array:
        """Returns smooth noise of unit variance, `columns` x `rows` cells, for rows in `band`."""
        lattice = rng.standard_normal((rows + 3, columns + 3), dtype=np.float32)
        across = _pixel_weights(self.size, columns)
        down = _pixel_weights(self.size, rows)[band]
        return (down @ (lattice * _NOISE_GAIN**2)) @ across.T

    def warped_noise(
        self, rng: np.random.Generator, columns: int, rows: int, coordinates: Array
    ) -> Array:
        """Returns noise (size, size) whose lattice rows are read at `coordinates` (size,), 0..1."""
        lattice = rng.standard_normal((rows + 3, columns + 3), dtype=np.float32)
        across = _pixel_weights(self.size, columns)
        return (spline_weights(coordinates, rows) @ (lattice * _NOISE_GAIN**2)) @ across.T

    def fbm(
        self,
        rng: np.random.Generator,
        columns: int,
        rows: int,
        octaves: int,
        gain: float = 0.5,
        band: slice = slice(None),
    ) -> Array:
        """Returns fractal noise of unit variance: each octave doubles `columns` and `rows`."""
        total = np.zeros((len(self.y[band]), self.size), np.float32)
        for octave in range(octaves):
            total += gain**octave * self.noise(rng, columns << octave, rows << octave, band)
        return total / np.sqrt(sum(gain ** (2 * octave) for octave in range(octaves)))

    def profile(
        self, rng: np.random.Generator, cells: int, octaves: int, gain: float = 0.5
    ) -> Array:
        """Returns one-dimensional fractal noise (size,) of about unit variance."""
        total = np.zeros(self.size, np.float32)
        for octave in range(octaves):
            lattice = rng.standard_normal((cells << octave) + 3, dtype=np.float32)
            total += (
                gain**octave * _NOISE_GAIN * (_pixel_weights(self.size, cells << octave) @ lattice)
            )
        return total / np.sqrt(sum(gain ** (2 * octave) for octave in range(octaves)))

    def band(self, top: float, bottom: float = 1.0) -> slice:
        """Returns the rows from height `top` to `bottom`, one pixel of margin included."""
        return self.box(0.0, top, 1.0, bottom)[0]

    def below(self, ridge: Array, band: slice = slice(None)) -> Array:
        """Returns the coverage of the ground under `ridge` (size,), for rows in `band`."""
        slope = np.gradient(ridge) * self.size
        steep = self.size / np.sqrt(1.0 + slope * slope)
        return np.clip((self.y[band] - ridge) * steep + 0.5, 0.0, 1.0)

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
        """Returns the (rows, columns) that hold a rectangle, one pixel of margin included."""
        edges = [np.clip(int(np.floor(v * self.size)) - 1, 0, self.size) for v in (top, left)]
        ends = [np.clip(int(np.ceil(v * self.size)) + 1, 0, self.size) for v in (bottom, right)]
        return slice(edges[0], ends[0]), slice(edges[1], ends[1])

    def polygon(self, points: Sequence[Point], paint: Array, opacity: float = 1.0) -> None:
        """Fills a convex polygon given in either direction with `paint` (3, 1, 1)."""
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        box = self.box(min(xs), min(ys), max(xs), max(ys))
        x, y = self.x[:, box[1]], self.y[box[0]]
        following = [*points[1:], points[0]]
        area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, following, strict=True))
        turn = 1.0 if area > 0 else -1.0
        distance = np.full((1, 1), -1.0, np.float32)
        for (x0, y0), (x1, y1) in zip(points, following, strict=True):
            dx, dy = turn * (x1 - x0), turn * (y1 - y0)
            length = max(float(np.hypot(dx, dy)), 1e-6)
            distance = np.maximum(distance, ((x - x0) * dy - (y - y0) * dx) / length)
        self.blend(paint, opacity * np.clip(0.5 - distance * self.size, 0.0, 1.0), box)

    def capsule(
        self, start: Point, end: Point, radius: float, lit: Array, dark: Array, side: float
    ) -> None:
        """Draws a ribbed rod, coloured `lit` where it faces `side` (-1..1) and `dark` opposite."""
        (x0, y0), (x1, y1) = start, end
        box = self.box(
            min(x0, x1) - radius, min(y0, y1) - radius, max(x0, x1) + radius, max(y0, y1) + radius
        )
        x, y = self.x[:, box[1]], self.y[box[0]]
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1e-9), 0.0, 1.0)
        away_x, away_y = x - x0 - along * dx, y - y0 - along * dy
        distance = np.sqrt(away_x * away_x + away_y * away_y)
        across = (away_x * side - 0.6 * away_y * (abs(dx) > abs(dy))) / radius
        ribs = 0.10 * np.cos(across * 14.0)
        shade = np.clip(0.5 + 0.55 * across + ribs, 0.0, 1.0)
        self.blend(
            dark + shade * (lit - dark),
            np.clip((radius - distance) * self.size + 0.5, 0.0, 1.0),
            box,
        )

    def to_uint8(self) -> Array:
        """Returns the finished picture, uint8 (size, size, 3)."""
        rounded = np.clip(self.pixels, 0.0, 1.0) * 255.0 + 0.5
        return np.ascontiguousarray(rounded.astype(np.uint8).transpose(1, 2, 0))
