"""Matching: which destination each token is most similar to.

Similarity is the cosine of the metric, or, for a metric that is a place in a space, the negative
squared distance. A token whose metric is infinite or not a number, or has no direction where that
is compared, is similar to nothing: it is never chosen as a destination while there is another, and
as a source it comes last. Nothing here tracks gradients, and temporary tensors are of bounded size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

NEVER = -3e38  # below every similarity: that of what is similar to nothing
_PIECE = 2**24  # bytes that one piece of the work may take


def pieces(n: int, values_each: int) -> Iterator[slice]:
    """Cut ``range(n)`` so that a piece, at so many values for each, keeps within a fixed size."""
    step = max(1, _PIECE // (4 * max(1, values_each)))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """Pick tokens: (B, N, C) and token numbers (B or 1, n) -> (B, n, C)."""
    if len(tokens) == 1:
        return x.index_select(1, tokens[0])
    rows = tokens + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*tokens.shape, -1)


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
