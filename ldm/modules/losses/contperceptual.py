"""The loss that Stable Diffusion's first stage is trained with.

Absolute error, a perceptual term, the posterior's divergence, and after some steps a discriminator
whose weight follows from the gradients at the decoder's last layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.discriminator import NLayerDiscriminator, hinge_loss, vanilla_loss
from ldm.modules.losses.lpips import LPIPS
from ldm.util import instantiate_from_config

DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}
OWN_NETWORK = {"target": "ldm.demo.perceptual.AttributeFeatures"}


class LPIPSWithDiscriminator(nn.Module):
    """Terms of the autoencoder's loss and of its discriminator's.

    Sums over a picture's values and means over the batch, as upstream.

    Args:
        disc_start: batches before the discriminator takes part.
        logvar_init: of the output's log-variance, a parameter that upstream never trains.
        kl_weight: weight of the posterior's divergence.
        pixelloss_weight: upstream takes and ignores it; here it weights the absolute error.
        disc_num_layers: convolutions with stride 2 of the discriminator.
        disc_in_channels: channels of the pictures.
        disc_factor: weight of everything of the discriminator's; 0 switches it off.
        disc_weight: factor on the adaptive weight.
        perceptual_weight: weight of the perceptual term; 0 needs no network.
        use_actnorm: in the discriminator, in place of batch norm.
        disc_conditional: must be false; upstream's autoencoders never set it.
        disc_loss: ``hinge`` or ``vanilla``.
        disc_channels: of the discriminator's first convolution.
        lpips_path: file of an LPIPS network with its VGG (see LPIPS.load).
        perceptual_config: ``target``/``params`` of a network from pictures to a list of feature
            maps, where there is no LPIPS file; by default the demo's classifier.
        scales: sizes, each half of the one before, at which the absolute error is taken besides
            the full one; the coarse ones settle the colours early.
        edge_weight: weight of the error in differences of neighbours at all these sizes.
        texture_weight: weight of the error in how strong those differences are around each place,
            at the full and at half the size. What cannot be known from the latent, such as
            grain and ripples, the absolute error would have smooth; this wants as much of it.

    Raises:
        InputError: a value is not supported.

    Source: CompVis ldm/modules/losses/contperceptual.py; Esser et al. 2021 (arXiv 2012.09841).
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        disc_channels: int = 64,
        lpips_path: str | None = None,
        perceptual_config: Mapping[str, Any] | None = None,
        scales: int = 0,
        edge_weight: float = 0.0,
        texture_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if disc_loss not in DISCRIMINATOR_LOSSES:
            raise InputError(
                f"disc_loss {disc_loss!r}: choose from {', '.join(DISCRIMINATOR_LOSSES)}"
            )
        if disc_conditional:
            raise InputError("disc_conditional: true is not supported, leave it out")
        self.disc_start = disc_start
        self.kl_weight = kl_weight
        self.pixelloss_weight = pixelloss_weight
        self.disc_factor = disc_factor
        self.disc_weight = disc_weight
        self.perceptual_weight = perceptual_weight
        self.scales = scales
        self.edge_weight = edge_weight
        self.texture_weight = texture_weight
        self.disc_loss = DISCRIMINATOR_LOSSES[disc_loss]
        self.perceptual_loss: LPIPS | FeatureDistance | None = None  # state-dict name
        if perceptual_weight > 0:
            if lpips_path is not None:
                self.perceptual_loss = LPIPS.load(lpips_path)
            else:
                network = instantiate_from_config(perceptual_config or OWN_NETWORK)
                self.perceptual_loss = FeatureDistance(network)
            self.perceptual_loss.eval().requires_grad_(False)
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)))  # state-dict name
        self.discriminator = NLayerDiscriminator(  # state-dict name
            disc_in_channels, disc_channels, disc_num_layers, use_actnorm
        )

    def train(self, mode: bool = True) -> LPIPSWithDiscriminator:
        """Set the mode of the discriminator; the perceptual network stays in evaluation mode."""
        super().train(mode)
        if self.perceptual_loss is not None:
            self.perceptual_loss.eval()
        return self

    def has_started(self, step: int) -> bool:
        """Whether the discriminator takes part in batch ``step``."""
        return self.disc_factor > 0 and step >= self.disc_start

    def reconstruction(self, x: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative log-likelihood, a sum per picture (B,), and its parts, per value.

        Args:
            x: pictures (B, 3, H, W) in [-1, 1].
            reconstruction: of them.
        """
        error = (reconstruction - x).float()
        absolute = error.abs().mean(dim=(1, 2, 3))
        total = self.pixelloss_weight * absolute
        terms = {"rec_loss": absolute.mean().detach()}
        if self.scales or self.edge_weight:
            total = total + self._coarse_and_edges(error)
        if self.texture_weight:
            distance = texture_distance(x, reconstruction)
            total = total + self.texture_weight * distance
            terms["t_loss"] = distance.mean().detach()
        if self.perceptual_loss is not None:
            distance = self.perceptual_loss(x, reconstruction).float().flatten()
            total = total + self.perceptual_weight * distance
            terms["p_loss"] = distance.mean().detach()
        return (total / self.logvar.exp() + self.logvar) * x[0].numel(), terms

    def _coarse_and_edges(self, error: Tensor) -> Tensor:
        total = torch.zeros(len(error), device=error.device)
        for scale in range(self.scales + 1):
            if scale > 0:
                error = F.avg_pool2d(error, 2)
                total = total + error.abs().mean(dim=(1, 2, 3))
            if self.edge_weight:
                rows, columns = error.diff(dim=2).abs(), error.diff(dim=3).abs()
                edges = rows.mean(dim=(1, 2, 3)) + columns.mean(dim=(1, 2, 3))
                total = total + self.edge_weight * edges
        return total

    def forward(
        self,
        x: Tensor,
        reconstruction: Tensor,
        posterior: DiagonalGaussianDistribution,
        step: int = 0,
        last_layer: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Terms of the autoencoder's loss; ``loss`` is their weighted sum.

        Args:
            x: pictures (B, 3, H, W) in [-1, 1].
            reconstruction: of them.
            posterior: of their latents.
            step: batches seen so far.
            last_layer: the decoder's last weight, for the adaptive weight; without it that is 1.
        """
        sums, terms = self.reconstruction(x, reconstruction)
        nll = sums.mean()
        kl = posterior.kl().float().mean()
        loss = nll + self.kl_weight * kl
        if self.has_started(step):
            g_loss = -self.discriminator(reconstruction).float().mean()
            weight = torch.ones(())
            if last_layer is not None and torch.is_grad_enabled():
                weight = adaptive_weight(nll, g_loss, last_layer)
            loss = loss + self.disc_weight * self.disc_factor * weight * g_loss
            terms |= {"g_loss": g_loss.detach(), "d_weight": weight}
        named = {"kl_loss": kl.detach() / x[0].numel(), "nll_loss": nll.detach()}
        return {"loss": loss, **terms, **named}

    def discriminate(self, x: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Terms of the discriminator's loss of pictures and their reconstructions."""
        real = self.discriminator(x.detach()).float()
        fake = self.discriminator(reconstruction.detach()).float()
        return {
            "disc_loss": self.disc_factor * self.disc_loss(real, fake),
            "logits_real": real.mean().detach(),
            "logits_fake": fake.mean().detach(),
        }


def adaptive_weight(nll: Tensor, g_loss: Tensor, last_layer: Tensor) -> Tensor:
    """The ratio of both losses' gradients at the decoder's last layer, 0 to 10000, detached."""
    of_nll = torch.autograd.grad(nll, last_layer, retain_graph=True)[0]
    of_g = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0]
    return (of_nll.norm() / (of_g.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def texture_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference (B,) of two batches' contrast, at the full and at half the size.

    Contrast is the root mean square of neighbours' differences in patches of 8x8.
    """
    total = torch.zeros(len(x), device=x.device)
    for _ in range(2):
        total = total + (_contrast(x) - _contrast(y)).abs().mean(dim=(1, 2, 3))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return total


def _contrast(pictures: Tensor) -> Tensor:
    pictures = pictures.float()
    across = pictures.diff(dim=3)[..., :-1, :]
    down = pictures.diff(dim=2)[..., :-1]
    energy = (across.square() + down.square()).mean(dim=1, keepdim=True)
    return (F.avg_pool2d(energy, 8, 4) + 1e-4).sqrt()  # finite slope where all is smooth


class FeatureDistance(nn.Module):
    """Mean square difference of unit feature vectors, summed over a network's maps.

    Args:
        network: pictures (B, 3, H, W) -> a list of feature maps (B, C, h, w).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,) from two batches of pictures."""
        total = torch.zeros(len(x), device=x.device)
        for a, b in zip(self.network(x), self.network(y), strict=True):
            difference = F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)
            total = total + difference.square().sum(1).mean((1, 2))
        return total
