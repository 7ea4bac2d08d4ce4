"""The first stage: an autoencoder with a Gaussian posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint.files import open_state_dict
from ldm.checkpoint.keys import FIRST_STAGE, canonical_names, same_but_for_ones
from ldm.checkpoint.vae import vae_entries
from ldm.errors import InputError, escaped
from ldm.models.diffusion.arguments import Inert, check_inert
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config

INERT_ARGUMENTS: Inert = {
    "colorize_nlabels": (None,),  # for segmentations
    "ema_decay": (None,),
    "learn_logvar": (False,),
}


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
            as ``loss(x, reconstruction, posterior)``. One with a ``discriminator`` is trained with
            two optimisers, in bfloat16 or float32; see LPIPSWithDiscriminator.
        embed_dim: channels of the latents.
        image_key: where a training batch holds its pictures, (B, H, W, C) in [-1, 1].
        monitor: name of the logged value by which checkpoints are kept.
        scheduler_config: learning-rate schedule, as LatentDiffusion has it.
        ckpt_path: weights to start from: .ckpt or .safetensors.
        ignore_keys: names that begin so are not loaded from it.
        train_encoder: false trains the decoder alone; the latents stay what they are.
        latent_noise: noise on the latents in training, its standard deviation at most this share
            of theirs, each picture's drawn between 0 and that: a decoder that has to do with
            latents that are slightly off learns to draw crisp edges all the same.
        **inert: upstream's arguments that select nothing here; see INERT_ARGUMENTS.

    Raises:
        InputError: an argument is unknown, or has a value that is not supported.

    Source: CompVis and Stability-AI ldm/models/autoencoder.py.
    """

    inert_arguments = tuple(INERT_ARGUMENTS)

    def __init__(
        self,
        ddconfig: dict[str, Any],
        lossconfig: dict[str, Any],
        embed_dim: int,
        image_key: str = "image",
        monitor: str | None = None,
        scheduler_config: dict[str, Any] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        train_encoder: bool = True,
        latent_noise: float = 0.0,
        **inert: Any,
    ) -> None:
        super().__init__()
        check_inert("AutoencoderKL", INERT_ARGUMENTS, inert)
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
        self.train_encoder = train_encoder
        self.latent_noise = latent_noise
        if not train_encoder:
            self.encoder.requires_grad_(False)
            self.quant_conv.requires_grad_(False)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights of this kind of model, or those of the first stage of a diffusion model.

        Args:
            path: .ckpt (read without executing pickled code) or .safetensors, in upstream's names
                or diffusers'.
            ignore_keys: names that begin so are not loaded.

        Raises:
            InputError: there is nothing to load.
        """
        weights, places = open_state_dict(path), self.state_dict()
        named = canonical_names(weights) | vae_entries(weights)
        stored = {name.removeprefix(FIRST_STAGE): raw for name, raw in named.items()}
        wanted = [name for name in places if not name.startswith(tuple(ignore_keys))]
        kept = [name for name in wanted if name in stored]
        weights.require_weights(stored[name] for name in kept if not name.startswith("loss."))
        lost = [name for name in wanted if name not in stored and not name.startswith("loss.")]
        if not kept:
            raise InputError(f"{escaped(path)} has no weights of a first stage in it")
        weights.report_lost(lost)
        state = {name: weights[stored[name]] for name in kept}
        for name, tensor in state.items():  # a 1x1 convolution and a matrix are alike
            if same_but_for_ones(tensor.shape, places[name].shape):
                state[name] = tensor.reshape(places[name].shape)
        self.load_state_dict(state, strict=False)

    def disturbed(self, x: Tensor) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruct pictures for training, from latents with ``latent_noise``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_encoder):
            posterior = self.encode(x)
            z = posterior.sample(torch.randn_like(posterior.mean))
        if self.latent_noise:
            amount = torch.rand(len(z), 1, 1, 1, device=z.device) * self.latent_noise
            z = z + amount * z.detach().float().std() * torch.randn_like(z)
        return self.decode(z), posterior

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
