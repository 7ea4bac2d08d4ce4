"""Training of the first stage."""

from __future__ import annotations

import sys
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL
from ldm.training.module import Training


class AutoencoderTraining(Training):
    """An AutoencoderKL with a loss that is called as ``loss(x, reconstruction, posterior)``.

    A loss with a ``discriminator`` is trained with two optimisers, one step each for a batch.

    Args:
        model: to be trained.
        learning_rate: of both.
    """

    net: AutoencoderKL

    def __init__(self, model: AutoencoderKL, learning_rate: float = 1e-4) -> None:
        super().__init__(model, learning_rate)
        self.automatic_optimization = not hasattr(model.loss, "discriminator")

    def pictures(self, batch: dict[str, Any]) -> Tensor:
        """The batch's pictures, (B, 3, H, W) in [-1, 1]."""
        return rearrange(batch[self.net.image_key], "b h w c -> b c h w").contiguous()

    def terms(self, batch: dict[str, Any], split: str, index: int) -> dict[str, Tensor]:
        """Terms of the loss, and ``psnr`` in dB.

        With a discriminator those of ``train`` are asked for in the trial before a run alone,
        where it is tried, too: however late it begins, it must not fail then.
        """
        x, loss = self.pictures(batch), self.net.loss
        reconstruction, posterior = self.net.disturbed(x) if split == "train" else self.net(x)
        terms = loss(x, reconstruction, posterior)
        is_trial = split == "train" and not self.automatic_optimization
        if is_trial and loss.has_started(sys.maxsize):
            loss.discriminate(x, reconstruction)
        return terms | {"psnr": peak_signal_to_noise(reconstruction, x)}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """Loss of one batch; with a discriminator, one step of each of the two optimisers."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        self.log_terms(self._adversarial_step(self.pictures(batch), batch_idx), "train", batch)
        return None

    def _adversarial_step(self, x: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """One step of the autoencoder; then, once it takes part, one of the discriminator."""
        net, loss, step = self.net, self.net.loss, self.global_step
        both: Any = self.optimizers()
        optimizer, disc_optimizer = both
        loss.discriminator.requires_grad_(False)
        reconstruction, posterior = net.disturbed(x)
        terms = loss(x, reconstruction, posterior, step, net.decoder.conv_out.weight)
        self.step(optimizer, terms["loss"], batch_idx)
        if loss.has_started(step):
            loss.discriminator.requires_grad_(True)
            terms |= loss.discriminate(x, reconstruction)
            self.step(disc_optimizer, terms["disc_loss"], batch_idx, counts=False)
        schedules: Any = self.lr_schedulers() or ()
        if self.global_step > step:
            for schedule in schedules:
                schedule.step()
        terms = terms | {"psnr": peak_signal_to_noise(reconstruction, x)}
        return {name: value.detach() for name, value in terms.items()}

    def configure_optimizers(self) -> Any:
        """Adam over what is trained, with the schedule if there is one.

        A discriminator has one of its own; upstream's betas then hold for both.
        """
        net, rate = self.net, self.learning_rate
        own = [p for n, p in net.named_parameters() if p.requires_grad and n[:5] != "loss."]
        if self.automatic_optimization:
            return self.scheduled(torch.optim.Adam(own, lr=rate))
        optimizers = [
            torch.optim.Adam(parameters, lr=rate, betas=(0.5, 0.9))
            for parameters in (own, list(net.loss.discriminator.parameters()))
        ]
        if net.scheduler_config is None:
            return optimizers, []
        schedules = [self.scheduled(each)[1][0] for each in optimizers]
        return optimizers, schedules

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], N: int = 4) -> dict[str, Tensor]:
        """Pictures for the image logger: N inputs and their reconstructions."""
        x = self.pictures(batch)[:N]
        return {"inputs": x, "reconstructions": self.net.decode(self.net.encode(x).mode())}


def peak_signal_to_noise(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean over pictures (B, 3, H, W) in [-1, 1], in dB; identical ones have 100."""
    error = (reconstruction.detach().float().clamp(-1, 1) - x).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=4e-10)).mean()  # the range is 2
