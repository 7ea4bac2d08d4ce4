"""UniPC: a multistep predictor, and a corrector that costs no model call of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ldm.models.diffusion.dpm_solver import half_log_snr
from ldm.models.diffusion.euler import SigmaSampler
from ldm.models.diffusion.sampler import Run, Steps
from ldm.models.diffusion.schedule import StepCoefficients


def unipc_step(
    x: Tensor,
    x0: Tensor,
    c: StepCoefficients,
    before: tuple[float, Tensor] | None,
    x0_end: Tensor | None = None,
) -> Tensor:
    """One update x_t -> x_prev with B(h) = e^-h - 1: UniP, or UniC where x_0 at its end is known.

    Args:
        x: latents at the step's start, (B, C, h, w), scaled.
        x0: predicted x_0 there.
        c: the step's coefficients.
        before: lambda and predicted x_0 of the step before, for the second order; None: the first.
        x0_end: predicted x_0 at the step's end.

    Source: Zhao et al. 2023 (arXiv 2302.04867) algorithms 1 and 2, data prediction.
    """
    now, after = half_log_snr(c.alpha_bar), half_log_snr(c.alpha_bar_prev)
    step = math.expm1(now - after)  # e^-h - 1
    change = 0.0 * x0
    if before is not None:
        ratio = (before[0] - now) / (after - now)
        slope = (before[1] - x0) / ratio
        if x0_end is None:
            change = slope / 2
        else:
            h = now - after
            first = step / h - 1
            second = 2 * (first / h - 0.5)
            b1, b2 = first / step, second / step
            weight = (b2 - b1) / (ratio - 1)
            change = weight * slope + (b1 - weight) * (x0_end - x0)
    elif x0_end is not None:
        change = (x0_end - x0) / 2
    return (c.direction / c.noise) * x - c.signal_prev * step * (x0 + change)


class UniPCSampler(SigmaSampler):
    """UniPC of the second order (B2, multistep); one model call a step, the last of first order."""

    name = "UniPC"
    redraws_mask_noise = False  # or the extrapolation would see it

    def iterate(self, x: Tensor, steps: Sequence[StepCoefficients], run: Run) -> Steps:
        """See Sampler.iterate."""
        history: list[tuple[float, Tensor]] = []  # lambda and x_0 of the last two steps
        start = x
        for i, c in enumerate(steps):
            x = run.blend(x, c)
            x0 = run.predicted(x, c)
            if i > 0:
                older = history[-2] if len(history) > 1 else None
                x = run.blend(unipc_step(start, history[-1][1], steps[i - 1], older, x0), c)
            start = x
            is_last = c.alpha_bar_prev == 1
            x = unipc_step(x, x0, c, None if is_last or not history else history[-1])
            history = [*history[-1:], (half_log_snr(c.alpha_bar), x0)]
            yield x, x0
