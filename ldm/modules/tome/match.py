"""Match: who is most like whom, everywhere, within windows, or by logits.

Similarity is the cosine of the metric, or, for a metric that is a place in a space, the negative
squared distance. A token whose metric is infinite or not a number, or has no direction where that
is compared, is similar to nothing: it is never chosen as a destination while there is another, and
as a source it comes last. Nothing here tracks gradients, and temporary tensors are of bounded size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

NEVER = -3e38  # below every similarity: that of what is similar to nothing
_PIECE = 2**24  # bytes that one piece of the work may take
_TILE = 8  # tokens a side of the tiles that share a set of destinations
_SIDE = 4  # rows and columns of tokens in the sample; more gained nothing on 1024 tokens


# --- the metric -----------------------------------------------------------------------------------


def metric_of(
    attention: Any, kind: str, x: Tensor, normed: Tensor, size: tuple[int, int]
) -> Tensor:
    """What is compared to find similar tokens of a block.

    Args:
        attention: the block's attn1, with to_q, to_k and heads.
        kind: a value of the key ``metric``, or ``key_logits`` or ``query_logits``.
        x: (B, N, C) the block's input.
        normed: norm1 of it.
        size: h, w of the tokens.

    Returns:
        (B, N, C'), or for logits (B, N, heads, R); see `sampled_logits`.
    """
    if kind == "hidden":
        return x
    if kind == "normed":
        return normed
    if kind in ("key_logits", "query_logits"):
        q, k = attention.to_q, attention.to_k
        asking, asked = (q, k) if kind == "key_logits" else (k, q)
        sample = sampled_tokens(size, x.device)
        return sampled_logits(normed, asking, asked, attention.heads, sample)
    keys = attention.to_k(normed)
    return keys if kind == "keys" else keys.unflatten(2, (attention.heads, -1)).mean(2)


def metrics_of(
    attention: Any, kinds: Sequence[str], x: Tensor, normed: Tensor, size: tuple[int, int]
) -> list[Tensor]:
    """`metric_of` for each kind."""
    return [metric_of(attention, kind, x, normed, size) for kind in kinds]


# Tokens compared by what attention makes of them: their logits with a sample of tokens. A group of
# keys is exact for attention where every query gives all of them the same logit, so the distance
# between two keys is taken over the logits that a few queries, spread over the picture, give them;
# likewise for queries, over their logits with a few keys. The sampled logits are products of the
# tokens with ``W_k^T q`` (or ``W_q^T k``), so the keys (queries) of all tokens need not be
# known, and their softmax says how much a key is attended to.


def sampled_tokens(size: tuple[int, int], device: torch.device) -> Tensor:
    """Numbers of tokens spread evenly over h * w of them, (R,)."""
    y, x = (
        (2 * torch.arange(min(_SIDE, n), device=device) + 1) * n // (2 * min(_SIDE, n))
        for n in size
    )
    return (y[:, None] * size[1] + x).flatten()


def is_plain(layer: nn.Module, device: torch.device) -> bool:
    """Whether a projection is its weight and nothing else, and that is on a device to be read.

    Not so are LoRAs beside it, quantised weights, and those that are brought in when it computes.
    """
    if type(layer) is not nn.Linear or layer.bias is not None or "forward" in vars(layer):
        return False
    is_hooked = layer._forward_pre_hooks or layer._forward_hooks
    is_tensor = type(layer.weight.data) is Tensor and layer.weight.is_floating_point()
    return is_tensor and not is_hooked and layer.weight.device == device


def sampled_logits(
    x: Tensor, asking: nn.Module, asked: nn.Module, heads: int, sample: Tensor
) -> Tensor:
    """Attention logits of every token with the sampled tokens, less their mean over tokens.

    Args:
        x: (B, N, C) input of the attention.
        asking: projection of the sampled tokens, C -> heads * d.
        asked: projection of all tokens; where it `is_plain`, they need not be projected.
        heads: of the attention.
        sample: (R,) token numbers.

    Returns:
        (B, N, heads, R).
    """
    few = asking(x.index_select(1, sample)).to(x.dtype)  # (B, R, heads d)
    few = few.unflatten(2, (heads, -1)).permute(0, 2, 3, 1)  # (B, heads, d, R)
    if not is_plain(asked, x.device):
        every = asked(x).to(x.dtype).unflatten(2, (heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        logits = torch.matmul(every, few * few.shape[2] ** -0.5).transpose(1, 2)
        return logits - logits.mean(1, keepdim=True)
    assert isinstance(asked, nn.Linear)
    weight = asked.weight.to(x.dtype)
    each = weight.unflatten(0, (heads, -1)).transpose(1, 2)  # (heads, C, d)
    directions = torch.matmul(each, few * few.shape[2] ** -0.5)  # (B, heads, C, R)
    directions = directions.transpose(1, 2).flatten(2)  # (B, C, heads R)
    mean = x.mean(1, keepdim=True) @ directions
    return torch.baddbmm(mean, x, directions, beta=-1).unflatten(2, (heads, -1))


def attention_received(logits: Tensor) -> Tensor:
    """The most attention that any of the sampled tokens pays to each token.

    Args:
        logits: (B, N, heads, R).

    Returns:
        (B, N) float32: the largest share of attention, relative to the mean over tokens, averaged
        over the heads.
    """
    received = []
    for rows in pieces(len(logits), 2 * logits[0].numel()):
        share = logits[rows].float().softmax(1).amax(3)  # (B, N, heads)
        received.append((share / share.mean(1, keepdim=True)).mean(2))
    return torch.cat(received)


# --- everywhere -----------------------------------------------------------------------------------


def pieces(n: int, values_each: int, n_bytes: int | None = None) -> Iterator[slice]:
    """Cut ``range(n)`` so that a piece, at so many values for each, keeps within so many bytes."""
    step = max(1, (n_bytes or _PIECE) // (4 * max(1, values_each)))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """Pick tokens: (B, N, C) and token numbers (B or 1, n) -> (B, n, C)."""
    if len(tokens) == 1:
        return x.index_select(1, tokens[0])
    rows = tokens + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*tokens.shape, x.shape[2])


def prepare_destinations(
    metric: Tensor, dst: Tensor, by_distance: bool = False
) -> tuple[Tensor, Tensor]:
    """Prepare destinations so that the largest product with a token is the most similar one.

    Returns:
        Their vectors (at unit length, if cosines are compared) less their mean, (B, n_dst, C), and
        what to add to products with them, (B, n_dst): zero, or for distances half the negative
        square of their length; minus infinity for those similar to nothing. Distances are for
        float32: a half type cannot tell the nearest from the next.
    """
    vectors = take(metric, dst).to(torch.promote_types(metric.dtype, torch.float32))
    length = torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
    is_usable = length.isfinite()
    if not by_distance:
        is_usable &= length > 0
        vectors = vectors.div_(length)
    vectors = vectors.masked_fill_(~is_usable, 0)
    # The mean changes no comparison, but without it a half type spends its digits on what all
    # destinations share, and most of them tie.
    mean = vectors.mean(1, keepdim=True)
    vectors = vectors.sub_(mean)
    bar = torch.zeros(vectors.shape[:2], dtype=vectors.dtype, device=vectors.device)
    if by_distance:  # x d - d d / 2, with d = v + mean, less what is the same for every d
        bar = -((vectors / 2 + mean) * vectors).sum(2)
    bar = bar.masked_fill_(~is_usable[..., 0], -math.inf)
    dtype = vectors.dtype if by_distance else metric.dtype
    return vectors.to(dtype), bar.to(dtype)


def nearest(
    metric: Tensor,
    src: Tensor,
    dst: Tensor,
    home: Tensor,
    n_barred: int = 0,
    by_distance: bool = False,
) -> Tensor:
    """Match every source with the most similar of all destinations.

    Args:
        metric: (B, N, C).
        src, dst: token numbers, (B or 1, n_src) and (B or 1, n_dst).
        home: (n_src,) position in dst for a source that is similar to none.
        n_barred: so many of the first destinations take nothing.
        by_distance: compare distances, not cosines.

    Returns:
        (B, n_src) positions in dst.
    """
    if metric.ndim != 3:
        raise ValueError(f"what is compared has the shape (B, N, C), not {tuple(metric.shape)}")
    n_dst, n_channels = dst.shape[1], metric.shape[2]
    best = torch.empty(len(metric), src.shape[1], dtype=torch.long, device=metric.device)
    for rows in pieces(len(metric), n_dst * n_channels):
        part = metric[rows]
        targets = dst if len(dst) == 1 else dst[rows]
        vectors, bar = prepare_destinations(part, targets, by_distance)
        bar[:, :n_barred] = -math.inf
        sources = src if len(src) == 1 else src[rows]
        for columns in pieces(src.shape[1], len(part) * (n_dst + n_channels)):
            tokens = take(part, sources[:, columns]).to(vectors.dtype)
            scores = torch.baddbmm(bar[:, None], tokens, vectors.mT)  # (B, n_src, n_dst)
            highest, index = scores.max(2)
            best[rows, columns] = torch.where(highest > -math.inf, index, home[columns])
    return best


def similarity(metric: Tensor, src: Tensor, partner: Tensor, by_distance: bool = False) -> Tensor:
    """Similarity of each source (B or 1, n_src) with its partner (B, n_src).

    Returns:
        (B, n_src), float32 at least: cosines, or negative squared distances; `NEVER` for a pair
        with nothing to compare.
    """
    found = []
    for columns in pieces(src.shape[1], 3 * len(metric) * metric.shape[2]):
        a, b = take(metric, src[:, columns]), take(metric, partner[:, columns])
        dtype = torch.promote_types(metric.dtype, torch.float32)
        a, b = a.to(dtype), b.to(dtype)
        if by_distance:
            alike = -(a - b).square().sum(2)
        else:
            lengths = torch.linalg.vector_norm(a, dim=2) * torch.linalg.vector_norm(b, dim=2)
            alike = (a * b).sum(2) / lengths
        found.append(torch.where(alike.isfinite(), alike, NEVER))
    return torch.cat(found, 1)


# --- within windows -------------------------------------------------------------------------------


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
    reach, n = min(window // 2, n_cells), max(1, _TILE // step)
    tile = torch.arange(math.ceil(n_tokens / (n * step)), device=device)[:, None]
    token = tile * n * step + torch.arange(n * step, device=device)
    cell = tile * n - reach + torch.arange(n + 2 * reach, device=device)
    apart = cell[:, :, None] - token[:, None] // step
    exists = (cell >= 0) & (cell < n_cells)
    near = exists[:, :, None] & (apart.abs() <= reach)
    return token.clamp(max=n_tokens - 1), cell.clamp(0, n_cells - 1), near
