"""Merge: choose destinations, match, rank; each way of it gives a plan.

Each ``plan_...`` function chooses sources and destinations in its way, matches them, and merges the
sources most similar to their best destination. Plans carry no gradient. On top of them are the
functions that were published, with their signatures and results, and right where those lose tokens:
tokens left over by k are sources like any other, the order of class and distillation token is
undone, and what is zero or not a number attracts nothing.

Source: Bolya et al. 2023, Token Merging: Your ViT But Faster (arXiv 2210.09461), and Bolya and
Hoffman 2023, Token Merging for Fast Stable Diffusion (arXiv 2303.17604).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.modules.tome import backend, since, whole
from ldm.modules.tome.config import cells
from ldm.modules.tome.decision import Decision
from ldm.modules.tome.grid import known
from ldm.modules.tome.match import attention_received, nearest, nearest_in_window, similarity, take
from ldm.modules.tome.plan import MergePlan

Merge = Callable[..., Tensor]


# --- a block -------------------------------------------------------------------------------------


@torch.no_grad()
def plan_block(decision: Decision, metrics: Sequence[Tensor]) -> tuple[MergePlan, MergePlan]:
    """Make the plan that was decided on for a block, and the one for its queries.

    They differ only where tokens are compared by logits. In guidance both halves get the same
    groups of queries: what these get wrong is then alike in both, and guidance, which enlarges
    their difference, does not enlarge it.

    Autocast has no say here: in its half type the nearest cannot be told from the next.

    Args:
        decision: what to merge, and how.
        metrics: what is compared, one for each of ``decision.metrics``: (B, N, C), or logits
            (B, N, heads, R).
    """
    kind = metrics[0].device.type
    is_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if is_autocast else nullcontext():
        backend.say_what_is_left(decision.config)
        plan_of, config = _method(decision), decision.config
        logits = dict(zip(decision.metrics, metrics, strict=True))
        keys, queries = logits.get("key_logits"), logits.get("query_logits")
        plan: MergePlan | None = None
        query_plan: MergePlan | None = None
        if keys is None and queries is None:
            plan = plan_of(metrics[0])
        elif keys is not None and queries is not None and decision.is_whole_grid:
            plan, query_plan = whole.plan_attention(
                keys,
                queries,
                decision.size,
                config.stride,
                decision.removed,
                decision.draw,
                config.window,
                decision.is_guided,
            )
        elif queries is not None:
            if not decision.is_guided:
                query_plan = plan_of(queries.flatten(2), by_distance=True)
            elif decision.is_whole_grid:
                query_plan = plan_of(queries.flatten(2), by_distance=True, is_tied=True)
            else:
                both = torch.cat(queries.chunk(2), 3).flatten(2)
                query_plan = plan_of(both, by_distance=True).repeated(2)
        if keys is not None:
            plan = plan or plan_of(keys.flatten(2), by_distance=True)
            if config.weighted:
                received = whole.attention_received if decision.is_whole else attention_received
                plan = plan.weighted(received(keys))
        plan = plan or query_plan
        assert plan is not None
        if config.mean == "norm":
            plan = since.NormPlan.of(plan)
            query_plan = query_plan and since.NormPlan.of(query_plan)
    return plan, query_plan or plan


def _method(decision: Decision) -> Callable[..., MergePlan]:
    """What makes the plan of a metric, and takes ``by_distance`` where the metric may be logits."""
    config, size, r, draw = decision.config, decision.size, decision.removed, decision.draw
    stride, window, threshold = config.stride, config.window, config.similarity
    if config.method == "bipartite":
        first, second = config.protect > 0, config.protect > 1
        return partial(
            plan_bipartite, r=r, class_token=first, distill_token=second, threshold=threshold
        )
    if config.method == "kth":
        return partial(plan_kth, k=config.group(decision.n_tokens), threshold=threshold)
    if config.method == "random":
        assert draw is not None
        return partial(plan_random, r=r, draw=draw, threshold=threshold)
    if config.method == "downsample":
        return lambda metric: known(since.plan_downsample, len(metric), size, stride, metric.device)
    if config.method == "tiles":
        return lambda metric: since.plan_tiles(size, stride, draw)
    if config.method == "prune":
        return partial(since.plan_prune, size=size, stride=stride, r=r, noise=draw)
    if config.method == "guided":
        assert draw is not None
        n = decision.n_tokens - config.removable(*size)
        return partial(plan_random, r=r, draw=draw, n_destinations=n)
    if config.method == "cover":
        guided = decision.is_guided
        return partial(since.plan_cover, size=size, stride=stride, r=r, is_guided=guided)
    geometry: dict[str, Any] = {"size": size, "stride": stride, "draw": draw, "window": window}
    if decision.is_whole_grid:
        return partial(whole.plan_grid, r=r, **geometry)
    return partial(plan_grid, r=r, threshold=threshold, **geometry)


# --- the methods ---------------------------------------------------------------------------------


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
    if r <= 0 or n // 2 <= distill_token:  # or no other token is a destination
        return MergePlan.identity()
    position = torch.arange(n, device=metric.device)
    src, dst = position[None, ::2], position[None, 1::2]
    n_barred, last = int(distill_token), dst.shape[1] - 1
    home = (src[0] // 2).clamp(min(n_barred, last), last)
    best = nearest(metric, src, dst, home, n_barred, by_distance)
    return _rank(metric, src, dst, best, r, threshold, by_distance, class_token, distill_token)


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
    return _rank(metric, src, dst, best, src.shape[1], threshold, by_distance)


@torch.no_grad()
def plan_random(
    metric: Tensor,
    r: int,
    draw: Tensor,
    threshold: float | None = None,
    by_distance: bool = False,
    n_destinations: int | None = None,
) -> MergePlan:
    """Merge r tokens chosen at random into the others.

    Args:
        metric: (B, N, C).
        r: tokens removed, at most N - 1.
        draw: random numbers, (B or 1, N): the smallest mark the sources; one row for all.
        threshold, by_distance: as in `plan_bipartite`.
        n_destinations: how many tokens are no sources, of which the r most similar go; None: as
            many as stay.
    """
    n = metric.shape[1]
    if r >= n:
        raise InputError(f"r={r} would remove all {n} tokens; the most that can go is {n - 1}")
    if r <= 0:
        return MergePlan.identity()
    n_dst = n - r if n_destinations is None else n_destinations
    order = draw.to(metric.device).argsort(dim=1)
    src, dst = order[:, : n - n_dst], order[:, n - n_dst :]
    home = torch.arange(n - n_dst, device=metric.device) % n_dst
    best = nearest(metric, src, dst, home, by_distance=by_distance)
    return _rank(metric, src, dst, best, r, threshold, by_distance)


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
    return _rank(metric, src, dst, best, r, threshold, by_distance)


def _rank(
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
    a class token), then the destinations. With a threshold each row merges as many as reach it; the
    others' places are left empty, so that no picture depends on its neighbours.
    """
    n_rows, n_src, n_dst = len(metric), src.shape[1], dst.shape[1]
    to, has_gaps = best, False
    if metric.device.type == "meta":  # whoever counts work has no values: as many go as may
        threshold = None
    if r < n_src or threshold is not None:
        partner = take(dst.expand(n_rows, -1)[..., None], best)[..., 0]
        score = similarity(metric, src, partner, by_distance)
        if class_token:
            score[:, 0] = -math.inf
        order = score.argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(n_src, device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, ranks)
        first: int | Tensor = r  # rank of the first source that stays
        if threshold is not None:
            # How many go depends on the picture: the one place where the host waits for it.
            goes = (score >= threshold).sum(1, keepdim=True).clamp(max=r)
            first, least, r = goes, *(int(n) for n in (goes.min(), goes.max()))
            if r == 0:
                return MergePlan.identity()
            r, has_gaps = least, least < r
        place = (rank >= first).cumsum(1) - 1 if class_token else rank - first
        to = torch.where(rank >= first, place, n_src - r + best)
    n_unmerged = n_src - r
    own = n_unmerged + torch.arange(n_dst, device=metric.device).expand(n_rows, -1)
    places = torch.cat([to, own], 1)
    if distill_token and n_unmerged:
        # Class token and distillation token lead: the first destination moves to place 1.
        moves_up = (places >= 1) & (places < n_unmerged)
        places = torch.where(places == n_unmerged, 1, places + moves_up.long())
    tokens = torch.cat([src, dst], 1).expand(n_rows, -1)
    groups = torch.empty_like(places).scatter_(1, tokens, places)
    return MergePlan.from_groups(groups, n_unmerged + n_dst, has_gaps=has_gaps)


