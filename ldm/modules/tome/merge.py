"""Token merging as published: functions that return ``merge`` and ``unmerge``.

They have the signatures and results of facebookresearch/ToMe and dbolya/tomesd, and are right where
those lose tokens: tokens left over by k are sources like any other, the order of class and
distillation token is undone, and what is zero or not a number attracts nothing.

Source: Bolya et al. 2023, Token Merging: Your ViT But Faster (arXiv 2210.09461), and Bolya and
Hoffman 2023, Token Merging for Fast Stable Diffusion (arXiv 2303.17604).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.modules.tome.config import cells
from ldm.modules.tome.plan import MergePlan
from ldm.modules.tome.planning import plan_bipartite, plan_grid, plan_kth, plan_random

Merge = Callable[..., Tensor]


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
    draw = torch.rand(n_rows, metric.shape[1], 1, generator=generator, device=device)
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
        The merged tokens, (B, N', C), and their sizes, (B, N', 1).
    """
    if size is None:
        size = torch.ones_like(x[..., :1])
    size = size.to(torch.promote_types(x.dtype, torch.float32))  # half types overflow in sums
    merged = merge(x * size, mode="sum")
    size = merge(size, mode="sum")
    return (merged / size).to(x.dtype), size.to(x.dtype)


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
        source = torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)
    return merge(source, mode="amax")


def _pair(plan: MergePlan) -> tuple[Merge, Merge]:
    return (do_nothing, do_nothing) if plan.is_identity else (plan.merge, plan.unmerge)
