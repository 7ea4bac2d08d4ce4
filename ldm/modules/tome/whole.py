"""The accelerators' shape of grid matching: few operators, each over all tokens at once.

On a processor small pieces that fit its caches win; on a card each operator is a launch, which
costs more than most of these operators compute. So whatever does not depend on the tokens is kept,
tokens are taken cell by cell, each cell's candidates are gathered once, one product and one maximum
match them all, and the score is taken from that maximum. The groups are those of `merge.plan_grid`,
in another order. ``TOME_MATCHING=whole`` chooses this shape on processors, too, and
``TOME_MATCHING=triton`` lets `kernels` make the same groups where that can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ldm.modules.tome import match
from ldm.modules.tome.backend import kernels_for
from ldm.modules.tome.grid import Destinations, Grid, count, grid_of, known, own_groups
from ldm.modules.tome.match import NEVER, is_plain, pieces, sampled_tokens
from ldm.modules.tome.plan import MergePlan


@lru_cache(maxsize=8)
def _piece(device: torch.device) -> int:
    """Bytes that one piece of the work may take: a quarter of what is free on a card."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return torch.cuda.mem_get_info(device)[0] // 4
    return 2**30


def geometry(
    size: tuple[int, int], stride: tuple[int, int], window: int | None, device: torch.device
) -> Grid:
    """`grid_of`, kept; compiled code has it as a constant, see `attention.compile_blocks`."""
    return known(grid_of, size, stride, window, device)


# --- the metric -----------------------------------------------------------------------------------


