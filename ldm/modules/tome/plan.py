"""The plan: which token goes into which group; and the plans of one transformer block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MergePlan:
    """A partition of N tokens into n_kept groups, one per batch row.

    Every token is in one group, so merging loses none and unmerging gives N tokens back. Build a
    plan with `from_groups`, or with `identity` where nothing is merged.

    Attributes:
        n_tokens, n_kept: tokens before and after.
        sizes: tokens in each group, (B, n_kept) float32; None where each stands for itself.
        groups: the group of each token, (B * N,); rows are counted through the batch, so that
            one-dimensional operators do all the work.
        members, starts: the tokens, group after group, and where each group begins; None where
            groups are added up without them.
        chosen: the one token that speaks for its group, (B * n_kept,); None takes the mean.
        shares: what each token counts in its group's mean, (B * N,), summing to 1 in each group;
            None counts all alike.
        has_gaps: some rows have fewer than n_kept groups.
    """

    n_tokens: int = -1
    n_kept: int = -1
    sizes: Tensor | None = None
    groups: Tensor | None = None
    members: Tensor | None = None
    starts: Tensor | None = None
    chosen: Tensor | None = None
    shares: Tensor | None = None
    has_gaps: bool = False

    @classmethod
    def identity(cls, after: MergePlan | None = None) -> MergePlan:
        """The plan that returns its argument; ``after`` another one, it knows that one's sizes."""
        return cls() if after is None else cls(sizes=after.sizes, has_gaps=after.has_gaps)

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
            sizes=sizes.view(n_rows, n_kept),
            groups=flat,
            members=flat.argsort(stable=True) if is_ordered else None,
            starts=(sizes.long().cumsum(0) - sizes.long()) if is_ordered else None,
            chosen=None if chosen is None else (chosen + row * n_tokens).flatten(),
            has_gaps=has_gaps,
        )

    def weighted(self, weights: Tensor) -> MergePlan:
        """The same plan, whose means weigh the tokens.

        Args:
            weights: (B, N) above 0; those that are not, or are no numbers, count as very little.
        """
        if self.groups is None or self.chosen is not None:
            return self
        assert self.sizes is not None
        weights = weights.float().nan_to_num(0.0, 0.0, 0.0).clamp(min=1e-6).flatten()
        total = weights.new_zeros(self.sizes.numel()).index_add_(0, self.groups, weights)
        return replace(self, shares=weights / total.index_select(0, self.groups))

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
    def is_identity(self) -> bool:
        """Whether merging returns its argument."""
        return self.groups is None

    def log_size(self, is_proportional: bool = True) -> Tensor | None:
        """Bias for attention logits, (B, 1, 1, n_kept): a token that stands for s counts s times.

        Args:
            is_proportional: False lets all count alike, but for groups without any token.

        Source: proportional attention, Bolya et al. 2023 (arXiv 2210.09461) eq. 1.
        """
        if self.sizes is None or not (is_proportional or self.has_gaps):
            return None
        sizes = self.sizes if is_proportional else self.sizes.clamp(max=1)
        return sizes.log()[:, None, None, :]

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
        return merged.view(len(x), self.n_kept, -1)

    def unmerge(self, x: Tensor) -> Tensor:
        """Give every token its group's value: (B, n_kept, C) -> (B, N, C)."""
        if self.groups is None:
            return x
        rows = self._rows(x, self.n_kept).index_select(0, self.groups)
        return rows.view(len(x), self.n_tokens, -1)

    def _rows(self, x: Tensor, n_tokens: int) -> Tensor:
        assert self.sizes is not None
        if x.ndim != 3 or x.shape[:2] != (len(self.sizes), n_tokens):
            raise ValueError(
                f"this plan is for tensors of shape ({len(self.sizes)}, {n_tokens}, C), "
                f"not {tuple(x.shape)}"
            )
        return x.reshape(-1, x.shape[2])

    def _reduce(self, rows: Tensor, mode: str) -> Tensor:
        """Mean or sum of each group's rows, added up in float32 or in whole numbers."""
        assert self.groups is not None
        assert self.sizes is not None
        if not rows.is_floating_point():
            whole = rows.new_zeros(self.sizes.numel(), rows.shape[1]).index_add(
                0, self.groups, rows
            )
            if mode == "sum":
                return whole
            counts = self.sizes.flatten().to(whole.dtype)[:, None].clamp(min=1)
            return whole.div(counts, rounding_mode="floor")
        shares = self.shares if mode == "mean" else None
        if self.members is not None:
            # In a fixed order, so the same on every run, and without a copy of the rows.
            if shares is not None:
                shares, mode = shares[self.members].to(rows.dtype), "sum"
            return F.embedding_bag(
                self.members, rows, self.starts, mode=mode, per_sample_weights=shares
            )
        if shares is None and mode == "mean":
            shares = 1 / self.sizes.flatten().index_select(0, self.groups)
        added = rows.float() if shares is None else rows.float() * shares[:, None]
        total = rows.new_zeros(self.sizes.numel(), rows.shape[1], dtype=torch.float32)
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
