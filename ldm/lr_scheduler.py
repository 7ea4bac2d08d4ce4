"""Learning-rate multipliers for ``torch.optim.lr_scheduler.LambdaLR``.

Each object maps the number of the optimiser step to a factor on the base learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ldm.errors import InputError


@runtime_checkable
class Schedule(Protocol):
    """What a model's ``scheduler_config`` can name."""

    def schedule(self, n: int) -> float:
        """The factor of the learning rate at step n."""


class LambdaWarmUpCosineScheduler:
    """Linear warm-up from lr_start to lr_max, then half a cosine down to lr_min, then constant.

    Args:
        warm_up_steps: length of the warm-up, in steps.
        lr_min: factor at and after ``max_decay_steps``.
        lr_max: factor at the end of the warm-up.
        lr_start: factor at step 0.
        max_decay_steps: the step at which lr_min is reached.
        verbosity_interval: print the factor every so many steps; 0 never.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        if max_decay_steps <= warm_up_steps:
            raise InputError(
                f"max_decay_steps {max_decay_steps} must be above warm_up_steps {warm_up_steps}"
            )
        self.warm_up_steps = warm_up_steps
        self.lr_min, self.lr_max, self.lr_start = lr_min, lr_max, lr_start
        self.max_decay_steps = max_decay_steps
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int) -> float:
        """Factor at step n, counted from 0."""
        if n < self.warm_up_steps:
            factor = self.lr_start + (self.lr_max - self.lr_start) * n / self.warm_up_steps
        else:
            decay_steps = self.max_decay_steps - self.warm_up_steps
            progress = min((n - self.warm_up_steps) / decay_steps, 1.0)
            factor = _cosine(self.lr_max, self.lr_min, progress)
        _report(n, factor, self.verbosity_interval)
        return factor

    __call__ = schedule


class LambdaWarmUpCosineScheduler2:
    """Cycles, each a linear warm-up from f_start to f_max and then a cosine down to f_min.

    Past the last cycle the last one's final factor holds (upstream fails there).

    Args:
        warm_up_steps: steps of warm-up, for each cycle.
        f_min: factor at the end, for each cycle.
        f_max: factor after the warm-up, for each cycle.
        f_start: factor at the beginning, for each cycle.
        cycle_lengths: steps, for each cycle.
        verbosity_interval: print the factor every so many steps; 0 never.

    Raises:
        InputError: the lists differ in length, or there is no cycle, or one without a step.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        lists = (warm_up_steps, f_min, f_max, f_start, cycle_lengths)
        lengths = [len(values) for values in lists]
        if len(set(lengths)) != 1 or not cycle_lengths:
            raise InputError(
                "warm_up_steps, f_min, f_max, f_start and cycle_lengths need one value for each "
                f"cycle, but their lengths are {lengths}"
            )
        if min(cycle_lengths) < 1 or min(warm_up_steps) < 0:
            raise InputError(
                f"cycle_lengths {list(cycle_lengths)}, warm_up_steps {list(warm_up_steps)}: a "
                "cycle has at least 1 step, a warm-up at least 0"
            )
        self.cycles = list(zip(*lists, strict=True))
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int) -> float:
        """Factor at step n, counted from 0."""
        step, last = n, len(self.cycles) - 1
        for i, cycle in enumerate(self.cycles):
            length = cycle[-1]
            if step <= length or i == last:
                break
            step -= length
        warm_up, f_min, f_max, f_start, length = cycle
        step = min(step, length)  # past the end: stay at the last cycle's last step
        if step < warm_up:
            factor = f_start + (f_max - f_start) * step / warm_up
        else:
            factor = self._decay(f_max, f_min, step, warm_up, length)
        _report(n, factor, self.verbosity_interval)
        return factor

    __call__ = schedule

    @staticmethod
    def _decay(f_max: float, f_min: float, step: int, warm_up: int, length: int) -> float:
        return _cosine(f_max, f_min, min((step - warm_up) / max(length - warm_up, 1), 1.0))


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """As LambdaWarmUpCosineScheduler2, with a straight line in place of the cosine.

    The line runs from f_max at the cycle's start to f_min at its end, whatever the warm-up
    covers of it (upstream's rule).
    """

    @staticmethod
    def _decay(f_max: float, f_min: float, step: int, warm_up: int, length: int) -> float:
        return f_min + (f_max - f_min) * (length - step) / length


def _cosine(high: float, low: float, progress: float) -> float:
    return low + 0.5 * (high - low) * (1 + math.cos(progress * math.pi))


def _report(n: int, factor: float, interval: int) -> None:
    if interval > 0 and n % interval == 0:
        print(f"step {n}: learning-rate factor {factor:.6g}")
