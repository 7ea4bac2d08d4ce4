"""What merging does in one transformer block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.logits import attention_received, sampled_logits, sampled_tokens
from ldm.modules.tome.plan import MergePlan
from ldm.modules.tome.planning import (
    plan_bipartite,
    plan_downsample,
    plan_grid,
    plan_kth,
    plan_random,
)


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
        plan: MergePlan,
        places: tuple[str, ...],
        is_proportional: bool,
        query_plan: MergePlan | None = None,
    ) -> BlockPlans:
        """Use a plan in the places of ``apply_to``; for queries another one, if there is one."""
        if "block" in places:
            inside = MergePlan.identity(plan.sizes)
            return cls(plan, inside, inside, inside, inside, is_proportional)
        return cls(
            block=IDENTITY,
            q=(query_plan or plan) if "q" in places or "attn" in places else IDENTITY,
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
        bias = keys.log_size if self.is_proportional else None
        return merged, None if keys is queries else keys.merge(x), bias


def tokens_to_compare(
    block: Any, x: Tensor, normed: Tensor | None, size: tuple[int, int], kind: str
) -> Tensor:
    """What is compared to find similar tokens of a block; see `BlockMerge.plans`.

    Args:
        block: has norm1 and attn1, and that has to_q, to_k and heads.
        x: (B, N, C) the block's input.
        normed: norm1 of it, if known.
        size: h, w of the tokens.
        kind: a value of the key ``metric``, or ``key_logits`` or ``query_logits``.
    """
    if kind == "hidden":
        return x
    normed = block.norm1(x) if normed is None else normed
    if kind == "normed":
        return normed
    if kind in ("key_logits", "query_logits"):
        q, k, heads = block.attn1.to_q.weight, block.attn1.to_k.weight, block.attn1.heads
        asking, asked = (q, k) if kind == "key_logits" else (k, q)
        return sampled_logits(normed, asking, asked, heads, sampled_tokens(size, x.device))
    keys = block.attn1.to_k(normed)
    return keys if kind == "keys" else keys.unflatten(2, (block.attn1.heads, -1)).mean(2)


IDENTITY = MergePlan.identity()
NOTHING = BlockPlans(IDENTITY, IDENTITY, IDENTITY, IDENTITY, IDENTITY, False)


class BlockMerge:
    """How many tokens go in one block, and the plan, made when it is first asked for.

    Whoever asks again gets the same plan: the recomputation of gradient checkpointing, the next
    model calls with ``reuse_steps``, the next blocks with ``reuse_layers``.

    Attributes:
        config: the configuration in force, without rules.
        size: h, w of the block's tokens.
        removed: tokens to remove; 0 merges nothing.
        n_channels: channels of the block's tokens.
        pays: whether merging is expected to save time here.
        is_guided: whether the batch has two halves whose difference guidance takes.
        plan: the plan, once made.
        query_plan: the one for queries, where they are merged by a metric of their own.
    """

    def __init__(
        self,
        config: ToMeConfig,
        size: tuple[int, int],
        removed: int,
        n_channels: int = 1,
        draw: Tensor | None = None,
        pays: bool = True,
        is_guided: bool = False,
    ) -> None:
        self.config = config
        self.size = size
        self.removed = removed
        self.n_channels = n_channels
        self.pays = pays
        self.is_guided = is_guided
        self.plan: MergePlan | None = None
        self.query_plan: MergePlan | None = None
        self._draw = draw

    @property
    def is_whole_block(self) -> bool:
        """Whether one merge and one unmerge enclose the block."""
        return self.removed > 0 and "block" in self.config.apply_to

    @property
    def n_tokens(self) -> int:
        """Tokens before merging."""
        return self.size[0] * self.size[1]

    @property
    def n_kept(self) -> int:
        """Tokens after merging; what the plan says once it is made."""
        if self.plan is None:
            return self.n_tokens - self.removed
        return self.n_tokens if self.plan.is_identity else self.plan.n_kept

    def plans(self, metric: Callable[[str], Tensor]) -> BlockPlans:
        """The plans for the block's places.

        Args:
            metric: gives what is compared, for a value of the key ``metric``: tokens, (B, N, C),
                or for ``key_logits`` and ``query_logits`` their sampled logits,
                (B, N, heads, R); it is called only where a plan has to be made.
        """
        if self.removed == 0:
            return NOTHING
        config = self.config
        if self.plan is None:
            with torch.no_grad():
                if config.method == "downsample":
                    self.plan = self._make_plan(metric("hidden"))  # which costs nothing
                elif config.metric == "logits":
                    self._plan_by_logits(metric)
                else:
                    self.plan = self._make_plan(metric(config.metric).detach())
        assert self.plan is not None
        return BlockPlans.at(self.plan, config.apply_to, config.proportional, self.query_plan)

    def _plan_by_logits(self, metric: Callable[[str], Tensor]) -> None:
        """Make a plan for keys and values, and another one for queries, as they are needed."""
        places = {*self.config.apply_to}
        if places & {"q", "attn"}:
            self.query_plan = self._plan_queries(metric("query_logits").detach())
        if places & {"kv", "attn"}:
            logits = metric("key_logits").detach()
            self.plan = self._make_plan(logits.flatten(2), True)
            if self.config.weighted:
                self.plan = self.plan.weighted(attention_received(logits))
        else:
            self.plan = self.query_plan

    def _plan_queries(self, logits: Tensor) -> MergePlan:
        """Plan by logits (B, N, heads, R); in guidance both halves get the same groups.

        What merged queries get wrong is then alike in both, and guidance, which enlarges their
        difference, does not enlarge it.
        """
        if not self.is_guided:
            return self._make_plan(logits.flatten(2), True)
        both = torch.cat(logits.chunk(2), 3)
        return self._make_plan(both.flatten(2), True).repeated(2)

    def _make_plan(self, metric: Tensor, by_distance: bool = False) -> MergePlan:
        config, removed, threshold = self.config, self.removed, self.config.similarity
        if config.method == "bipartite":
            return plan_bipartite(
                metric, removed, config.protect > 0, config.protect > 1, threshold, by_distance
            )
        if config.method == "kth":
            return plan_kth(metric, config.group(self.n_tokens), threshold, by_distance)
        if config.method == "random":
            assert self._draw is not None
            return plan_random(metric, removed, self._draw, threshold, by_distance)
        if config.method == "grid":
            return plan_grid(
                metric,
                self.size,
                config.stride,
                removed,
                self._draw,
                config.window,
                threshold,
                by_distance,
            )
        return plan_downsample(len(metric), self.size, config.stride, metric.device)
