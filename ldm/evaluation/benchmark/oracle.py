"""The oracle of a merging setting: the same blocks on as many tokens, with merging itself free.

It tells what a perfect implementation of the setting would reach. The pictures are worthless.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.modules.tome.decision import Decision
from ldm.modules.tome.merge import plan_block
from ldm.modules.tome.plan import MergePlan


@dataclass(frozen=True)
class FreePlan(MergePlan):
    """Has a merge plan's shapes and does none of its work: both directions are views.

    It has no token sizes, so attention takes no bias for them either.
    """

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        """(B, N, C) -> (B, n_kept, C): the memory that comes first."""
        return x.flatten(0, 1)[: len(x) * self.n_kept].view(len(x), self.n_kept, -1)

    def unmerge(self, x: Tensor) -> Tensor:
        """(B, n_kept, C) -> (B, N, C): the first token, again and again."""
        return x[:, :1].expand(-1, self.n_tokens, -1)


def oracle(unet: Any) -> AbstractContextManager[None]:
    """Leave matching, merging and unmerging out of a U-Net's blocks, as long as the context lasts.

    Args:
        unet: a UNetModel; its `TokenMerger` decides as ever which blocks work on how many tokens.
            With a ``similarity`` these are as many as ``ratio`` alone would leave.
    """
    return unet.tome.planned_by(_free)


def _free(decision: Decision, metrics: Sequence[Tensor]) -> tuple[MergePlan, MergePlan]:
    if decision.config.method == "tiles":  # of which nothing is free already
        return plan_block(decision, metrics)
    # groups without content: a plan that has none counts as the identity
    kept = decision.n_tokens - decision.removed
    plan = FreePlan(decision.n_tokens, kept, groups=torch.empty(0))
    return plan, plan
