"""Training of the denoiser."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.checkpoint.keys import SCHEDULE
from ldm.errors import InputError, shown
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.guidance import Conditioning
from ldm.training.callbacks import RisenLoss
from ldm.training.module import Training

logger = logging.getLogger(__name__)


class DiffusionTraining(Training):
    """A LatentDiffusion model that learns to predict noise, pictures or v.

    A batch holds pictures under the model's ``first_stage_key``, (B, H, W, C) in [-1, 1], and a
    list of B captions under its ``cond_stage_key``. Where it has a key ``latent``, (B, C, h, w)
    and already multiplied by the scale factor, the pictures are not encoded.

    Args:
        model: to be trained.
        learning_rate: of AdamW.

    Raises:
        InputError: the model's ``ucg_training`` or its conditioning cannot be trained.
    """

    net: LatentDiffusion

    def __init__(self, model: LatentDiffusion, learning_rate: float = 1e-4) -> None:
        super().__init__(model, learning_rate)
        self.blanks = _blanks(model.ucg_training)
        key = model.model.conditioning_key
        if key not in (None, "crossattn"):
            raise InputError(f"conditioning_key {key!r} cannot be trained, only 'crossattn' can")
        encoder = model.cond_stage_model
        if model.cond_stage_trainable and not _has_trainable(encoder):
            logger.warning(
                "cond_stage_trainable: nothing of the text encoder is trained, it is frozen; "
                "cond_stage_config.params.freeze: false would train it"
            )

    def take_over(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The trainer's settings.

        Args:
            settings: of the trainer.

        Raises:
            InputError: schedule and averages would not be kept in 32 bits.
        """
        precision = settings.get("precision", "32-true")
        if precision.endswith("-true") and precision != "32-true":
            raise InputError(
                f"lightning.trainer.precision {precision}: a diffusion model's schedule and "
                "averages need 32 bits; give 32-true, bf16-mixed or 16-mixed"
            )
        return super().take_over(settings)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Into the model; the schedule stays that of the configuration, which may have changed."""
        own = self.net.state_dict()
        kept = {name: own[name] for name in SCHEDULE & own.keys() & state_dict.keys()}
        return super().load_state_dict({**state_dict, **kept}, strict, assign)

    # --- loss -----------------------------------------------------------------------------------

    def get_input(self, batch: Mapping[str, Any]) -> tuple[Tensor, Conditioning]:
        """Latents (B, C, h, w), scaled, and conditioning of a batch."""
        net = self.net
        if "latent" in batch:
            z = batch["latent"].float()
        else:
            z = net.get_first_stage_encoding(net.encode_first_stage(self.pictures(batch)))
        if net.model.conditioning_key is None:
            return z, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and net.cond_stage_trainable):
            return z, net.get_learned_conditioning(batch[net.cond_stage_key])

    def pictures(self, batch: Mapping[str, Any]) -> Tensor:
        """The batch's pictures, (B, 3, H, W) in [-1, 1]."""
        x = rearrange(batch[self.net.first_stage_key], "b h w c -> b c h w")
        return x.float().contiguous()

    def forward(self, x: Tensor, c: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of latents (B, C, h, w) at random steps, and what to log of it."""
        return self.p_losses(x, c, self._random_steps(x.shape[0], x.device))

    def _random_steps(self, n: int, device: torch.device) -> Tensor:
        net = self.net
        if net.timestep_logit_normal is None:
            share = torch.rand(n, device=device) ** net.timestep_power
        else:
            mean, deviation = net.timestep_logit_normal
            share = (mean + deviation * torch.randn(n, device=device)).sigmoid()
        return (share * net.num_timesteps).long().clamp(max=net.num_timesteps - 1)

    def p_losses(
        self, x_start: Tensor, cond: Conditioning, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of latents (B, C, h, w) at steps (B,), and what to log of it.

        Args:
            x_start: latents, scaled.
            cond: as apply_model takes it.
            t: steps.
            noise: unit normal of the latents' shape; drawn by default.
        """
        net = self.net
        noise = torch.randn_like(x_start) if noise is None else noise
        net.begin_batch()
        output = net.apply_model(net.q_sample(x_start, t, noise), t, cond).float()
        if net.parameterization == "eps":
            target = noise
        elif net.parameterization == "v":
            target = net.get_v(x_start, noise, t)
        else:
            target = x_start
        error = output - target
        error = error.abs() if net.loss_type == "l1" else error.square()
        plain = error.mean(dim=(1, 2, 3))
        error = plain * self._snr_weight(t)
        logvar = net.logvar[t]
        loss_simple = (error / logvar.exp() + logvar).mean()
        loss_vlb = (net.lvlb_weights[t] * error).mean()
        loss = net.l_simple_weight * loss_simple + net.original_elbo_weight * loss_vlb
        # without weights, so that runs with and without them can be compared
        terms = {"loss_simple": plain.mean(), "loss_vlb": loss_vlb, "loss": loss}
        return loss, {name: value.detach() for name, value in terms.items()}

    def _snr_weight(self, t: Tensor) -> Tensor:
        """min(SNR, gamma) over the SNR weight that the prediction's kind implies, (B,)."""
        net = self.net
        if net.min_snr_gamma is None:
            return torch.ones_like(net.betas[t])
        snr = net.alphas_cumprod[t] / (1 - net.alphas_cumprod[t])
        implied = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[net.parameterization]
        return snr.clamp(max=net.min_snr_gamma) / implied

    # --- steps ----------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, some of whose captions ``ucg_training`` has blanked."""
        z, c = self.get_input(self._drop_captions(batch))
        self._begin_merging(self.trainer.fit_loop.total_batch_idx)
        loss, terms = self(z, c)
        self.log_terms(terms, "train", batch)
        if self.net.scheduler_config is not None:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log("lr_abs", rate, prog_bar=True, batch_size=len(z))
        return loss

    def _begin_merging(self, number: int) -> None:
        """Token merging keeps nothing of another batch, and draws by this one's number."""
        merger = getattr(self.net.model.diffusion_model, "tome", None)
        if merger is not None:
            merger.begin_run(merger.config.seed + number)

    def _drop_captions(self, batch: dict[str, Any]) -> dict[str, Any]:
        dropped = dict(batch)
        for key, (probability, value) in self.blanks.items():
            if not all(isinstance(entry, str) for entry in batch[key]):
                raise InputError(f"ucg_training.{key}: only captions can be replaced, not these")
            is_dropped = torch.rand(len(batch[key])) < probability
            dropped[key] = [
                value if drop else entry
                for entry, drop in zip(batch[key], is_dropped.tolist(), strict=True)
            ]
        return dropped

    @torch.no_grad()
    def terms(self, batch: dict[str, Any], split: str, index: int) -> dict[str, Tensor]:
        """Terms of the loss, with the averaged weights under names that end in ``_ema``.

        Steps and noise depend on the number of the batch alone: losses of different epochs can
        be compared (upstream draws them anew each time).
        """
        # the trial of a training set finds out whether it has what is to be dropped
        z, c = self.get_input(self._drop_captions(batch) if split == "train" else batch)
        generator = torch.Generator().manual_seed(index)
        t = torch.randint(0, self.net.num_timesteps, (len(z),), generator=generator).to(z.device)
        noise = torch.randn(z.shape, generator=generator).to(z)
        self._begin_merging(index)
        _, terms = self.p_losses(z, c, t, noise)
        if not self.net.use_ema:
            return terms | {f"{name}_ema": value for name, value in terms.items()}
        with self.net.ema_scope():
            self._begin_merging(index)
            _, averaged = self.p_losses(z, c, t, noise)
        return terms | {f"{name}_ema": value for name, value in averaged.items()}

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """With ``scale_by_std``, set the scale factor from the first batch of a new run.

        Of several processes the first one's holds for all; that of a checkpoint which the run
        began with stays.
        """
        net = self.net
        if not net.scale_by_std or self.global_step > 0 or batch_idx > 0 or net.has_loaded_scale:
            return
        assert isinstance(net.scale_factor, Tensor)
        if net.scale_factor != 1.0:
            raise InputError("scale_by_std measures the scale factor: leave scale_factor at 1")
        if "latent" in batch:
            raise InputError("scale_by_std needs pictures: these latents have their scale already")
        z = net.get_first_stage_encoding(net.encode_first_stage(self.pictures(batch)))
        scale = 1.0 / float(z.std())
        net.scale_factor.fill_(self.trainer.strategy.broadcast(scale))

    def configure_callbacks(self) -> list[pl.Callback]:
        """The average follows each step before a checkpoint of it is written."""
        return [RisenLoss(), *([AverageWeights()] if self.net.use_ema else [])]

    def configure_optimizers(self) -> Any:
        """AdamW over the network, the text encoder if it is trained, and a learned logvar."""
        net = self.net
        parameters = list(net.model.parameters())
        if net.cond_stage_trainable:
            parameters += list(net.cond_stage_model.parameters())
        if isinstance(net.logvar, nn.Parameter):
            parameters.append(net.logvar)
        return self.scheduled(torch.optim.AdamW(parameters, lr=self.learning_rate))

    # --- pictures -------------------------------------------------------------------------------

    @torch.no_grad()
    def log_images(
        self,
        batch: dict[str, Any],
        N: int = 4,
        sample: bool = True,
        ddim_steps: int = 50,
        ddim_eta: float = 0.0,
        unconditional_guidance_scale: float = 5.0,
        unconditional_guidance_label: str | list[str] = "",
        use_ema_scope: bool = True,
    ) -> dict[str, Tensor]:
        """Pictures for the image logger, each (B, 3, H, W), about [-1, 1].

        Args:
            batch: a training batch.
            N: how many of it to use, at most.
            sample: whether to draw samples for its captions.
            ddim_steps: steps of sampling.
            ddim_eta: 0 is deterministic.
            unconditional_guidance_scale: above 1 there are guided samples also.
            unconditional_guidance_label: the caption that says nothing, or a list of that one.
            use_ema_scope: draw samples with the averaged weights.

        Returns: ``inputs`` (unless the batch has latents alone), ``reconstruction``, ``samples``
            and ``samples_cfg_scale_X``.
        """
        net = self.net
        keys = {"latent", net.first_stage_key, net.cond_stage_key} & set(batch)
        batch = {key: batch[key][:N] for key in keys}
        z, c = self.get_input(batch)
        pictures = {}
        if net.first_stage_key in batch:
            pictures["inputs"] = self.pictures(batch)
        pictures["reconstruction"] = net.decode_first_stage(z)
        if not sample:
            return pictures
        runs: dict[str, dict[str, Any]] = {"samples": {}}
        if c is not None and unconditional_guidance_scale > 1:
            runs[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = {
                "unconditional_guidance_scale": unconditional_guidance_scale,
                "unconditional_conditioning": net.get_unconditional_conditioning(
                    len(z), unconditional_guidance_label
                ),
            }
        with net.ema_scope("log_images") if use_ema_scope else nullcontext():
            for name, guidance in runs.items():
                latents, _ = DDIMSampler(net).sample(
                    ddim_steps, len(z), z.shape[1:], c, eta=ddim_eta, verbose=False, **guidance
                )
                pictures[name] = net.decode_first_stage(latents)
        return pictures


class AverageWeights(pl.Callback):
    """Moves the average of a diffusion model's weights after each batch."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Move it by one step."""
        assert isinstance(pl_module, DiffusionTraining)
        pl_module.net.model_ema(pl_module.net.model)


def _has_trainable(module: nn.Module | None) -> bool:
    return module is not None and any(p.requires_grad for p in module.parameters())


def _blanks(config: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Of ``ucg_training``: batch key -> (probability, replacement)."""
    rules = {}
    for key, rule in config.items():
        known = rule if isinstance(rule, Mapping) else {}
        probability, value = known.get("p"), known.get("val")
        is_known = not known.keys() - {"p", "val"} and isinstance(value, str | None)
        if not is_known or not isinstance(probability, int | float) or not 0 <= probability <= 1:
            raise InputError(
                f"ucg_training.{key} is {shown(rule)}: it needs p, from 0 to 1, and may have val, "
                "a text"
            )
        rules[key] = (float(probability), value or "")
    return rules
