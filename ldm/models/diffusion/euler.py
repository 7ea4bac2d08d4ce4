"""Euler's method, plain and ancestral."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ldm.models.diffusion.ddim import ddim_step
from ldm.models.diffusion.sampler import Run, Sampler, Steps
from ldm.models.diffusion.schedule import StepCoefficients, sigma_coefficients


class SigmaSampler(Sampler):
    """Base of the samplers that step through sigma, all the way to no noise.

    sigma is the standard deviation of the noise in x / sqrt(alpha_bar). `make_schedule` takes the
    spacings of `sigma_coefficients`.
    """

    def _choose_steps(self, n_steps: int, discretization: str) -> list[StepCoefficients]:
        alpha_bar = self.model.alphas_cumprod
        return sigma_coefficients(alpha_bar, n_steps, discretization, self.eta)


class EulerSampler(SigmaSampler):
    """Euler's method on the probability flow, all the way to no noise.

    For x / sqrt(alpha_bar), whose noise has the standard deviation sigma, a step adds
    (sigma_prev - sigma) times the predicted noise. In terms of x that is DDIM's step; k-diffusion's
    Euler differs in where the steps lie.

    Source: Karras et al. 2022 (arXiv 2206.00364) algorithm 1, without churn.
    """

    name = "Euler"

    def iterate(self, x: Tensor, steps: Sequence[StepCoefficients], run: Run) -> Steps:
        """See Sampler.iterate."""
        for c in steps:
            x = run.blend(x, c)
            eps = run.denoise(x, c.t, c.alpha_bar)
            noise = run.draw(c.sigma) if c.sigma > 0 else None
            x, x0 = ddim_step(x, eps, c, noise, run.quantize)
            yield x, x0


class EulerAncestralSampler(EulerSampler):
    """Euler's method to a level below the next one, and fresh noise back up to it.

    The share of fresh noise is that of ancestral sampling, which is DDIM's with eta = 1.
    """

    name = "Euler a"
    fixed_eta = 1.0
