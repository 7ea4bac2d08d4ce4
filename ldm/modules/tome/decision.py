"""What is merged in one block, and the plans for it, once they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.tome import match, whole
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.plan import NOTHING, BlockPlans, MergePlan


@dataclass(eq=False)
class Decision:
    """What is merged in one block, and the plans, once they are made.

    Whoever comes later finds them there: the recomputation of gradient checkpointing, the next
    model calls with ``reuse_steps``, the next blocks with ``reuse_layers``.

    Attributes:
        config: the configuration in force, without rules.
        size: h, w of the block's tokens.
        removed: tokens to remove; 0 merges nothing.
        n_channels: channels of the block's tokens.
        draw: the random numbers of the plan, where the method has any.
        pays: whether merging is expected to save time here.
        is_guided: whether the batch has two halves whose difference guidance takes.
        planner: makes the plans; None: `merge.plan_block`.
        is_whole: tokens are matched in the accelerators' shape; see `whole`.
        plan, query_plan: the plan, and the one for queries; None until they are made.
    """

    config: ToMeConfig
    size: tuple[int, int]
    removed: int
    n_channels: int = 1
    draw: Tensor | None = None
    pays: bool = True
    is_guided: bool = False
    planner: Planner | None = None
    is_whole: bool = False
    plan: MergePlan | None = None
    query_plan: MergePlan | None = None

    @property
    def is_whole_block(self) -> bool:
        """Whether one merge and one unmerge enclose the block."""
        return self.removed > 0 and "block" in self.config.apply_to

    @property
    def is_whole_grid(self) -> bool:
        """Whether `whole` makes the plans."""
        return self.is_whole and self.config.method == "grid" and self.config.similarity is None

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

    @property
    def metrics(self) -> tuple[str, ...]:
        """What has to be compared for the plans; see `match.metric_of`."""
        if self.config.method in ("downsample", "tiles"):
            return ("hidden",)  # which costs nothing
        if self.config.metric != "logits":
            return (self.config.metric,)
        places = {*self.config.apply_to}
        queries = ("query_logits",) if places & {"q", "attn"} else ()
        return (*queries, "key_logits") if places & {"kv", "attn"} else queries

    @torch.no_grad()
    def metrics_of(
        self, attention: Any, norm: nn.Module, x: Tensor, normed: Tensor | None = None
    ) -> list[Tensor]:
        """What is compared in the block, one for each of ``metrics``.

        Args:
            attention: its attn1, with to_q, to_k and heads.
            norm: its norm1.
            x: (B, N, C) its input.
            normed: norm1 of it, if it is known.
        """
        if normed is None:
            normed = x if self.metrics == ("hidden",) else norm(x)
        find = whole.metrics_of if self.is_whole else match.metrics_of
        return find(attention, self.metrics, x, normed, self.size)

    @property
    def places(self) -> BlockPlans:
        """The plan for each place of the block; they have to be made before, if any is needed."""
        if self.removed == 0:
            return NOTHING
        assert self.plan is not None
        assert self.query_plan is not None
        config = self.config
        if config.method == "tiles":  # queries and keys are cut alike, and nothing is merged
            return BlockPlans.at(("attn",), self.plan, self.plan, False)
        return BlockPlans.at(config.apply_to, self.plan, self.query_plan, config.proportional)


Planner = Callable[[Decision, Sequence[Tensor]], tuple[MergePlan, MergePlan]]
"""(decision, its metrics) -> the plan, and the one for queries."""
