"""LCM: multistep sampling from a latent consistency model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ldm.models.diffusion.euler import SigmaSampler
from ldm.models.diffusion.sampler import Run, Steps
from ldm.models.diffusion.schedule import StepCoefficients


class LCMSampler(SigmaSampler):
    """Each step predicts x_0 and adds fresh noise up to the next level.

    For models distilled for it, or with an LCM-LoRA: 4 to 8 steps, guidance 1 to 2.

    Source: Luo et al. 2023 (arXiv 2310.04378) algorithm 3 in the appendix, after Song et al. 2023
    (arXiv 2303.01469) algorithm 1.
    """

    name = "LCM"

    def iterate(self, x: Tensor, steps: Sequence[StepCoefficients], run: Run) -> Steps:
        """See Sampler.iterate."""
        for c in steps:
            x = run.blend(x, c)
            x0 = run.predicted(x, c)
            x = c.signal_prev * x0
            fresh = run.draw((1 - c.alpha_bar_prev) ** 0.5) if c.alpha_bar_prev < 1 else None
            if fresh is not None:
                x = x + (1 - c.alpha_bar_prev) ** 0.5 * fresh
            yield x, x0