# --- as published ---------------------------------------------------------------------------------


def do_nothing(x: Tensor, mode: str | None = None) -> Tensor:
    """Return x: both functions of the pair where nothing is merged."""
    return x


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> tuple[Merge, Merge]:
    """Balanced matching of even with odd positions.

    Args:
        metric: (B, N, C) what is compared.
        r: tokens removed, at most half of those that are not protected.
        class_token: token 0 is never merged away.
        distill_token: token 1 takes no other token.

    Returns:
        ``merge(x, mode="mean")``, (B, N, C') -> (B, N - r, C'), and ``unmerge``, its inverse.
    """
    return _pair(plan_bipartite(metric, r, class_token, distill_token))


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> tuple[Merge, Merge]:
    """Merge all tokens but the last of every k, into the most similar of those; see `plan_kth`."""
    return _pair(plan_kth(metric, k))


def random_bipartite_soft_matching(
    metric: Tensor, r: int, generator: torch.Generator | None = None, shared: bool = False
) -> tuple[Merge, Merge]:
    """Merge r tokens chosen at random into the others.

    Args:
        metric: (B, N, C) what is compared.
        r: tokens removed, at most N - 1.
        generator: of the random numbers; None: torch's global one.
        shared: the same tokens in every batch row.

    Raises:
        InputError: r is N or more.
    """
    if r <= 0:
        return do_nothing, do_nothing
    device = generator.device if generator is not None else metric.device
    n_rows = 1 if shared else len(metric)
    draw = torch.rand(
        n_rows, metric.shape[1], 1, generator=generator, device=device, dtype=torch.float32
    )
    return _pair(plan_random(metric, r, draw[..., 0]))


