"""From a metric to a plan: who may be merged away, into whom, and who is.

Each function chooses sources and destinations in its way, matches them, and merges the sources
most similar to their best destination. Plans carry no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.modules.tome.config import cells
from ldm.modules.tome.matching import nearest, similarity, take
from ldm.modules.tome.plan import MergePlan
from ldm.modules.tome.window import nearest_in_window


@torch.no_grad()
def plan_bipartite(
    metric: Tensor,
    r: int,
    class_token: bool = False,
    distill_token: bool = False,
    threshold: float | None = None,
    by_distance: bool = False,
) -> MergePlan:
    """Merge the r most similar of the tokens at even positions into those at odd positions.

    Args:
        metric: (B, N, C).
        r: tokens removed; no more than half of those that are not protected.
        class_token: token 0 is never merged away.
        distill_token: token 1 takes no other token.
        threshold: merge only pairs of at least this similarity.
        by_distance: compare distances, not cosines.
    """
    n = metric.shape[1]
    r = min(r, (n - class_token - distill_token) // 2)
    if r <= 0:
        return MergePlan.identity()
    position = torch.arange(n, device=metric.device)
    src, dst = position[None, ::2], position[None, 1::2]
    n_barred, last = int(distill_token), dst.shape[1] - 1
    home = (src[0] // 2).clamp(min(n_barred, last), last)
    best = nearest(metric, src, dst, home, n_barred, by_distance)
    return _plan(metric, src, dst, best, r, threshold, by_distance, class_token, distill_token)


@torch.no_grad()
def plan_kth(
    metric: Tensor, k: int, threshold: float | None = None, by_distance: bool = False
) -> MergePlan:
    """Merge all tokens but the last of every k; those left over by k are merged like any other."""
    n = metric.shape[1]
    k = min(k, n)
    if k <= 1:
        return MergePlan.identity()
    position = torch.arange(n, device=metric.device)
    whole = n - n % k
    groups = position[:whole].view(-1, k)
    src = torch.cat([groups[:, :-1].flatten(), position[whole:]])[None]
    dst = groups[:, -1][None]
    home = (src[0] // k).clamp(max=dst.shape[1] - 1)
    best = nearest(metric, src, dst, home, by_distance=by_distance)
    return _plan(metric, src, dst, best, src.shape[1], threshold, by_distance)


@torch.no_grad()
def plan_random(
    metric: Tensor,
    r: int,
    draw: Tensor,
    threshold: float | None = None,
    by_distance: bool = False,
) -> MergePlan:
    """Merge r tokens chosen at random into the others.

    Args:
        metric: (B, N, C).
        r: tokens removed, at most N - 1.
        draw: random numbers, (B or 1, N): the r smallest mark the sources; one row for all.
        threshold, by_distance: as in `plan_bipartite`.
    """
    n = metric.shape[1]
    if r >= n:
        raise InputError(f"r={r} would remove all {n} tokens; the most that can go is {n - 1}")
    if r <= 0:
        return MergePlan.identity()
    order = draw.to(metric.device).argsort(dim=1)
    src, dst = order[:, :r], order[:, r:]
    home = torch.arange(r, device=metric.device) % (n - r)
    best = nearest(metric, src, dst, home, by_distance=by_distance)
    return _plan(metric, src, dst, best, r, threshold, by_distance)


@torch.no_grad()
def plan_grid(
    metric: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    r: int,
    draw: Tensor | None = None,
    window: int | None = None,
    threshold: float | None = None,
    by_distance: bool = False,
) -> MergePlan:
    """Merge the r tokens most similar to one of the destinations, of which each cell has one.

    Args:
        metric: (B, h * w, C).
        size: h, w; rows and columns beyond the last whole cell hold sources only.
        stride: rows and columns of tokens in a cell.
        r: tokens removed; no more than there are sources.
        draw: which token of its cell is the destination, (rows, columns) of numbers below
            stride[0] * stride[1]; None: the first.
        window: match only with the destinations within so many cells a side; None: with all.
        threshold, by_distance: as in `plan_bipartite`.
    """
    (h, w), (sy, sx) = size, (min(stride[0], size[0]), min(stride[1], size[1]))
    if metric.shape[1] != h * w:
        raise ValueError(f"{metric.shape[1]} tokens are not a picture of {h} x {w}")
    n_rows, n_columns = cells(h, w, stride)
    position = torch.arange(h * w, device=metric.device).view(h, w)
    # Each cell's tokens, (cells, tokens), rolled so that the destination comes first.
    inside = position[: n_rows * sy, : n_columns * sx].reshape(n_rows, sy, n_columns, sx)
    inside = inside.permute(0, 2, 1, 3).reshape(-1, sy * sx)
    if draw is not None:
        roll = draw.to(metric.device).view(-1, 1) % (sy * sx)
        turn = (roll + torch.arange(sy * sx, device=metric.device)) % (sy * sx)
        inside = inside[:, :1] + turn // sx * w + turn % sx
    rest = position[:, n_columns * sx :], position[n_rows * sy :, : n_columns * sx]
    src = torch.cat([inside[:, 1:].flatten(), *(strip.flatten() for strip in rest)])[None]
    dst = inside[:, :1].mT
    r = min(r, src.shape[1])
    if r <= 0:
        return MergePlan.identity()
    home_y = (position // w // sy).clamp(max=n_rows - 1)
    home = (home_y * n_columns + (position % w // sx).clamp(max=n_columns - 1)).flatten()
    if window is None:
        best = nearest(metric, src, dst, home[src[0]], by_distance=by_distance)
    else:
        grid = dst.view(n_rows, n_columns)
        best = nearest_in_window(metric, size, grid, (sy, sx), window, home, by_distance)
        best = best[:, src[0]]
    return _plan(metric, src, dst, best, r, threshold, by_distance)


@torch.no_grad()
def plan_downsample(
    n_rows: int, size: tuple[int, int], stride: tuple[int, int], device: torch.device
) -> MergePlan:
    """Let one token of every cell speak for it, the middle one (of two, the second).

    Source: Smith et al. 2024, ToDo (arXiv 2402.13573).

    Args:
        n_rows: batch rows.
        size: h, w.
        stride: by how much rows and columns shrink; of leftovers some cells grow larger.
        device: where the plan is needed.
    """
    new_h, new_w = cells(*size, stride)
    if (new_h, new_w) == size:
        return MergePlan.identity()
    y, cell_y = _resize(size[0], new_h, device)
    x, cell_x = _resize(size[1], new_w, device)
    groups = (cell_y[:, None] * new_w + cell_x).flatten()
    chosen = (y[:, None] * size[1] + x).flatten()
    return MergePlan.from_groups(groups.expand(n_rows, -1), new_h * new_w, chosen)


def _resize(n: int, new: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of n stay, (new,), and the nearest of them for each, (n,); as ``nearest-exact``."""
    chosen = (2 * torch.arange(new, device=device) + 1) * n // (2 * new)
    return chosen, (2 * torch.arange(n, device=device) + 1) * new // (2 * n)


