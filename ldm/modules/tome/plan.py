"""The plan: which token goes into which group; and the plans of one transformer block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING_THERE = -1e4  # bias of a group without tokens: not -inf, which times 0 is no number


@lru_cache(maxsize=16)
def _numbers(n: int, device: torch.device) -> Tensor:
    """0 to n - 1."""
    with torch.inference_mode(False):  # such tensors would not do for gradients
        return torch.arange(n, device=device)


@lru_cache(maxsize=4)
def _least(device: torch.device) -> Tensor:
    """The least weight that a token has."""
    with torch.inference_mode(False):
        return torch.tensor(1e-6, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class MergePlan:
    """A partition of N tokens into n_kept groups, one per batch row.

    Every token is in one group, so merging loses none and unmerging gives N tokens back. Build a
    plan with `from_groups`, or with `identity` where nothing is merged.

    Attributes:
        n_tokens, n_kept: tokens before and after.
        counts: tokens in each group, (B, n_kept) float32; None where each stands for itself, or
            where they have not been asked for: see ``sizes``.
        groups: the group of each token, (B * N,); rows are counted through the batch, so that
            one-dimensional operators do all the work.
        members, starts: the tokens, group after group, and where each group begins; None where
            groups are added up without them. The starts may be followed by the end.
        chosen: the one token that speaks for its group, (B * n_kept,); None takes the mean.
        shares: what each token counts in its group's mean, (B * N,), summing to 1 in each group;
            None counts all alike.
        heads: the group of each of the members, (B * N,), where it is known.
        ordered_shares: the shares of the members, instead of those of the tokens.
        has_gaps: some rows have fewer than n_kept groups.
    """

    n_tokens: int = -1
    n_kept: int = -1
    counts: Tensor | None = None
    groups: Tensor | None = None
    members: Tensor | None = None
    starts: Tensor | None = None
    chosen: Tensor | None = None
    shares: Tensor | None = None
    has_gaps: bool = False
    heads: Tensor | None = None
    ordered_shares: Tensor | None = None

    @classmethod
    def identity(cls, after: MergePlan | None = None) -> MergePlan:
        """The plan that returns its argument; ``after`` another one, it knows that one's sizes."""
        return cls() if after is None else cls(counts=after.sizes, has_gaps=after.has_gaps)

    @classmethod
    @torch.no_grad()
    def from_groups(
        cls, groups: Tensor, n_kept: int, chosen: Tensor | None = None, has_gaps: bool = False
    ) -> MergePlan:
        """Build a plan from group numbers.

        Args:
            groups: (B, N) integers in [0, n_kept), each of which occurs in every row.
            n_kept: number of groups.
            chosen: (n_kept,) token of each group that stands for it as it is, in all rows;
                None takes the group's mean.
            has_gaps: some rows have fewer groups; the tokens of those that do not occur are zeros,
                to which nothing attends.
        """
        n_rows, n_tokens = groups.shape
        row = torch.arange(n_rows, device=groups.device)[:, None]
        flat = (groups + row * n_kept).flatten()
        # Counts have a type of their own: the default may be one that cannot count to 257.
        ones = torch.ones(flat.shape, dtype=torch.float32, device=flat.device)
        sizes = torch.zeros(n_rows * n_kept, dtype=torch.float32, device=flat.device)
        sizes.index_add_(0, flat, ones)  # whole numbers: in any order the same
        # MPS learnt embedding_bag late; there, and where nothing is added up, no order is needed.
        is_ordered = chosen is None and groups.device.type != "mps"
        return cls(
            n_tokens=n_tokens,
            n_kept=n_kept,
            counts=sizes.view(n_rows, n_kept),
            groups=flat,
            members=flat.argsort(stable=True) if is_ordered else None,
            starts=(sizes.long().cumsum(0) - sizes.long()) if is_ordered else None,
            chosen=None if chosen is None else (chosen + row * n_tokens).flatten(),
            has_gaps=has_gaps,
        )

    @classmethod
    @torch.no_grad()
    def in_order(cls, groups: Tensor, n_kept: int) -> MergePlan:
        """As `from_groups`, in few operators.

        Args:
            groups: (B, N) integers in [b * n_kept, (b + 1) * n_kept) in row b.
            n_kept: number of groups.
        """
        n_rows, n_tokens = groups.shape
        bounds = _numbers(n_rows * n_kept + 1, groups.device)
        if groups.device.type == "mps":
            return cls.from_groups(groups - bounds[:-1:n_kept, None], n_kept)
        flat = groups.flatten()
        heads, members = flat.sort(stable=True)
        starts = torch.searchsorted(heads, bounds)
        return cls(n_tokens, n_kept, None, flat, members, starts, heads=heads)

    def weighted(self, weights: Tensor) -> MergePlan:
        """The same plan, whose means weigh the tokens.

        Args:
            weights: (B, N) above 0; those that are not, or are no numbers, count as very little.
        """
        if self.groups is None or self.chosen is not None:
            return self
        if self.heads is not None:
            return self._weighted_in_order(weights)
        assert self.counts is not None
        weights = weights.float().nan_to_num(0.0, 0.0, 0.0).clamp(min=1e-6).flatten()
        if self.members is None or weights.device.type == "cpu":
            total = weights.new_zeros(self.counts.numel()).index_add_(0, self.groups, weights)
        else:  # index_add_ has no fixed order there
            column = weights[:, None]
            total = F.embedding_bag(self.members, column, self.starts, mode="sum")[:, 0]
        return replace(self, shares=weights / total.index_select(0, self.groups))

    def _weighted_in_order(self, weights: Tensor) -> MergePlan:
        """As `weighted`; sums are taken in the order of the tokens, so always the same."""
        assert self.members is not None
        assert self.starts is not None
        assert self.heads is not None
        # Of a number and what is none fmax takes the number.
        weights = torch.fmax(weights.float(), _least(weights.device)).flatten()[:, None]
        total = F.embedding_bag(
            self.members, weights, self.starts, mode="sum", include_last_offset=True
        )
        shares = weights.index_select(0, self.members) / total.index_select(0, self.heads)
        return replace(self, ordered_shares=shares[:, 0])

    def repeated(self, n: int) -> MergePlan:
        """The same plan for n times the rows; not for one with chosen or weighted tokens."""
        if self.groups is None:
            return self
        assert self.chosen is None
        assert self.shares is None
        groups = self.groups.view(-1, self.n_tokens)
        row = torch.arange(len(groups), device=groups.device)[:, None]
        return MergePlan.from_groups((groups - row * self.n_kept).repeat(n, 1), self.n_kept)

    @property
    def ordered(self) -> MergePlan:
        """The same plan, with the members of the groups in order."""
        return self

    @property
    def is_identity(self) -> bool:
        """Whether merging returns its argument."""
        return self.groups is None

    @property
    def sizes(self) -> Tensor | None:
        """Tokens in each group, (B, n_kept) float32; None where each stands for itself."""
        if self.counts is not None or self.heads is None:
            return self.counts
        assert self.starts is not None
        return (self.starts[1:] - self.starts[:-1]).float().view(-1, self.n_kept)

    def log_size(self, is_proportional: bool = True) -> Tensor | None:
        """Bias for attention logits, (B, 1, 1, n_kept): a token that stands for s counts s times.

        Args:
            is_proportional: False lets all count alike, but for groups without any token.

        Source: proportional attention, Bolya et al. 2023 (arXiv 2210.09461) eq. 1.
        """
        if not (is_proportional or self.has_gaps):
            return None
        sizes = self.sizes
        if sizes is None:
            return None
        bias = (sizes if is_proportional else sizes.clamp(max=1)).log()[:, None, None, :]
        return bias.clamp(min=NOTHING_THERE) if self.has_gaps else bias

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Reduce each group to one token: (B, N, C) -> (B, n_kept, C), of x's type.

        Args:
            x: any channels, but the plan's batch and tokens.
            mode: mean or sum, in float32 for half types (the mean of whole numbers is rounded
                down, as ToMe has it); or amax, amin, prod.
        """
        if self.groups is None:
            return x
        rows = self._rows(x, self.n_tokens)
        if self.chosen is not None:
            merged = rows.index_select(0, self.chosen)
        elif mode in ("mean", "sum"):
            merged = self._reduce(rows, mode)
        else:
            index = self.groups[:, None].expand_as(rows)
            merged = rows.new_zeros(len(x) * self.n_kept, rows.shape[1])
            merged = merged.scatter_reduce(0, index, rows, mode, include_self=False)
        return merged.view(len(x), self.n_kept, x.shape[2])

    def unmerge(self, x: Tensor) -> Tensor:
        """Give every token its group's value: (B, n_kept, C) -> (B, N, C)."""
        if self.groups is None:
            return x
        rows = self._rows(x, self.n_kept).index_select(0, self.groups)
        return rows.view(len(x), self.n_tokens, x.shape[2])

    def _rows(self, x: Tensor, n_tokens: int) -> Tensor:
        assert self.groups is not None
        n_rows = len(self.groups) // self.n_tokens
        if x.ndim != 3 or x.shape[:2] != (n_rows, n_tokens):
            raise ValueError(
                f"this plan is for tensors of shape ({n_rows}, {n_tokens}, C), not {tuple(x.shape)}"
            )
        return x.reshape(-1, x.shape[2])

    def _reduce(self, rows: Tensor, mode: str) -> Tensor:
        """Mean or sum of each group's rows, added up in float32 or in whole numbers."""
        assert self.groups is not None
        if not rows.is_floating_point():
            sizes = self.sizes
            assert sizes is not None
            whole = rows.new_zeros(sizes.numel(), rows.shape[1]).index_add(0, self.groups, rows)
            if mode == "sum":
                return whole
            counts = sizes.flatten().to(whole.dtype)[:, None].clamp(min=1)
            return whole.div(counts, rounding_mode="floor")
        shares = self.shares if mode == "mean" else None
        if self.members is not None:
            # In a fixed order, so the same on every run, and without a copy of the rows.
            if mode == "mean" and self.ordered_shares is not None:
                shares, mode = self.ordered_shares.to(rows.dtype), "sum"
            elif shares is not None:
                shares, mode = shares[self.members].to(rows.dtype), "sum"
            return F.embedding_bag(
                self.members,
                rows,
                self.starts,
                mode=mode,
                per_sample_weights=shares,
                include_last_offset=self.heads is not None,
            )
        assert self.counts is not None
        if shares is None and mode == "mean":
            shares = 1 / self.counts.flatten().index_select(0, self.groups)
        added = rows.float() if shares is None else rows.float() * shares[:, None]
        total = rows.new_zeros(self.counts.numel(), rows.shape[1], dtype=torch.float32)
        return total.index_add(0, self.groups, added).to(rows.dtype)


