"""Controls: what merging would cost if similarity, or self-attention itself, did not matter.

Each acts on the self-attention of the blocks at full latent resolution, for as long as the
context lasts: ``none`` skips it, ``random`` merges random pairs of tokens, ``drop`` leaves random
tokens out and gives them no output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.evaluation.benchmark.unets import transformer_blocks
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.decision import Decision
from ldm.modules.tome.plan import MergePlan

CONTROLS = ("none", "random", "drop")


@dataclass(frozen=True)
class DropPlan(MergePlan):
    """Keeps the tokens ``kept``, (n_kept,), and gives the others nothing."""

    kept: Tensor | None = None

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        """(B, N, C) -> (B, n_kept, C)."""
        return x[:, self.kept]

    def unmerge(self, x: Tensor) -> Tensor:
        """(B, n_kept, C) -> (B, N, C), zero where a token was dropped."""
        out = x.new_zeros(len(x), self.n_tokens, x.shape[2])
        assert self.kept is not None
        return out.index_copy(1, self.kept, x)


@contextmanager
def control(unet: Any, name: str, ratio: float = 0.5, seed: int = 0) -> Iterator[None]:
    """Apply one of `CONTROLS` to a U-Net.

    Args:
        unet: a UNetModel, whose own merging is replaced meanwhile.
        name: which control.
        ratio: share of the tokens merged or dropped, in (0, 1); ``none`` takes no notice.
        seed: of the random choice.

    Raises:
        ValueError: there is no such control.
    """
    if name not in CONTROLS:
        raise ValueError(f"control {name!r} is not one of {', '.join(CONTROLS)}")
    if name == "none":
        blocks = transformer_blocks(unet, downsample=1)
        hooks = [b.attn1.register_forward_hook(lambda *args: args[2] * 0) for b in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        return
    generator = torch.Generator().manual_seed(seed)
    make = _random_pairs if name == "random" else _dropped

    def planner(decision: Decision, metrics: Sequence[Tensor]) -> tuple[MergePlan, MergePlan]:
        x = metrics[0]
        plan = make(len(x), decision.n_tokens, decision.removed, generator, x.device)
        return plan, plan

    plain = ToMeConfig(
        method="random",
        ratio=ratio,
        metric="hidden",
        window=None,
        weighted=False,
        proportional=False,
    )
    with unet.tome.planned_by(planner, plain):
        yield


def _random_pairs(
    n_rows: int, n: int, removed: int, generator: torch.Generator, device: torch.device
) -> MergePlan:
    order = torch.randperm(n, generator=generator)
    groups = torch.empty(n, dtype=torch.long)
    groups[order[removed:]] = torch.arange(n - removed)
    groups[order[:removed]] = torch.randint(n - removed, (removed,), generator=generator)
    return MergePlan.from_groups(groups.to(device).expand(n_rows, n), n - removed)


def _dropped(
    n_rows: int, n: int, removed: int, generator: torch.Generator, device: torch.device
) -> MergePlan:
    kept = torch.randperm(n, generator=generator)[removed:].sort().values.to(device)
    ones = torch.ones(n_rows, n - removed, device=device)
    return DropPlan(n_tokens=n, n_kept=n - removed, counts=ones, groups=kept, kept=kept)
