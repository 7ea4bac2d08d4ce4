"""Which part of a picture a mask means, however it was made.

A mask is white on black; or strokes on a transparent layer; or a picture in which a hole was
erased; or strokes of some colour. Its values may be 0 and 1, or 16 bits wide.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Values = NDArray[np.float32]

_NOISE = 8 / 255  # what lossy compression adds to a constant picture
_BLACK = 0.125  # what is darker
_MANY_COLOURS = 8  # a picture has more, strokes have fewer


def painted(colours: Values, alpha: Values | None = None) -> tuple[Mask, str]:
    """Where to paint, and why there.

    Args:
        colours: (H, W, 3), 0 to 1.
        alpha: (H, W), 0 to 1: how visible; None: all is visible.

    Returns:
        The mask (H, W), True where to paint, and which part of the file that is.
    """
    visible = None if alpha is None else alpha >= _half(alpha)
    if visible is None or visible.all():
        return _by_colour(colours)
    if not visible.any():
        return ~visible, "its transparent part"
    is_picture = not _is_flat(colours[visible])
    border = np.concatenate([visible[0], visible[-1], visible[:, 0], visible[:, -1]])
    if not is_picture and _is_black_and_white(colours[visible]):
        return visible & (colours.mean(axis=2) >= 0.5), "its white part"
    if is_picture or border.mean() >= 0.5:
        return ~visible, "its transparent part"
    return visible, "its strokes"


def _half(alpha: Values) -> float:
    """From where on something is visible: strokes, or what an eraser left, may be faint."""
    low, high = float(alpha.min()), float(alpha.max())
    if low < 0.5 <= high:
        return 0.5
    if low == 0 < high or high - low > _NOISE:  # the former also of an alpha of 0 and 1
        return (low + high) / 2
    return min(low, 0.5) or 0.5


def _by_colour(colours: Values) -> tuple[Mask, str]:
    """The bright part of a grey mask; of a coloured one, what is not its background."""
    spread = colours.max(axis=2) - colours.min(axis=2)
    if not (spread > 0.2).any():
        return _bright(colours.mean(axis=2)), "its white part"
    if (colours.max(axis=2) < _BLACK).mean() >= 0.01:  # there is black, which means: leave it
        return _distinct(colours, colours.max(axis=2)), "its coloured part"
    edges = [colours[0], colours[-1], colours[:, 0], colours[:, -1]]
    background = np.median(np.concatenate(edges), axis=0)
    apart = np.abs(colours - background).max(axis=2)
    return _distinct(colours, apart), "what differs from its border"


def _distinct(colours: Values, values: Values) -> Mask:
    """The upper half of the values; where there are several colours, half of the least bright."""
    levels = np.round(values * 15).astype(np.int64)
    inside = levels[1:-1, 1:-1]  # of an even colour, not on a soft or damaged edge
    sides = (levels[:-2, 1:-1], levels[2:, 1:-1], levels[1:-1, :-2], levels[1:-1, 2:])
    is_even = np.logical_and.reduce([inside == side for side in sides])
    found = inside[is_even & (values[1:-1, 1:-1] >= _BLACK)]
    if found.size == 0 or not _is_flat(colours.reshape(-1, 3)):
        return _bright(values)
    least = np.flatnonzero(np.bincount(found) >= 0.02 * found.size)[0] / 15
    return values >= least / 2


def _bright(values: Values) -> Mask:
    """The upper half of the values that there are."""
    low, high = float(values.min()), float(values.max())
    is_two_valued = len(np.unique(values)) == 2
    if high == low:
        return np.full(values.shape, high > 0)
    if high - low <= _NOISE and not is_two_valued:
        return np.full(values.shape, float(values.mean()) >= 0.5)
    return values >= (low + high) / 2


def _is_flat(colours: Values) -> bool:
    """Whether a few colours make up almost everything, (n, 3)."""
    coarse = (colours * 15).round().astype(np.int64) @ np.array([256, 16, 1])
    counts = np.sort(np.unique(coarse, return_counts=True)[1])[::-1]
    return bool(counts[:_MANY_COLOURS].sum() >= 0.95 * counts.sum())


def _is_black_and_white(colours: Values) -> bool:
    """Whether there is black and white and nothing else, (n, 3)."""
    is_black, is_white = colours.max(axis=1) < _BLACK, colours.min(axis=1) > 0.875
    return bool(is_black.any() and is_white.any() and (is_black | is_white).all())
