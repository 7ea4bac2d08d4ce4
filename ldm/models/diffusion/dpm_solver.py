"""DPM-Solver++: a second-order multistep solver that predicts x_0."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ldm.models.diffusion.sampler import Run, Sampler, Steps
from ldm.models.diffusion.schedule import (
    StepCoefficients,
    dpm_coefficients,
    sigma_coefficients,
)

# With fewer steps the last one is of first order, which is more stable.
FEW_STEPS = 15


def half_log_snr(alpha_bar: float) -> float:
    """lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)); infinite where there is no noise."""
    if alpha_bar == 1:
        return math.inf
    return 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))


def dpm_step(x: Tensor, x0: Tensor, c: StepCoefficients, slope: Tensor | None = None) -> Tensor:
    """One update x_t -> x_prev, of second order with a slope and else of first.

    With h the growth of lambda in this step:
    x_prev = noise_prev / noise x - signal_prev expm1(-h) (x_0 + slope / 2).

    Args:
        x: current latents, (B, C, h, w), scaled.
        x0: predicted x_0, same shape.
        c: the step's coefficients.
        slope: change of the predicted x_0 for a growth of lambda by h, same shape, or None.

    Returns: x_prev, (B, C, h, w).

    Source: Lu et al. 2022 (arXiv 2211.01095) algorithm 2.
    """
    h = half_log_snr(c.alpha_bar_prev) - half_log_snr(c.alpha_bar)
    estimate = x0 if slope is None else x0 + 0.5 * slope
    return (c.direction / c.noise) * x - c.signal_prev * math.expm1(-h) * estimate


class DPMSolverSampler(Sampler):
    """DPM-Solver++(2M) over times of equal distance, with upstream's interface.

    One model call a step, at fractional times; it draws no noise but x_T. eta must be 0. Unlike
    upstream's it blends a mask, calls back, does image to image and returns intermediate results.
    """

    name = "DPM-Solver"
    # the known region then moves along one path, whose predictions the second order extrapolates
    redraws_mask_noise = False

    def _choose_steps(self, n_steps: int, discretization: str) -> list[StepCoefficients]:
        return dpm_coefficients(self.model.alphas_cumprod, n_steps)

    def _original_steps(self) -> list[StepCoefficients]:
        return self._choose_steps(self.model.num_timesteps, "uniform")

    def iterate(self, x: Tensor, steps: Sequence[StepCoefficients], run: Run) -> Steps:
        """See Sampler.iterate."""
        last: tuple[float, Tensor] | None = None  # lambda and predicted x_0 of the step before
        for i, c in enumerate(steps):
            x = run.blend(x, c)
            x0 = run.predicted(x, c)
            now, after = half_log_snr(c.alpha_bar), half_log_snr(c.alpha_bar_prev)
            is_last_of_few = i == len(steps) - 1 and len(steps) < FEW_STEPS
            slope = None
            if last is not None and not is_last_of_few and after < math.inf:
                slope = (x0 - last[1]) * ((after - now) / (now - last[0]))
            x = dpm_step(x, x0, c, slope)
            last = now, x0
            yield x, x0


class DPMpp2MSampler(DPMSolverSampler):
    """DPM++ 2M as k-diffusion and the web UIs know it: the same solver over other steps.

    They go all the way to no noise, the last one in first order; ``karras`` spacing is theirs.
    """

    name = "DPM++ 2M"

    def _choose_steps(self, n_steps: int, discretization: str) -> list[StepCoefficients]:
        return sigma_coefficients(self.model.alphas_cumprod, n_steps, discretization)
