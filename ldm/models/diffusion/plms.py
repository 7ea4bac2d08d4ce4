"""PLMS: pseudo linear multi-step sampling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ldm.models.diffusion.ddim import ddim_step
from ldm.models.diffusion.sampler import Run, Sampler, Steps
from ldm.models.diffusion.schedule import StepCoefficients

# Adams-Bashforth weights of the newest prediction, the one before, ...; by length of the history.
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PLMSSampler(Sampler):
    """PLMS with upstream's interface: DDIM steps along a prediction made of the last four.

    The first step averages the predictions at its two ends, so there is one model call more than
    there are steps. eta must be 0. Unlike upstream's it takes any parameterisation and
    conditioning, and does image to image.

    Source: Liu et al. 2022 (arXiv 2202.09778) eq. 11 and 12.
    """

    name = "PLMS Sampler"

    def iterate(self, x: Tensor, steps: Sequence[StepCoefficients], run: Run) -> Steps:
        """See Sampler.iterate."""
        history: list[Tensor] = []  # newest first
        for i, c in enumerate(steps):
            x = run.blend(x, c)
            eps = run.denoise(x, c.t, c.alpha_bar)
            history = [eps, *history[:3]]
            if i == 0:
                end = steps[min(1, len(steps) - 1)]
                x_end, _ = ddim_step(x, eps, c, run.draw(c.sigma), run.quantize)
                combined = (eps + run.denoise(x_end, end.t, end.alpha_bar)) / 2
            else:
                weights = ADAMS_BASHFORTH[len(history)]
                combined = sum(
                    (w * e for w, e in zip(weights[1:], history[1:], strict=True)),
                    start=weights[0] * eps,
                )
            x, x0 = ddim_step(x, combined, c, run.draw(c.sigma), run.quantize)
            yield x, x0
