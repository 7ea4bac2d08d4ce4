"""A discriminator that judges patches of a picture (Isola et al. 2017, arXiv 1611.07004)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ActNorm(nn.Module):
    """Shift and scale of each channel; the first training batch sets them to unit statistics.

    Args:
        num_features: channels.
    """

    initialized: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, num_features, 1, 1))  # state-dict name
        self.scale = nn.Parameter(torch.ones(1, num_features, 1, 1))  # state-dict name
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if self.training and not self.initialized:
            with torch.no_grad():
                self.loc.copy_(-x.mean((0, 2, 3), keepdim=True))
                self.scale.copy_(1 / (x.std((0, 2, 3), keepdim=True) + 1e-6))
                self.initialized.fill_(1)
        return self.scale * (x + self.loc)


class NLayerDiscriminator(nn.Module):
    """Convolutions with stride 2, then one score for each patch; above 0 means real.

    Args:
        input_nc: channels of the input.
        ndf: channels after the first convolution; doubled by each, up to eight times.
        n_layers: convolutions with stride 2.
        use_actnorm: ActNorm in place of batch norm.
    """

    def __init__(
        self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        width = ndf
        for n in range(1, n_layers + 1):
            n_in, width = width, ndf * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            layers += [
                nn.Conv2d(n_in, width, 4, stride, 1, bias=use_actnorm),
                ActNorm(width) if use_actnorm else nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2, True),
            ]
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)  # state-dict name
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) -> scores (B, 1, H', W')."""
        return self.main(x)


def _initialise(module: Any) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's loss of scores: real ones should be above 1, others below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's cross entropy of scores."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
