"""The geometry of a grid of cells, which does not depend on the tokens and is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ldm.modules.tome.config import cells


@dataclass(frozen=True)
class Grid:
    """The geometry of a grid of cells.

    Places are the tokens in the order of their cells. The last cell of a row or column may be cut
    off: then it has no destination, and some of its places have no token. Without a window there
    is one cell that holds all tokens, as they come, and all destinations are near.

    Attributes:
        order: the token in each place, (P,).
        back: the place of each token, (N,).
        pads: places without a token.
        first: place of the first token of each destination's cell, (D,).
        steps: from there to each token of it, (stride[0] * stride[1],).
        near: the destinations that the tokens of each cell may choose, (cells, K).
        home: the destination of each place that is similar to none, (P,).
        never: -infinity for each place, (1, P).
    """

    order: Tensor
    back: Tensor
    pads: Tensor
    first: Tensor
    steps: Tensor
    near: Tensor
    home: Tensor
    never: Tensor


def grid_of(
    size: tuple[int, int], stride: tuple[int, int], window: int | None, device: torch.device
) -> Grid:
    """The geometry of (h, w) tokens in cells of ``stride``.

    Args:
        size: h, w.
        stride: rows, columns of a cell.
        window: cells a side that a token may choose from; None: all.
        device: where it is used.
    """
    (h, w), (sy, sx) = size, (min(stride[0], size[0]), min(stride[1], size[1]))
    n_rows, n_columns = cells(h, w, stride)
    row, column = torch.arange(h) // sy, torch.arange(w) // sx
    home = row.clamp(max=n_rows - 1)[:, None] * n_columns + column.clamp(max=n_columns - 1)
    token = torch.arange(h * w).view(h, w)
    corner = token[: n_rows * sy : sy, : n_columns * sx : sx].flatten()
    if window is None:
        order = back = token.flatten()
        pads = order[:0]
        first, steps = corner, token[:sy, :sx].flatten()
        near = torch.arange(n_rows * n_columns)[None]
    else:
        grid = torch.full((-(-h // sy) * sy, -(-w // sx) * sx), -1)
        grid[:h, :w] = token
        order = grid.view(-(-h // sy), sy, -(-w // sx), sx).transpose(1, 2).flatten()
        pads = (order < 0).nonzero()[:, 0]
        back = torch.empty(h * w, dtype=torch.long)
        back[order[order >= 0]] = (order >= 0).nonzero()[:, 0]
        order = order.clamp(min=0)
        first, steps = back[corner], torch.arange(sy * sx)
        y, x = (_near(-(-n // step), n // step, window) for n, step in ((h, sy), (w, sx)))
        near = (y[:, None, :, None] * n_columns + x[:, None, :]).flatten(2).flatten(0, 1)
    never = torch.full((1, len(order)), -math.inf, dtype=torch.float32)
    tensors = (order, back, pads, first, steps, near, home.flatten()[order], never)
    put = {tensor: tensor.to(device) for tensor in tensors}  # the same ones remain the same
    return Grid(*(put[tensor] for tensor in tensors))


def _near(n: int, n_whole: int, window: int) -> Tensor:
    """Which of the whole cells of a row are near each of its n cells; some several times."""
    reach = min(window // 2, n_whole)
    return (torch.arange(n)[:, None] + torch.arange(-reach, reach + 1)).clamp(0, n_whole - 1)


@lru_cache(maxsize=64)
def known(make: Any, *key: Any) -> Any:
    """What is made of a key, kept from step to step."""
    with torch.inference_mode(False):  # such tensors would not do for gradients
        return make(*key)


def count(n_rows: int, n: int, device: torch.device, n_sets: int = 1) -> Tensor:
    """0 to n_rows * n - 1 in rows of n; again for each set."""
    return torch.arange(n_rows * n, device=device).view(n_rows, n).repeat(n_sets, 1)


def own_groups(grid: Grid, n_rows: int, n_sets: int) -> tuple[Tensor, Tensor]:
    """Group of each near destination, (B, cells, K), and home, (B, P), if each has one alone."""
    numbers = count(n_rows, len(grid.first), grid.first.device, n_sets)
    near = numbers.index_select(1, grid.near.flatten()).unflatten(1, grid.near.shape)
    return near, numbers.index_select(1, grid.home)


@dataclass(frozen=True)
class Destinations:
    """Where the destinations are.

    Attributes:
        places: of all of them, (D,).
        near: of those near each cell, (1, cells, K); ``tokens``, their tokens, (cells, K).
        home: of those at home in each place, (P,).
        bar: what a match has to be above, (1, P): infinity at destinations, else -infinity.
    """

    places: Tensor
    near: Tensor
    tokens: Tensor
    home: Tensor
    bar: Tensor

    @classmethod
    def of(cls, grid: Grid, draw: Tensor | None) -> Destinations:
        """The first token of each cell, or the one that was drawn."""
        places = grid.first
        if draw is not None:
            places = places + grid.steps.index_select(0, draw.to(places.device).flatten())
        near = tokens = places[None]  # without a window
        if grid.order is not grid.back:
            near = places.index_select(0, grid.near.flatten()).view(grid.near.shape)
            tokens = grid.order.index_select(0, near.flatten()).view(grid.near.shape)
        home = places.index_select(0, grid.home)
        bar = grid.never.index_fill(1, places, math.inf)
        return cls(places, near[None], tokens, home, bar)
