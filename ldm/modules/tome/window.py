"""Matching within a window of cells: linear cost, where matching with all is quadratic."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ldm.modules.tome.matching import pieces, prepare_destinations, take

_TILE = 8  # tokens a side of the tiles that share a set of destinations


def nearest_in_window(
    metric: Tensor,
    size: tuple[int, int],
    cells: Tensor,
    stride: tuple[int, int],
    window: int,
    home: Tensor,
    by_distance: bool = False,
) -> Tensor:
    """Match every token with the most similar destination of the cells around it.

    The picture is cut into tiles of a few cells. The tokens of a tile are compared with the
    destinations of its own cells and of a margin of cells around them.

    Args:
        metric: (B, h * w, C).
        size: h, w.
        cells: (rows, columns) token number of each cell's destination. Tokens beyond the last
            whole cell count as being in further cells, which have no destination.
        stride: rows and columns of tokens in a cell.
        window: cells a side of the square in which a token looks, its own in the middle.
        home: (h * w,) position for a token that is similar to none.
        by_distance: compare distances, not cosines.

    Returns:
        (B, h * w) positions in ``cells.flatten()``.
    """
    (h, w), (n_rows, n_columns) = size, cells.shape
    tiling = _tiling if torch.compiler.is_compiling() else _known_tiling
    tokens, around, near, sides = tiling(size, (n_rows, n_columns), stride, window, metric.device)
    (n_tiles_y, n_tiles_x, n_around, n_inside), n_channels = near.shape, metric.shape[2]
    best = metric.new_empty((len(metric), *tokens.shape), dtype=torch.long)
    for rows in pieces(len(metric), n_rows * n_columns * n_channels):
        part = metric[rows]
        vectors, bar = prepare_destinations(part, cells.view(1, -1), by_distance)
        values_each = len(part) * n_tiles_x * (n_around + n_inside) * (n_channels + n_around)
        for i in pieces(n_tiles_y, values_each):
            # Rows of tiles are batch rows of the product; here t = (i j).
            tile = take(part, tokens[i].view(1, -1)).view(-1, n_inside, n_channels)
            tile = tile.to(vectors.dtype)
            cell = take(vectors, around[i].view(1, -1)).view(-1, n_around, n_channels)
            bias = torch.where(near[i], bar[:, around[i], None], -math.inf).flatten(0, 2)
            highest, index = torch.baddbmm(bias, cell, tile.mT).max(1)  # (b t, around, inside)
            first = torch.arange(cell.shape[0] // len(part), device=index.device) * n_around
            index = index.view(len(part), -1, n_inside) + first[:, None]
            found = highest.view_as(index) > -math.inf
            index = torch.where(found, around[i].flatten()[index], -1)
            best[rows, i] = index.view(len(part), -1, *tokens.shape[1:])
    best = best.unflatten(3, sides)  # (b, i, j, y, x)
    best = best.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w].flatten(1)
    return torch.where(best < 0, home, best)


def _tiling(
    size: tuple[int, int],
    n_cells: tuple[int, int],
    stride: tuple[int, int],
    window: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Cut the picture into tiles (i, j) of tokens (y, x), with cells (a, b) within and around them.

    Returns:
        The tokens of each tile, (i, j, y x), the cells, (i, j, a b), which of them each token may
        choose, (i, j, a b, y x), and the numbers of y and x.
    """
    token_y, cell_y, near_y = _tiles(size[0], n_cells[0], stride[0], window, device)
    token_x, cell_x, near_x = _tiles(size[1], n_cells[1], stride[1], window, device)
    tokens = (token_y[:, None, :, None] * size[1] + token_x[:, None, :]).flatten(2)
    around = (cell_y[:, None, :, None] * n_cells[1] + cell_x[:, None, :]).flatten(2)
    near = near_y[:, None, :, None, :, None] & near_x[:, None, :, None, :]
    near = near.flatten(4, 5).flatten(2, 3)
    return tokens, around, near, (token_y.shape[1], token_x.shape[1])


_known_tiling = lru_cache(maxsize=4)(_tiling)  # blocks of a size follow each other in every step


def _tiles(
    n_tokens: int, n_cells: int, step: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut one dimension into tiles of a few cells.

    Returns:
        The tokens of each tile, (tiles, n), the cells within and around it, (tiles, m), both
        clamped to those that exist, and which of those cells each token may choose,
        (tiles, m, n).
    """
    reach, n = window // 2, max(1, _TILE // step)
    tile = torch.arange(math.ceil(n_tokens / (n * step)), device=device)[:, None]
    token = tile * n * step + torch.arange(n * step, device=device)
    cell = tile * n - reach + torch.arange(n + 2 * reach, device=device)
    apart = cell[:, :, None] - token[:, None] // step
    exists = (cell >= 0) & (cell < n_cells)
    near = exists[:, :, None] & (apart.abs() <= reach)
    return token.clamp(max=n_tokens - 1), cell.clamp(0, n_cells - 1), near
