"""Where the time of merging goes: seconds spent in match, merge and unmerge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ldm.modules.tome.decision import Decision
from ldm.modules.tome.merge import plan_block
from ldm.modules.tome.plan import MergePlan

PARTS = ("match", "merge", "unmerge")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Adds up the seconds of each part of the work.

    Args:
        device: where the work is done; every part waits for it, before and after.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens in the context as part ``name``."""
        synchronize(self._device)
        start = perf_counter()
        yield
        synchronize(self._device)
        self.seconds[name] += perf_counter() - start


@dataclass(frozen=True)
class TimedPlan(MergePlan):
    """A merge plan under a stopwatch."""

    watch: Stopwatch = field(default_factory=lambda: Stopwatch(torch.device("cpu")))
    inner: MergePlan = field(default_factory=MergePlan)

    @classmethod
    def of(cls, plan: MergePlan, watch: Stopwatch) -> TimedPlan:
        """The same plan, with a stopwatch."""
        own = {f.name: getattr(plan, f.name) for f in fields(MergePlan)}
        return cls(**own, watch=watch, inner=plan)

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        """As `MergePlan.merge`."""
        with self.watch.part("merge"):
            return self.inner.merge(x, mode)

    def unmerge(self, x: Tensor) -> Tensor:
        """As `MergePlan.unmerge`."""
        with self.watch.part("unmerge"):
            return self.inner.unmerge(x)


@contextmanager
def breakdown(unet: Any, device: torch.device) -> Iterator[dict[str, float]]:
    """Measure the parts of merging in a U-Net, as long as the context lasts.

    Matching includes making the plan, but not what is compared: that is the block's own work.

    Args:
        unet: a UNetModel.
        device: where it computes.

    Yields:
        Seconds for each of `PARTS`, growing as the model is called.
    """
    watch = Stopwatch(device)
    make = unet.tome.planner or plan_block

    def planner(decision: Decision, metrics: Sequence[Tensor]) -> tuple[MergePlan, MergePlan]:
        with watch.part("match"):
            plan, queries = make(decision, metrics)
        if plan.is_identity:
            return plan, queries
        timed = TimedPlan.of(plan, watch)
        return timed, timed if queries is plan else TimedPlan.of(queries, watch)

    with unet.tome.planned_by(planner):
        yield watch.seconds
