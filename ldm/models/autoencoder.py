"""The first stage: an autoencoder with a Gaussian posterior."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config


class ReconstructionLoss(nn.Module):
    """Absolute error at four scales, of pixels and of differences between neighbours.

    The coarse scales settle the colours early, the differences keep edges and texture sharp; both
    without a second network.

    Args:
        kl_weight: weight of the posterior's divergence per picture element.
        edge_weight: weight of the differences.
    """

    def __init__(self, kl_weight: float = 1e-6, edge_weight: float = 0.5) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.edge_weight = edge_weight

    def forward(
        self, x: Tensor, reconstruction: Tensor, posterior: DiagonalGaussianDistribution
    ) -> dict[str, Tensor]:
        """Terms of the loss of pictures (B, 3, H, W) in [-1, 1]; ``loss`` is their sum."""
        error = (reconstruction - x).float()
        rec_loss = error.abs().mean()
        kl = posterior.kl().float().mean() / x[0].numel()
        loss = self.kl_weight * kl
        for scale in range(4):
            if scale > 0:
                error = F.avg_pool2d(error, 2)
            edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
            loss = loss + error.abs().mean() + self.edge_weight * edges
        return {"loss": loss, "rec_loss": rec_loss.detach(), "kl_loss": kl.detach()}


class AutoencoderKL(nn.Module):
    """Pictures <-> latents; ``f`` pixels a side make one latent.

    Args:
        ddconfig: arguments of encoder and decoder; ``double_z`` must be true.
        lossconfig: ``target`` of the training loss (``torch.nn.Identity`` for inference); called
            as ``loss(x, reconstruction, posterior)``.
        embed_dim: channels of the latents.
        image_key: where a training batch holds its pictures, (B, H, W, C) in [-1, 1].
        monitor: name of the logged value by which checkpoints are kept.
        scheduler_config: learning-rate schedule, as LatentDiffusion has it.

    Upstream's other arguments (``ckpt_path``, ``ignore_keys``, ``colorize_nlabels``) belong to
    its own training script and are not needed to use its files.

    Source: CompVis ldm/models/autoencoder.py.
    """

    def __init__(
        self,
        ddconfig: dict[str, Any],
        lossconfig: dict[str, Any],
        embed_dim: int,
        image_key: str = "image",
        monitor: str | None = None,
        scheduler_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not ddconfig.get("double_z", True):
            raise ValueError("AutoencoderKL needs ddconfig.double_z: true")
        self.image_key = image_key
        self.monitor = monitor
        self.scheduler_config = scheduler_config
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig, nn.Module)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.f = 2 ** (len(ddconfig["ch_mult"]) - 1)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Pictures in [-1, 1], (B, 3, H, W) -> posterior of latents (B, C, H/f, W/f)."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) -> pictures, about [-1, 1], (B, 3, h*f, w*f)."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruct pictures from a sample of their posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(torch.randn_like(posterior.mean))), posterior


class IdentityFirstStage(nn.Module):
    """A first stage for models that work on pixels."""

    def encode(self, x: Tensor) -> Tensor:
        """Return the pictures."""
        return x

    def decode(self, z: Tensor) -> Tensor:
        """Return the latents."""
        return z
