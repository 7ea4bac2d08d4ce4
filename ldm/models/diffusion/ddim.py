"""DDIM: denoising diffusion implicit models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ldm.models.diffusion.sampler import Run, Sampler, Steps
from ldm.models.diffusion.schedule import StepCoefficients


def ddim_step(
    x: Tensor,
    eps: Tensor,
    c: StepCoefficients,
    noise: Tensor | None = None,
    quantize: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One DDIM update x_t -> x_prev.

    x_0 = (x - sqrt(1 - a) eps) / sqrt(a);
    x_prev = sqrt(a_prev) x_0 + sqrt(1 - a_prev - sigma^2) eps + sigma noise.

    Args:
        x: current latents, (B, C, h, w), scaled.
        eps: predicted noise, same shape; unit variance.
        c: the step's coefficients.
        noise: unit normal, same shape; None only if c.sigma == 0.
        quantize: applied to the predicted x_0, or None.

    Returns: (x_prev, predicted x_0), both (B, C, h, w).

    Raises:
        ValueError: noise is None while c.sigma > 0.

    Source: Song et al. 2021 (arXiv 2010.02502) eq. 12.
    """
    x0 = (x - c.noise * eps) / c.signal
    if quantize is not None:
        x0 = quantize(x0)
    x_prev = c.signal_prev * x0 + c.direction * eps
    if c.sigma > 0:
        if noise is None:
            raise ValueError(f"sigma is {c.sigma}: the step needs noise")
        x_prev = x_prev + c.sigma * noise
    return x_prev, x0


class DDIMSampler(Sampler):
    """DDIM with upstream's interface and, for a given seed, upstream's pictures.

    ``stochastic_encode(x0, t)`` adds the noise of step t, though ``decode`` of t steps begins at
    step t-1: upstream's mistake, which leaves noise in the picture where steps are few. Without
    ``encodes_as_upstream`` it adds that of step t-1.
    """

    name = "DDIM Sampler"
    fixed_eta = None

    def iterate(self, x: Tensor, steps: Sequence[StepCoefficients], run: Run) -> Steps:
        """See Sampler.iterate."""
        for c in steps:
            x = run.blend(x, c)
            eps = run.denoise(x, c.t, c.alpha_bar)
            x, x0 = ddim_step(x, eps, c, run.draw(c.sigma), run.quantize)
            yield x, x0

    def _upstream_levels(self, steps: list[StepCoefficients]) -> list[float]:
        return [c.alpha_bar for c in steps]
