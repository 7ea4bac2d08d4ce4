"""Heun's method: Euler's, with the mean of the slopes at both ends of a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from torch import Tensor

from ldm.models.diffusion.ddim import ddim_step
from ldm.models.diffusion.euler import SigmaSampler
from ldm.models.diffusion.sampler import Run, Steps
from ldm.models.diffusion.schedule import StepCoefficients


class HeunSampler(SigmaSampler):
    """Two model calls a step, one in the last, which ends without noise.

    Source: Karras et al. 2022 (arXiv 2206.00364) algorithm 1, without churn.
    """

    name = "Heun"

    def iterate(self, x: Tensor, steps: Sequence[StepCoefficients], run: Run) -> Steps:
        """See Sampler.iterate."""
        for c, after in zip_longest(steps, steps[1:]):
            x = run.blend(x, c)
            eps = run.denoise(x, c.t, c.alpha_bar)
            if after is not None:
                end, _ = ddim_step(x, eps, c, None, run.quantize)
                eps = (eps + run.denoise(end, after.t, after.alpha_bar)) / 2
            x, x0 = ddim_step(x, eps, c, None, run.quantize)
            yield x, x0