def bipartite_soft_matching_random2d(
    metric: Tensor,
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Merge, Merge]:
    """Merge r tokens into those of one destination in each cell of sy x sx tokens.

    Args:
        metric: (B, h * w, C) what is compared.
        w, h: columns and rows of tokens.
        sx, sy: columns and rows of a cell.
        r: tokens removed, at most all but the destinations.
        no_rand: the destination is the first token of its cell, not a random one.
        generator: of the random numbers, one draw for all batch rows; None: torch's global one.
    """
    if r <= 0:
        return do_nothing, do_nothing
    draw = None
    if not no_rand:
        device = generator.device if generator is not None else metric.device
        shape = (*cells(h, w, (sy, sx)), 1)
        n_choices = min(sy, h) * min(sx, w)
        draw = torch.randint(n_choices, shape, generator=generator, device=device)
    return _pair(plan_grid(metric, (h, w), (sy, sx), r, draw))


def merge_wavg(merge: Merge, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge by an average weighted with how many tokens each stands for.

    Args:
        merge: the first of a pair.
        x: (B, N, C).
        size: (B, N, 1) from the last merge; None: ones.

    Returns:
        The merged tokens, (B, N', C), of the type of x * size, or float32 where both are whole
        numbers; and their sizes, (B, N', 1), of the type that they had, or else of that of x.
    """
    if size is None:
        size = torch.ones_like(x[..., :1])
    dtype = torch.promote_types(x.dtype, size.dtype)
    if not dtype.is_floating_point:
        dtype = torch.float32
    weights = size.to(torch.promote_types(dtype, torch.float32))  # half types overflow in sums
    merged = merge(x * weights, mode="sum")
    total = merge(weights, mode="sum")
    return (merged / total).to(dtype), total.to(size.dtype)


def merge_source(merge: Merge, x: Tensor, source: Tensor | None = None) -> Tensor:
    """Track which of the original tokens each token stands for.

    Args:
        merge: the first of a pair.
        x: (B, N, C), for its shape only.
        source: the last result; None: each token stands for itself.

    Returns:
        (B, N', N_original) of zeros and ones.
    """
    if source is None:
        source = torch.eye(x.shape[1], dtype=torch.float32, device=x.device).expand(len(x), -1, -1)
    return merge(source, mode="amax")


def _pair(plan: MergePlan) -> tuple[Merge, Merge]:
    return (do_nothing, do_nothing) if plan.is_identity else (plan.merge, plan.unmerge)