def metrics_of(
    attention: Any, kinds: Sequence[str], x: Tensor, normed: Tensor, size: tuple[int, int]
) -> list[Tensor]:
    """`match.metric_of` for each kind; logits of both kinds in one product, in float32."""
    q, k = attention.to_q, attention.to_k
    is_known = all(kind.endswith("_logits") for kind in kinds) and all(
        is_plain(layer, normed.device) for layer in (q, k)
    )
    if not is_known:
        return match.metrics_of(attention, kinds, x, normed, size)
    heads, (n_rows, _, n_channels) = attention.heads, normed.shape
    sample = normed.index_select(1, known(sampled_tokens, size, x.device))  # (B, R, C)
    directions = []
    for kind in kinds:
        asking, asked = (q, k) if kind == "key_logits" else (k, q)
        scale = (len(asked.weight) // heads) ** -0.5
        rows, unread = sample.flatten(0, 1), normed[0, :1, :1]
        few = torch.addmm(unread, rows, asking.weight.to(x.dtype).mT, beta=0, alpha=scale)
        few = few.unflatten(1, (heads, -1)).permute(1, 2, 0)  # (heads, d, B R)
        each = asked.weight.to(x.dtype).unflatten(0, (heads, -1)).mT  # (heads, C, d)
        found = torch.bmm(each, few).view(heads, n_channels, n_rows, -1)
        directions.append(found.permute(2, 1, 0, 3))  # (B, C, heads, R)
    every = torch.cat(directions, 2).flatten(2)
    # Less those of one token: a half type would spend its digits on what all have in common.
    less = torch.bmm(sample[:, :1], every)
    logits = torch.baddbmm(less, normed, every, beta=-1).float()
    return list(logits.unflatten(2, (len(kinds), heads, -1)).unbind(2))


def attention_received(logits: Tensor) -> Tensor:
    """`match.attention_received` in one piece."""
    share = logits.float().softmax(1).amax(3)  # (B, N, heads)
    return (share / share.mean(1, keepdim=True)).mean(2)


# --- the plan -------------------------------------------------------------------------------------


@torch.no_grad()
def plan_grid(
    metric: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    r: int,
    draw: Tensor | None = None,
    window: int | None = None,
    by_distance: bool = False,
    is_tied: bool = False,
) -> MergePlan:
    """As `merge.plan_grid`, without a threshold; if tied, both halves of the rows get one plan."""
    fused = kernels_for(metric, window)
    if fused is not None and (by_distance or not is_tied):
        both = torch.cat(metric.chunk(2), 2) if is_tied else metric
        return fused.plan_grid(both, size, stride, r, draw, window, by_distance, 1 + is_tied)
    n_tied = len(metric) if is_tied else 0
    groups, n_kept = _groups(metric, size, stride, r, draw, window, by_distance, n_tied)
    return MergePlan.in_order(groups, n_kept) if n_kept else MergePlan.identity()


@torch.no_grad()
def plan_attention(
    keys: Tensor,
    queries: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    r: int,
    draw: Tensor | None = None,
    window: int | None = None,
    is_tied: bool = False,
) -> tuple[MergePlan, MergePlan]:
    """The plans of `plan_grid` for keys and values, and for queries, in one go.

    Args:
        keys, queries: their logits, (B, N, heads, R).
        size, stride, r, draw, window: as in `merge.plan_grid`.
        is_tied: both halves of the rows get one plan for queries.
    """
    if (fused := kernels_for(keys, window)) is not None:
        both = torch.cat(queries.chunk(2), 3) if is_tied else queries
        args = size, stride, r, draw, window, True
        of_queries = fused.plan_grid(both.flatten(2), *args, n_copies=1 + is_tied)
        return fused.plan_grid(keys.flatten(2), *args), of_queries
    metric, n_tied = torch.cat([keys, queries]).flatten(2), len(keys) if is_tied else 0
    groups, n_kept = _groups(metric, size, stride, r, draw, window, True, n_tied, n_sets=2)
    if not n_kept:
        return MergePlan.identity(), MergePlan.identity()
    of_keys, of_queries = groups.chunk(2)
    return MergePlan.in_order(of_keys, n_kept), MergePlan.in_order(of_queries, n_kept)


def _groups(
    metric: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    r: int,
    draw: Tensor | None,
    window: int | None,
    by_distance: bool,
    n_tied: int,
    n_sets: int = 1,
) -> tuple[Tensor, int]:
    """The group of each token, counted through the rows of each set, (B, N); and how many a row.

    None at all, 0, where nothing is merged. The last ``n_tied`` rows are two halves that are
    matched alike: by the sum of their scores.
    """
    n_rows, n_tokens, _ = metric.shape
    device = metric.device
    grid = geometry(size, stride, window, device)
    n_kept = max(n_tokens - r, len(grid.first))
    if n_kept == n_tokens:
        return metric.new_empty(0), 0
    at: Destinations = (
        known(Destinations.of, grid, None) if draw is None else Destinations.of(grid, draw)
    )
    ranks = n_kept > len(grid.first)
    match = _everywhere if window is None else _in_windows
    value, choice, score = match(metric, grid, at, by_distance, ranks, n_tied)
    is_lost = value <= at.bar
    if not ranks:  # all sources go, and a group has the number of its destination
        near, home = known(own_groups, grid, n_rows // n_sets, n_sets)
        groups = torch.where(is_lost, home, _pick(near, choice))
    else:
        numbers = known(count, n_rows // n_sets, n_kept, device, n_sets)
        to = torch.where(is_lost, at.home, _pick(at.near.expand(n_rows, -1, -1), choice))
        score = score.index_fill_(1, at.places, -math.inf)
        if len(grid.order) > n_tokens:  # there are pads; a compiler knows these numbers
            score = score.index_fill_(1, grid.pads, math.inf)
        kept = score.topk(n_kept, 1, largest=False, sorted=False).indices.sort(1).values
        groups = to.scatter(1, kept, numbers).gather(1, to.scatter_(1, kept, kept))
    return groups if window is None else groups.index_select(1, grid.back), n_kept


Match = tuple[Tensor, Tensor, Tensor]
"""For each place the largest product with a destination, in some constant shift, -inf where there
is none to compare; which of those near that is; and how similar both are, if that is wanted."""


def _in_windows(
    metric: Tensor, grid: Grid, at: Destinations, by_distance: bool, ranks: bool, n_tied: int
) -> Match:
    """Match every place with the destinations near its cell."""
    metric = metric.to(_wide(metric.dtype))
    n_rows, _, n_channels = metric.shape
    n_cells, n_near = grid.near.shape
    n = len(grid.order) // n_cells
    each = n_rows * (n * n_near + (n + n_near) * n_channels)
    found = []
    for part in pieces(n_cells, each, _piece(metric.device)):
        places = grid.order[part.start * n : part.stop * n]
        tokens = metric.index_select(1, places).view(-1, n, n_channels)
        targets = metric.index_select(1, at.tokens[part].flatten()).view(-1, n_near, n_channels)
        compared = _compared(tokens, targets, by_distance, ranks, n_rows, n_tied)
        found.append([one.view(n_rows, -1) for one in compared])
    return _joined(found)


def _everywhere(
    metric: Tensor, grid: Grid, at: Destinations, by_distance: bool, ranks: bool, n_tied: int
) -> Match:
    """Match every token with all destinations."""
    full = metric.to(_wide(metric.dtype))
    targets = full.index_select(1, at.places)
    parts = pieces(metric.shape[1], len(metric) * len(at.places), _piece(metric.device))
    if by_distance:
        n_rows = len(metric)
        return _joined(
            [_compared(full[:, part], targets, True, ranks, n_rows, n_tied) for part in parts]
        )
    unit = targets / torch.linalg.vector_norm(targets, dim=2, keepdim=True)
    # Less their mean: a half type would spend its digits on what all have in common.
    mean = unit.nan_to_num(0.0, 0.0, 0.0).mean(1, keepdim=True)
    apart = (unit - mean).to(metric.dtype).mT
    value, choice = _joined([_best(torch.bmm(metric[:, part], apart)) for part in parts])
    if not ranks:
        return value, choice, value
    product = value + torch.bmm(full, mean.mT)[..., 0]
    return value, choice, _ranked(product / torch.linalg.vector_norm(full, dim=2))


def _compared(
    tokens: Tensor, targets: Tensor, by_distance: bool, ranks: bool, n_rows: int, n_tied: int
) -> Match:
    """Match tokens (b, n, C) with targets (b, K, C), in float32; b counts cells through rows."""
    lengths = torch.linalg.vector_norm(targets, dim=2, keepdim=True)
    if by_distance:  # x d - d d / 2 is largest where the distance is least
        scores = torch.baddbmm(lengths.square().mT, tokens, targets.mT, beta=-0.5)
    else:
        scores = torch.bmm(tokens, (targets / lengths).mT)
    value, choice = _best(_tied(scores, n_rows, n_tied))
    if not ranks:
        return value, choice, value
    length = torch.linalg.vector_norm(tokens, dim=2)
    if not by_distance:
        return value, choice, _ranked(value / length)
    if not n_tied:
        return value, choice, _ranked(torch.addcmul(value, length, length, value=-0.5))
    square = _tied(length.square(), n_rows, n_tied)
    return value, choice, _ranked(torch.sub(value, square, alpha=0.5))


def _tied(x: Tensor, n_rows: int, n_tied: int) -> Tensor:
    """Replace both halves of the last rows by their sum, in place."""
    if n_tied:
        half, other = x.unflatten(0, (n_rows, -1))[-n_tied:].chunk(2)
        other.copy_(half.add_(other))
    return x


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or the type itself where it is wider."""
    return dtype if dtype.itemsize > 4 else torch.float32


def _ranked(score: Tensor) -> Tensor:
    """What is no number comes last."""
    return score.nan_to_num_(NEVER, NEVER, NEVER)


def _pick(table: Tensor, choice: Tensor) -> Tensor:
    """Entry ``choice``, (B, P), of the row of its cell, (B, cells, K)."""
    choice = choice.unflatten(1, (table.shape[1], -1))
    if table.shape[2] == 1:  # MPS gathers nothing along a dimension of 1
        return table.expand(choice.shape).flatten(1)
    return table.gather(2, choice).flatten(1)


def _joined(parts: list[Any]) -> Any:
    """The pieces of several tensors, put together along their tokens."""
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(one, 1) for one in zip(*parts, strict=True))


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the scores and where it is; what is no number is below all others."""
    best = scores.nan_to_num_(-math.inf, -math.inf, -math.inf).max(2)
    return best.values, best.indices