def _plan(
    metric: Tensor,
    src: Tensor,
    dst: Tensor,
    best: Tensor,
    r: int,
    threshold: float | None = None,
    by_distance: bool = False,
    class_token: bool = False,
    distill_token: bool = False,
) -> MergePlan:
    """Merge the r sources most similar to their best destination.

    The merged sequence is the unmerged sources, most similar first (in their order if the first is
    a class token), then the destinations.
    """
    n_rows, n_src, n_dst = len(metric), src.shape[1], dst.shape[1]
    to = best
    if r < n_src or threshold is not None:
        partner = take(dst.expand(n_rows, -1)[..., None], best)[..., 0]
        score = similarity(metric, src, partner, by_distance)
        if class_token:
            score[:, 0] = -math.inf
        if threshold is not None:  # the number depends on the picture: the one host sync here
            r = min(r, int((score >= threshold).sum(1).min()))
            if r == 0:
                return MergePlan.identity()
        order = score.argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(n_src, device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, ranks)
        stays = rank >= r
        place = stays.cumsum(1) - 1 if class_token else rank - r
        to = torch.where(stays, place, n_src - r + best)
    n_unmerged = n_src - r
    own = n_unmerged + torch.arange(n_dst, device=metric.device).expand(n_rows, -1)
    places = torch.cat([to, own], 1)
    if distill_token and n_unmerged:
        # Class token and distillation token lead: the first destination moves to place 1.
        moves_up = (places >= 1) & (places < n_unmerged)
        places = torch.where(places == n_unmerged, 1, places + moves_up.long())
    tokens = torch.cat([src, dst], 1).expand(n_rows, -1)
    groups = torch.empty_like(places).scatter_(1, tokens, places)
    return MergePlan.from_groups(groups, n_unmerged + n_dst)
