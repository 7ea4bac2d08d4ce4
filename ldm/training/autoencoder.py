"""Training of the first stage."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL
from ldm.training.module import Training


class AutoencoderTraining(Training):
    """An AutoencoderKL with a loss that is called as ``loss(x, reconstruction, posterior)``."""

    net: AutoencoderKL

    def pictures(self, batch: dict[str, Any]) -> Tensor:
        """The batch's pictures, (B, 3, H, W) in [-1, 1]."""
        return rearrange(batch[self.net.image_key], "b h w c -> b c h w").contiguous()

    def terms(self, batch: dict[str, Any], split: str, index: int) -> dict[str, Tensor]:
        """Terms of the loss, and ``psnr`` in dB."""
        x = self.pictures(batch)
        reconstruction, posterior = self.net(x)
        terms = self.net.loss(x, reconstruction, posterior)
        return terms | {"psnr": peak_signal_to_noise(reconstruction, x)}

    def configure_optimizers(self) -> Any:
        """AdamW over all parameters, with the schedule if there is one."""
        parameters = self.net.parameters()
        return self.scheduled(
            torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=1e-4)
        )

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], N: int = 4) -> dict[str, Tensor]:
        """Pictures for the image logger: N inputs and their reconstructions."""
        x = self.pictures(batch)[:N]
        return {"inputs": x, "reconstructions": self.net.decode(self.net.encode(x).mode())}


def peak_signal_to_noise(reconstruction: Tensor, x: Tensor) -> Tensor:
    """In dB, of pictures in [-1, 1]."""
    error = F.mse_loss(reconstruction.detach().float().clamp(-1, 1), x)
    return 10 * torch.log10(4 / error)  # the range is 2