IDENTITY = MergePlan.identity()


@dataclass(frozen=True)
class BlockPlans:
    """The plan for each place of a block; the identity where nothing is merged."""

    block: MergePlan
    q: MergePlan
    kv: MergePlan
    crossattn: MergePlan
    mlp: MergePlan
    is_proportional: bool

    @classmethod
    def at(
        cls,
        places: tuple[str, ...],
        plan: MergePlan,
        query_plan: MergePlan,
        is_proportional: bool,
    ) -> BlockPlans:
        """Use a plan in the places of ``apply_to``, and another one for queries."""
        if "block" in places:
            inside = MergePlan.identity(plan)
            return cls(plan, inside, inside, inside, inside, is_proportional)
        return cls(
            block=IDENTITY,
            q=query_plan if "q" in places or "attn" in places else IDENTITY,
            kv=plan if "kv" in places or "attn" in places else IDENTITY,
            crossattn=plan if "crossattn" in places else IDENTITY,
            mlp=plan if "mlp" in places else IDENTITY,
            is_proportional=is_proportional,
        )

    def for_attention(
        self, x: Tensor, context: Tensor | None, queries: MergePlan, keys: MergePlan
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What an attention layer gets instead of tokens and context; its result is unmerged.

        Merging comes before the projections: as they have no bias, it is the same after them.

        Args:
            x: (B, N, C).
            context: (B, L, D); None where the tokens attend to themselves.
            queries, keys: two of these plans; the latter counts without a context only.

        Returns:
            The queries' tokens, the context of the keys and values (None: the queries' tokens),
            and a bias for the logits, (B, 1, 1, L'), or None.
        """
        merged = queries.merge(x)
        if context is not None:
            return merged, context, None
        bias = keys.log_size(self.is_proportional)
        return merged, None if keys is queries else keys.merge(x), bias


NOTHING = BlockPlans(IDENTITY, IDENTITY, IDENTITY, IDENTITY, IDENTITY, False)
