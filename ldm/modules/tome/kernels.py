"""Grid matching within windows, and its groups' means, as one Triton kernel each.

The first kernel compares every token with the destinations near it and writes which one is most
like it; the second forms a group's mean by looking for its members near its destination. Nothing is
sorted, and sums are taken in a fixed order without atomics, so the same input gives the same bytes.
``TOME_MATCHING=triton`` chooses this way in `whole`, whose groups it makes; nothing else imports
this module, which needs Triton. Under Triton's interpreter it runs on processors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm.modules.tome.config import cells
from ldm.modules.tome.grid import count, known
from ldm.modules.tome.plan import MergePlan

TYPES = (torch.float32, torch.float16, torch.bfloat16)  # all are compared and added in float32
_TOKENS = 32  # that one program of a kernel takes at a time


# --- the kernels ---------------------------------------------------------------------------------


@triton.jit
def _match_kernel(  # type: ignore[no-untyped-def]  # Triton compiles annotations
    metric,
    draw,
    to,
    score,
    row_step,
    token_step,
    h,
    w,
    n_cell_rows,
    n_cell_columns,
    n_kept,
    n_channels,
    SY: tl.constexpr,
    SX: tl.constexpr,
    REACH: tl.constexpr,
    BY_DISTANCE: tl.constexpr,
    RANKS: tl.constexpr,
    IS_DRAWN: tl.constexpr,
    TOKENS: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Find the most similar destination of some neighbours in a row of cells, column by column."""
    never: tl.constexpr = float("inf")
    cell_y, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * TOKENS
    number = start + tl.arange(0, TOKENS)
    y, x = cell_y * SY + number % SY, number // SY
    is_token = (x < w) & (y < h)
    cell_x = x // SX
    home_y, home_x = tl.minimum(cell_y, n_cell_rows - 1), tl.minimum(cell_x, n_cell_columns - 1)
    # Columns of cells that any of these tokens may choose; the least that each may.
    column = tl.minimum(start // (SY * SX) - REACH, n_cell_columns - 1) + tl.arange(0, CELLS)
    least = tl.minimum(cell_x - REACH, n_cell_columns - 1)
    is_near = (column[None] >= least[:, None]) & (column[None] <= cell_x[:, None] + REACH)
    is_there = (column >= 0) & (column < n_cell_columns)
    metric += b * row_step
    best = tl.full([TOKENS], -never, tl.float32)
    choice = home_y * n_cell_columns + home_x
    squares = tl.zeros([TOKENS], tl.float32)
    last_row = tl.minimum(cell_y + REACH, n_cell_rows - 1)
    for row in range(tl.maximum(tl.minimum(cell_y - REACH, n_cell_rows - 1), 0), last_row + 1):
        cell = row * n_cell_columns + column
        token = row * SY * w + column * SX
        if IS_DRAWN:
            within = tl.load(draw + cell, mask=is_there, other=0).to(tl.int32)
            token += within // SX * w + within % SX
        products = tl.zeros([TOKENS, CELLS], tl.float32)
        lengths = tl.zeros([CELLS], tl.float32)  # squared
        squares = tl.zeros([TOKENS], tl.float32)
        for c in range(0, n_channels, CHANNELS):
            channel = c + tl.arange(0, CHANNELS)
            is_channel = (channel < n_channels)[None]
            own = metric + (y * w + x)[:, None] * token_step + channel[None]
            own = tl.load(own, mask=is_token[:, None] & is_channel, other=0.0).to(tl.float32)
            other = metric + token[:, None] * token_step + channel[None]
            other = tl.load(other, mask=is_there[:, None] & is_channel, other=0.0).to(tl.float32)
            products = tl.dot(own, tl.trans(other), products, input_precision="ieee")
            lengths += tl.sum(other * other, 1)
            squares += tl.sum(own * own, 1)
        # x d - d d / 2 is largest where the distance is least.
        by_distance, by_cosine = products - lengths[None] / 2, products / tl.sqrt(lengths)[None]
        value = by_distance if BY_DISTANCE else by_cosine
        is_usable = is_near & (is_there & (lengths < never))[None] & (tl.abs(value) < never)
        value = tl.where(is_usable, value, -never)
        highest = tl.max(value, 1)
        first = tl.min(tl.where(value == highest[:, None], cell[None], 2**30), 1)
        choice = tl.where(highest > best, first, choice)
        best = tl.maximum(highest, best)
    # A destination stays in its own cell.
    token = y * w + x
    own_cell = home_y * n_cell_columns + home_x
    own_lead = home_y * SY * w + home_x * SX
    if IS_DRAWN:
        within = tl.load(draw + own_cell).to(tl.int32)
        own_lead += within // SX * w + within % SX
    choice = tl.where(token == own_lead, own_cell, choice)
    if RANKS:  # which token it would be merged into, and how similar they are
        lead = choice // n_cell_columns * SY * w + choice % n_cell_columns * SX
        if IS_DRAWN:
            within = tl.load(draw + choice).to(tl.int32)
            lead += within // SX * w + within % SX
        alike = best - squares / 2 if BY_DISTANCE else best / tl.sqrt(squares)
        alike = tl.where(tl.abs(alike) < never, alike, -3e38)  # match.NEVER
        alike = tl.where(token == own_lead, -never, alike)
        tl.store(to + b * h * w + token, lead.to(tl.int64), mask=is_token)
        tl.store(score + b * h * w + token, alike, mask=is_token)
    else:
        tl.store(to + b * h * w + token, b * n_kept + choice, mask=is_token)


@triton.jit
def _reduce_kernel(  # type: ignore[no-untyped-def]  # Triton compiles annotations
    x,
    weights,
    groups,
    leads,
    out,
    n_lead_rows,
    h,
    w,
    n_kept,
    n_channels,
    SY: tl.constexpr,
    SX: tl.constexpr,
    REACH: tl.constexpr,
    IS_MEAN: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add up some channels of one group's members, all of which are near its lead."""
    group = tl.program_id(0).to(tl.int64)
    b = group // n_kept
    lead = tl.load(leads + b % n_lead_rows * n_kept + group % n_kept).to(tl.int32)
    cell_y, cell_x = lead // w // SY, lead % w // SX
    top, bottom = tl.maximum(cell_y - REACH, 0) * SY, tl.minimum((cell_y + REACH + 1) * SY, h)
    left, right = tl.maximum(cell_x - REACH, 0) * SX, tl.minimum((cell_x + REACH + 1) * SX, w)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = (channel < n_channels)[None]
    total, weight = tl.zeros([CHANNELS], tl.float32), 0.0
    for start in range(0, (bottom - top) * (right - left), TOKENS):
        place = start + tl.arange(0, TOKENS)
        row, column = top + place // (right - left), left + place % (right - left)
        token = b * h * w + row * w + column
        is_member = tl.load(groups + token, mask=row < bottom, other=-1) == group
        if tl.max(is_member.to(tl.int32), 0) > 0:
            share = is_member.to(tl.float32)
            if IS_WEIGHTED:
                share = tl.load(weights + token, mask=is_member, other=0.0).to(tl.float32)
                is_weight = (share > 1e-6) & (share < float("inf"))
                share = tl.where(is_member, tl.where(is_weight, share, 1e-6), 0.0)
            values = x + token[:, None] * n_channels + channel[None]
            values = tl.load(values, mask=is_member[:, None] & is_channel, other=0.0)
            total += tl.sum(values.to(tl.float32) * share[:, None], 0)
            weight += tl.sum(share, 0)
    if IS_MEAN:
        total = total / weight
    tl.store(out + group * n_channels + channel, total, mask=channel < n_channels)


# --- as operators of PyTorch, so that each counts as what it is: one launch -----------------------


def _match(
    metric: Tensor,
    draw: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    reach: int,
    n_kept: int,
    by_distance: bool,
    ranks: bool,
) -> tuple[Tensor, Tensor]:
    """Match every token with the destinations within ``reach`` cells.

    Returns:
        The group of each, counted through the rows, (B, N). If it ranks, instead the destination's
        token, and how similar it is: (B, N) float32, -infinity for the destinations.
    """
    to, score = _match_room(metric, draw, size, stride, reach, n_kept, by_distance, ranks)
    (n_rows, _, n_channels), (h, w), (sy, sx) = metric.shape, size, stride
    n_near = (_TOKENS - 1) // (sy * sx) + 1 + (_TOKENS % (sy * sx) > 0) + 2 * reach
    with torch.cuda.device_of(metric):
        _match_kernel[triton.cdiv(w * sy, _TOKENS), triton.cdiv(h, sy), n_rows](
            *(metric, draw, to, score, *metric.stride()[:2], h, w, h // sy, w // sx),
            *(n_kept, n_channels, sy, sx, reach, by_distance, ranks, draw is not None),
            *(_TOKENS, max(16, triton.next_power_of_2(n_near)), 32),
        )
    return to, score


def _match_room(
    metric: Tensor,
    draw: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    reach: int,
    n_kept: int,
    by_distance: bool,
    ranks: bool,
) -> tuple[Tensor, Tensor]:
    to = metric.new_empty(metric.shape[:2], dtype=torch.long)
    return to, metric.new_empty(metric.shape[:2] if ranks else (0,), dtype=torch.float32)


def _reduce(
    x: Tensor,
    weights: Tensor | None,
    groups: Tensor,
    leads: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    reach: int,
    is_mean: bool,
) -> Tensor:
    """Sum or weighted mean of each group, (B, n_kept, C).

    Args:
        x: (B, N, C).
        weights: (B, N), or None.
        groups: of the tokens, counted through the rows, (B * N,).
        leads: a token in whose reach all members of each group are, (B, B / n or 1, n_kept).
        size, stride, reach, is_mean: as they are called.
    """
    out = _reduce_room(x, weights, groups, leads, size, stride, reach, is_mean)
    n_rows, n_kept, n_channels = out.shape
    channels = min(64, max(16, triton.next_power_of_2(n_channels)))
    with torch.cuda.device_of(x):
        _reduce_kernel[n_rows * n_kept, triton.cdiv(n_channels, channels)](
            *(x, weights, groups, leads, out, len(leads), *size, n_kept, n_channels, *stride),
            *(reach, is_mean, weights is not None, 64, channels),
        )
    return out


def _reduce_room(
    x: Tensor,
    weights: Tensor | None,
    groups: Tensor,
    leads: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    reach: int,
    is_mean: bool,
) -> Tensor:
    return x.new_empty(len(x), leads.shape[1], x.shape[2])


_LIBRARY = torch.library.Library("ldm_tome", "FRAGMENT")
for _name, _work, _room in (("match", _match, _match_room), ("reduce", _reduce, _reduce_room)):
    _LIBRARY.define(_name + torch.library.infer_schema(_work, mutates_args=()))
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _work, _key)
    _LIBRARY.impl(_name, _room, "Meta")


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NearPlan(MergePlan):
    """A plan whose groups are found around their leads, so that no list of members is needed.

    Attributes:
        leads, size, stride, reach: as in `_reduce`.
        weights: of the tokens in means, (B, N).
    """

    leads: Tensor | None = None
    size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    reach: int = 1
    weights: Tensor | None = None

    @property
    def sizes(self) -> Tensor:
        """Tokens in each group, (B, n_kept) float32."""
        assert self.groups is not None
        n_rows = len(self.groups) // self.n_tokens
        return self._reduced(known(_ones, n_rows, self.n_tokens, self.groups.device), False)[..., 0]

    def weighted(self, weights: Tensor) -> MergePlan:
        """As `MergePlan.weighted`."""
        return replace(self, weights=weights.contiguous())

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        """As `MergePlan.merge`; gradients, other types and other modes need the members."""
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if mode not in ("mean", "sum") or x.dtype not in TYPES or needs_gradient:
            return self.ordered.merge(x, mode)
        self._rows(x, self.n_tokens)  # complains of another shape
        return self._reduced(x.contiguous(), mode == "mean")

    def _reduced(self, x: Tensor, is_mean: bool) -> Tensor:
        weights = self.weights if is_mean else None
        place = self.leads, self.size, self.stride, self.reach
        return torch.ops.ldm_tome.reduce(x, weights, self.groups, *place, is_mean)

    @cached_property
    def ordered(self) -> MergePlan:
        """The same plan with a list of members."""
        assert self.groups is not None
        rows = self.groups.view(-1, self.n_tokens)
        plan = MergePlan.in_order(rows, self.n_kept)
        return plan if self.weights is None else plan.weighted(self.weights)


def plan_grid(
    metric: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    r: int,
    draw: Tensor | None,
    window: int,
    by_distance: bool = False,
    n_copies: int = 1,
) -> MergePlan:
    """As `merge.plan_grid`, without a threshold; the plan is for so many copies of the rows."""
    (h, w), (sy, sx) = size, (min(stride[0], size[0]), min(stride[1], size[1]))
    n_rows, n_tokens, _ = metric.shape
    n_cells = math.prod(cells(h, w, stride))
    n_kept = max(n_tokens - r, n_cells)
    if n_kept == n_tokens:
        return MergePlan.identity()
    reach, ranks = window // 2, n_kept > n_cells
    leads = known(_corners, size, (sy, sx), metric.device)
    if metric.stride(2) != 1:
        metric = metric.contiguous()
    to, score = torch.ops.ldm_tome.match(
        metric, draw, size, (sy, sx), reach, n_kept, by_distance, ranks
    )
    if ranks:
        leads = score.topk(n_kept, 1, largest=False, sorted=False).indices.sort(1).values
        numbers = known(count, n_rows, n_kept, metric.device)
        to = to.scatter(1, leads, numbers).gather(1, to.scatter_(1, leads, leads))
    if n_copies > 1:
        to = torch.cat([to + i * n_rows * n_kept for i in range(n_copies)])
    return NearPlan(
        n_tokens=n_tokens,
        n_kept=n_kept,
        groups=to.flatten(),
        leads=leads,
        size=size,
        stride=(sy, sx),
        # Those beyond the last whole cell have to look one cell back, whatever the window.
        reach=max(reach, 1),
    )


def _corners(size: tuple[int, int], stride: tuple[int, int], device: torch.device) -> Tensor:
    """The first token of each whole cell, (1, cells)."""
    (h, w), (sy, sx) = size, stride
    tokens = torch.arange(h * w, device=device).view(h, w)
    return tokens[: h - sy + 1 : sy, : w - sx + 1 : sx].reshape(1, -1)


def _ones(n_rows: int, n_tokens: int, device: torch.device) -> Tensor:
    return torch.ones(n_rows, n_tokens, 1, dtype=torch.float32, device=device)
