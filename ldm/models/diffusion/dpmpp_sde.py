"""DPM++ SDE: a second-order solver of the diffusion SDE, with noise on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ldm.models.diffusion.euler import SigmaSampler
from ldm.models.diffusion.sampler import Run, Steps
from ldm.models.diffusion.schedule import StepCoefficients, time_of


def ancestral_split(sigma: float, sigma_next: float) -> tuple[float, float]:
    """To which level a step goes without noise, and how much is added to come back up."""
    up = min(sigma_next, sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
    return math.sqrt(sigma_next**2 - up**2), up


class DPMppSDESampler(SigmaSampler):
    """DPM-Solver++(S) in its stochastic form, as k-diffusion and the web UIs know it.

    Two model calls a step, the second in its middle (in log sigma); the last step is Euler's. The
    noise of both is that of one Brownian motion along sigma.

    Source: Lu et al. 2022 (arXiv 2211.01095); k-diffusion's sample_dpmpp_sde, eta 1, r 1/2.
    """

    name = "DPM++ SDE"

    def iterate(self, x: Tensor, steps: Sequence[StepCoefficients], run: Run) -> Steps:
        """See Sampler.iterate."""

        def predicted(y: Tensor, sigma: float, t: float) -> Tensor:
            """x_0 from y = x / sqrt(alpha_bar)."""
            alpha_bar = 1 / (1 + sigma**2)
            x0 = y - sigma * run.denoise(y * alpha_bar**0.5, t, alpha_bar)
            return x0 if run.quantize is None else run.quantize(x0)

        def towards(y: Tensor, x0: Tensor, sigma: float, end: float) -> Tensor:
            """The exact solution from sigma to another level, were x_0 constant."""
            return end / sigma * y + (1 - end / sigma) * x0

        for c in steps:
            y = run.blend(x, c) / c.signal
            sigma = c.noise / c.signal
            x0 = predicted(y, sigma, c.t)
            if c.alpha_bar_prev == 1:
                x = x0
            else:
                end = math.sqrt((1 - c.alpha_bar_prev) / c.alpha_bar_prev)
                middle = math.sqrt(sigma * end)
                first, second = run.draw(1.0), run.draw(1.0)
                assert first is not None
                assert second is not None
                whole = (sigma - middle) ** 0.5 * first + (middle - end) ** 0.5 * second
                down, up = ancestral_split(sigma, middle)
                half = towards(y, x0, sigma, down) + up * first
                x0 = predicted(half, middle, time_of(self.model.alphas_cumprod, middle))
                down, up = ancestral_split(sigma, end)
                y = towards(y, x0, sigma, down) + up / (sigma - end) ** 0.5 * whole
                x = c.signal_prev * y
            yield x, x0
