"""The posterior that a first stage's encoder describes."""

from __future__ import annotations

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """A normal distribution with independent components.

    Args:
        parameters: mean and log-variance, concatenated along dimension 1, (B, 2*C, h, w). The
            log-variance is clamped to [-30, 20].

    Source: CompVis ldm/modules/distributions/distributions.py.
    """

    def __init__(self, parameters: Tensor) -> None:
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviation, (B, C, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Draw a sample, (B, C, h, w).

        Args:
            noise: unit normal of the mean's shape. By default it is drawn on the CPU from the
                global generator, as upstream does on every device.
        """
        if noise is None:
            noise = torch.randn(self.mean.shape)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The most likely value: the mean, (B, C, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the unit normal in nats, summed over each sample, (B,)."""
        variance = self.logvar.exp()
        return 0.5 * (self.mean.square() + variance - 1.0 - self.logvar).sum(dim=(1, 2, 3))
