"""The latent diffusion model: first stage, text encoder, denoiser and noise schedule in one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.checkpoint.files import open_state_dict
from ldm.errors import InputError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.guidance import PARAMETERIZATIONS, Conditioning
from ldm.models.diffusion.schedule import (
    make_beta_schedule,
    schedule_buffers,
    variational_weights,
)
from ldm.modules.attention import remember_context
from ldm.modules.ema import LitEma
from ldm.modules.tome.merger import TokenMerger
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")
# Arguments of upstream's configurations that select something which is not included. The values
# are the ones that mean "without it"; None allows every value, as the argument changes nothing.
INERT_ARGUMENTS: dict[str, tuple[Any, ...] | None] = {
    "num_timesteps_cond": (None, 1),
    "cond_stage_forward": (None,),
    "use_positional_encodings": (False,),
    "make_it_fit": (False,),
    "reset_ema": (False,),
    "reset_num_ema_updates": (False,),
    "finetune_keys": (None,),
    "clip_denoised": None,
    "log_every_t": None,
}


class DiffusionWrapper(nn.Module):
    """The denoising network, and how a conditioning reaches it.

    Args:
        diff_model_config: ``target`` and ``params`` of the network.
        conditioning_key: ``concat`` joins it to the input's channels, ``crossattn`` makes it the
            attention's context, ``adm`` a class embedding; ``hybrid`` is concat and crossattn,
            ``hybrid-adm`` and ``crossattn-adm`` likewise; None is without.

    Raises:
        InputError: the key is none of these.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            names = ", ".join(str(key) for key in CONDITIONING_KEYS)
            raise InputError(f"conditioning_key {conditioning_key!r}: choose from {names}")
        self.conditioning_key = conditioning_key
        self.diffusion_model = instantiate_from_config(diff_model_config)  # state-dict name

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """Output of the network.

        Args:
            x: noisy latents, (B, C, h, w).
            t: steps, (B,).
            c_concat: further channels, each (B, *, h, w).
            c_crossattn: contexts, each (B, L, width), joined along L; for ``adm`` the first one
                is the class.
            c_adm: class or vector, for the keys that end in -adm.

        Raises:
            ValueError: a part that the conditioning key needs is missing.
        """
        key = self.conditioning_key
        if key is None:
            return self.diffusion_model(x, t)
        if "concat" in key or "hybrid" in key:
            x = torch.cat([x, *_given("c_concat", c_concat, key)], dim=1)
        if key == "concat":
            return self.diffusion_model(x, t)
        crossattn = _given("c_crossattn", c_crossattn, key)
        if key == "adm":
            return self.diffusion_model(x, t, y=crossattn[0])
        # One context stays the tensor that it is, so that the network can know it again.
        context = crossattn[0] if len(crossattn) == 1 else torch.cat(list(crossattn), dim=1)
        if key.endswith("-adm"):
            return self.diffusion_model(x, t, context=context, y=_given("c_adm", c_adm, key))
        return self.diffusion_model(x, t, context=context)


def _given(name: str, value: Any, key: str) -> Any:
    if value is None:
        raise ValueError(f"conditioning_key {key!r} needs {name}")
    return value


class LatentDiffusion(pl.LightningModule):
    """A diffusion model in the latent space of a first stage.

    Every argument has upstream's name. A training batch holds pictures under ``first_stage_key``,
    (B, H, W, C) in [-1, 1], and a list of B captions under ``cond_stage_key``. Where it has a key
    ``latent``, (B, C, h, w) and already multiplied by the scale factor, the pictures are not
    encoded.

    Args:
        first_stage_config: the autoencoder; frozen.
        cond_stage_config: the text encoder, or ``__is_first_stage__`` or ``__is_unconditional__``.
        unet_config: the denoising network.
        timesteps: number of training steps T.
        beta_schedule: see make_beta_schedule, as for linear_start, linear_end and cosine_s.
        linear_start: first beta.
        linear_end: last beta.
        cosine_s: offset of the cosine schedule.
        given_betas: betas to use in place of a schedule, (T,).
        v_posterior: see schedule_buffers.
        parameterization: what the network predicts: ``eps``, ``x0`` or ``v``.
        loss_type: ``l2`` or ``l1``.
        l_simple_weight: weight of the plain loss.
        original_elbo_weight: weight of the loss weighted as in the variational bound.
        learn_logvar: learn a log-variance of the loss for each step.
        logvar_init: its first value.
        timestep_power: training draws its steps as T * u^power with u uniform in [0, 1); below 1
            there are more of the noisy ones, in which a picture is laid out.
        min_snr_gamma: weight each step's loss by min(SNR, gamma) in terms of x_0, after
            Hang et al. 2023 (arXiv 2303.09556); None weights by what the network predicts.
        use_ema: keep an average of the network's weights.
        first_stage_key: where a batch has its pictures.
        cond_stage_key: where a batch has its captions.
        cond_stage_trainable: train the text encoder along.
        conditioning_key: see DiffusionWrapper; by default concat or crossattn by concat_mode.
        concat_mode: see conditioning_key.
        force_null_conditioning: keep the conditioning key though there is no text encoder.
        scale_factor: latents are multiplied by it, to have about unit variance.
        scale_by_std: measure that on the first training batch.
        image_size: side of the latents, in latents; a number, or [h, w].
        channels: of the latents.
        monitor: name of the logged value by which checkpoints are kept.
        scheduler_config: learning-rate schedule.
        ckpt_path: weights to start from: .ckpt, .safetensors, or a folder of the latter.
        ignore_keys: names that begin so are not loaded from it.
        load_only_unet: load only the denoising network from it.
        ucg_training: batch key -> {p, val}: with probability p an entry is replaced by val (the
            empty string by default), so that the model learns guidance.
        **inert: upstream's arguments that select nothing here; see INERT_ARGUMENTS.

    Attributes:
        learning_rate: of the optimiser; the training script sets it.
        model: the DiffusionWrapper.

    Raises:
        InputError: an argument is unknown, or has a value that is not supported.

    Sources: Rombach et al. 2022 (arXiv 2112.10752); CompVis and Stability-AI ddpm.py.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    lvlb_weights: Tensor
    logvar: Tensor
    scale_factor: float | Tensor
    first_stage_model: Any
    cond_stage_model: Any

    def __init__(
        self,
        first_stage_config: Any,
        cond_stage_config: Any,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        v_posterior: float = 0.0,
        parameterization: str = "eps",
        loss_type: str = "l2",
        l_simple_weight: float = 1.0,
        original_elbo_weight: float = 0.0,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        timestep_power: float = 1.0,
        min_snr_gamma: float | None = None,
        use_ema: bool = True,
        first_stage_key: str = "image",
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        conditioning_key: str | None = None,
        concat_mode: bool = True,
        force_null_conditioning: bool = False,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        image_size: int | Sequence[int] = 256,
        channels: int = 3,
        monitor: str | None = "val/loss",
        scheduler_config: Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        ucg_training: Mapping[str, Mapping[str, Any]] | None = None,
        **inert: Any,
    ) -> None:
        super().__init__()
        _check_inert(inert)
        _check_choice("parameterization", parameterization, PARAMETERIZATIONS)
        _check_choice("loss_type", loss_type, ("l2", "l1"))
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == "__is_unconditional__" and not force_null_conditioning:
            conditioning_key = None
        self.parameterization = parameterization
        self.loss_type = loss_type
        self.l_simple_weight = l_simple_weight
        self.original_elbo_weight = original_elbo_weight
        self.timestep_power = timestep_power
        self.min_snr_gamma = min_snr_gamma
        self.use_ema = use_ema
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.image_size = image_size
        self.channels = channels
        self.monitor = monitor
        self.scheduler_config = scheduler_config
        self.ucg_training = _check_ucg_training(ucg_training or {})
        self.learning_rate = 1e-4

        # Upstream's order of construction: with a seed, it decides the initial weights.
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        if use_ema:
            self.model_ema = LitEma(self.model)
        self.v_posterior = v_posterior
        if given_betas is None:
            self.given_betas = make_beta_schedule(
                beta_schedule, timesteps, linear_start, linear_end, cosine_s
            )
        else:
            self.given_betas = np.asarray(given_betas, dtype=np.float64)
        self.num_timesteps = len(self.given_betas)
        self.logvar_init = float(logvar_init)
        if learn_logvar:
            self.logvar = nn.Parameter(torch.full((self.num_timesteps,), self.logvar_init))
        for name, buffer in self._schedule().items():
            self.register_buffer(name, buffer, persistent=name not in ("lvlb_weights", "logvar"))
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        else:
            self.scale_factor = scale_factor

        self.first_stage_model = _frozen(instantiate_from_config(first_stage_config))
        if cond_stage_config == "__is_first_stage__":
            self.cond_stage_model = self.first_stage_model
        else:
            self.cond_stage_model = instantiate_from_config(cond_stage_config)
            if self.cond_stage_model is not None and not cond_stage_trainable:
                _frozen(self.cond_stage_model)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    # --- schedule -------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the schedule is; unlike Lightning's it follows a module built on ``meta``."""
        return self.betas.device

    def _schedule(self) -> dict[str, Tensor]:
        """The buffers that have a value for each step, always on the CPU."""
        buffers = schedule_buffers(self.given_betas, self.v_posterior)
        buffers["lvlb_weights"] = variational_weights(self.given_betas, self.parameterization)
        if not isinstance(getattr(self, "logvar", None), nn.Parameter):
            buffers["logvar"] = torch.full((self.num_timesteps,), self.logvar_init, device="cpu")
        return buffers

    def reset_schedule(self, device: torch.device | str = "cpu") -> None:
        """Compute the schedule's buffers anew, on a device."""
        for name, buffer in self._schedule().items():
            setattr(self, name, buffer.to(device))

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise.

        Args:
            x_start: latents, (B, C, h, w), scaled.
            t: steps, (B,).
            noise: unit normal of their shape; drawn by default.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        return self._at("sqrt_alphas_cumprod", t) * x_start + (
            self._at("sqrt_one_minus_alphas_cumprod", t) * noise
        )

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 = x_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) noise."""
        return self._at("sqrt_recip_alphas_cumprod", t) * x_t - (
            self._at("sqrt_recipm1_alphas_cumprod", t) * noise
        )

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
        return self._at("sqrt_alphas_cumprod", t) * x_t - (
            self._at("sqrt_one_minus_alphas_cumprod", t) * v
        )

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Noise = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t."""
        return self._at("sqrt_alphas_cumprod", t) * v + (
            self._at("sqrt_one_minus_alphas_cumprod", t) * x_t
        )

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0."""
        return self._at("sqrt_alphas_cumprod", t) * noise - (
            self._at("sqrt_one_minus_alphas_cumprod", t) * x
        )

    def _at(self, name: str, t: Tensor) -> Tensor:
        """A buffer's values at steps t, (B, 1, 1, 1)."""
        return getattr(self, name)[t].reshape(-1, 1, 1, 1)

    # --- stages ---------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Set the mode of what is trained; frozen stages stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def begin_run(self, is_guided: bool = False) -> None:
        """Start a sampling run: what token merging remembers of the last one is forgotten.

        Args:
            is_guided: batches have two halves, for classifier-free guidance.
        """
        if self._tome is not None:
            self._tome.begin_run()
            self._tome.is_guided = is_guided
        remember_context(self.model)

    def end_run(self) -> None:
        """End a sampling run; what attention remembers of its prompts is forgotten."""
        if self._tome is not None:
            self._tome.is_guided = False
        remember_context(self.model, False)

    @property
    def _tome(self) -> TokenMerger | None:
        """Token merging in the network, if it has that."""
        return getattr(self.model.diffusion_model, "tome", None)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's output for noisy latents (B, C, h, w) at steps (B,).

        Args:
            x_noisy: noisy latents.
            t: steps; fractions are allowed.
            cond: a dict of c_concat, c_crossattn (lists of tensors) and c_adm, or a tensor or
                list that is the one part which the conditioning key calls for, or None.
        """
        if cond is None:
            return self.model(x_noisy, t)
        if not isinstance(cond, Mapping):
            name = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {name: cond if isinstance(cond, (list, tuple)) else [cond]}
        return self.model(x_noisy, t, **cond)

    def get_learned_conditioning(self, c: Any) -> Conditioning:
        """Encode a conditioning: B captions -> (B, L, width)."""
        encode = getattr(self.cond_stage_model, "encode", self.cond_stage_model)
        encoded = encode(c)
        is_posterior = not isinstance(encoded, Tensor) and hasattr(encoded, "mode")
        return encoded.mode() if is_posterior else encoded

    def get_unconditional_conditioning(self, batch_size: int, null_label: str = "") -> Conditioning:
        """The encoding of a caption that says nothing, batch_size times."""
        return self.get_learned_conditioning([null_label] * batch_size)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Pictures (B, 3, H, W) in [-1, 1] -> the first stage's posterior."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(
        self, encoder_posterior: Any, noise: Tensor | None = None
    ) -> Tensor:
        """Scaled latents (B, C, h, w) from a posterior, or from unscaled latents.

        Args:
            encoder_posterior: result of encode_first_stage.
            noise: unit normal for the posterior's sample; by default drawn by the posterior.
        """
        if not isinstance(encoder_posterior, Tensor):
            encoder_posterior = encoder_posterior.sample(noise)
        return self.scale_factor * encoder_posterior

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W), about [-1, 1]."""
        return self.first_stage_model.decode(z / self.scale_factor)

    # --- weights --------------------------------------------------------------------------------

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Use the averaged weights inside; without an average, nothing changes.

        Args:
            context: what for; logged.
        """
        if not self.use_ema:
            yield
            return
        if context is not None:
            logger.info("%s: averaged weights", context)
        with self.model_ema.applied_to(self.model):
            yield

    def init_from_ckpt(
        self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False
    ) -> None:
        """Load what a training run or a published file has of this model's weights.

        Args:
            path: .ckpt (read without executing pickled code), .safetensors, or a folder of them.
            ignore_keys: names that begin so are not loaded.
            only_model: load only the denoising network.

        Raises:
            InputError: there is nothing to load.
        """
        weights = open_state_dict(path)
        names = [name for name in weights if not name.startswith(tuple(ignore_keys))]
        if only_model:
            names = [name for name in names if name.startswith("model.diffusion_model.")]
        state = {name: weights[name] for name in names}
        missing, unexpected = self.load_state_dict(state, strict=False)
        counts = len(state), len(missing), len(unexpected)
        logger.info("%s: %d tensors, %d missing, %d without a place", path, *counts)

    # --- training -------------------------------------------------------------------------------

    def get_input(self, batch: Mapping[str, Any]) -> tuple[Tensor, Conditioning]:
        """Latents (B, C, h, w), scaled, and conditioning of a training batch.

        Raises:
            InputError: the conditioning key is one that only sampling supports.
        """
        if "latent" in batch:
            z = batch["latent"].float()
        else:
            x = rearrange(batch[self.first_stage_key], "b h w c -> b c h w").float()
            z = self.get_first_stage_encoding(self.encode_first_stage(x.contiguous()))
        key = self.model.conditioning_key
        if key is None:
            return z, None
        if key != "crossattn":
            raise InputError(f"conditioning_key {key!r} cannot be trained, only 'crossattn' can")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cond_stage_trainable):
            return z, self.get_learned_conditioning(batch[self.cond_stage_key])

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
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond).float()
        if self.parameterization == "eps":
            target = noise
        elif self.parameterization == "v":
            target = self.get_v(x_start, noise, t)
        else:
            target = x_start
        error = output - target
        error = error.abs() if self.loss_type == "l1" else error.square()
        error = error.mean(dim=(1, 2, 3)) * self._snr_weight(t)
        logvar = self.logvar[t]
        loss_simple = (error / logvar.exp() + logvar).mean()
        loss_vlb = (self.lvlb_weights[t] * error).mean()
        loss = self.l_simple_weight * loss_simple + self.original_elbo_weight * loss_vlb
        terms = {"loss_simple": error.mean(), "loss_vlb": loss_vlb, "loss": loss}
        return loss, {name: value.detach() for name, value in terms.items()}

    def _snr_weight(self, t: Tensor) -> Tensor:
        """min(SNR, gamma) over the SNR weight that the prediction's kind implies, (B,)."""
        if self.min_snr_gamma is None:
            return torch.ones_like(self.betas[t])
        snr = self.alphas_cumprod[t] / (1 - self.alphas_cumprod[t])
        implied = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[self.parameterization]
        return snr.clamp(max=self.min_snr_gamma) / implied

    def forward(
        self, x: Tensor, c: Conditioning, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of latents (B, C, h, w) at random steps, and what to log of it."""
        share = torch.rand(x.shape[0], device=self.device) ** self.timestep_power
        return self.p_losses(x, c, (share * self.num_timesteps).long(), noise)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, some of whose captions ``ucg_training`` has blanked."""
        z, c = self.get_input(self._drop_captions(batch))
        loss, terms = self(z, c)
        self.log_dict(
            {f"train/{name}": value for name, value in terms.items()},
            prog_bar=True,
            batch_size=len(z),
        )
        if self.scheduler_config is not None:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log("lr_abs", rate, prog_bar=True, batch_size=len(z))
        return loss

    def _drop_captions(self, batch: dict[str, Any]) -> dict[str, Any]:
        dropped = dict(batch)
        for key, (probability, value) in self.ucg_training.items():
            is_dropped = torch.rand(len(batch[key])) < probability
            dropped[key] = [
                value if drop else entry
                for entry, drop in zip(batch[key], is_dropped.tolist(), strict=True)
            ]
        return dropped

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss of one batch, with the averaged weights under names that end in ``_ema``.

        Steps and noise depend on the number of the batch alone: losses of different epochs can
        be compared (upstream draws them anew each time).
        """
        z, c = self.get_input(batch)
        generator = torch.Generator().manual_seed(batch_idx)
        t = torch.randint(0, self.num_timesteps, (len(z),), generator=generator).to(z.device)
        noise = torch.randn(z.shape, generator=generator).to(z)
        _, terms = self.p_losses(z, c, t, noise)
        with self.ema_scope():
            averaged = self.p_losses(z, c, t, noise)[1] if self.use_ema else terms
        named = {f"val/{name}": value for name, value in terms.items()}
        named |= {f"val/{name}_ema": value for name, value in averaged.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=len(z))

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """With ``scale_by_std``, set the scale factor from the first batch of a new run."""
        if self.scale_by_std and self.global_step == 0 and batch_idx == 0:
            if self.scale_factor != 1.0:
                raise InputError("scale_by_std measures the scale factor: leave scale_factor at 1")
            x = rearrange(batch[self.first_stage_key], "b h w c -> b c h w").float()
            z = self.get_first_stage_encoding(self.encode_first_stage(x))
            self.scale_factor = 1.0 / z.flatten().std().detach()

    def on_train_batch_end(self, *args: Any) -> None:
        """Update the averaged weights."""
        if self.use_ema:
            self.model_ema(self.model)

    def configure_optimizers(self) -> Any:
        """AdamW over the network, the text encoder if it is trained, and a learned logvar."""
        parameters = list(self.model.parameters())
        if self.cond_stage_trainable:
            parameters += list(self.cond_stage_model.parameters())
        if isinstance(self.logvar, nn.Parameter):
            parameters.append(self.logvar)
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate)
        if self.scheduler_config is None:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config).schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]

    @torch.no_grad()
    def log_images(
        self,
        batch: dict[str, Any],
        n_pictures: int = 4,
        sample: bool = True,
        ddim_steps: int = 50,
        ddim_eta: float = 0.0,
        unconditional_guidance_scale: float = 5.0,
        unconditional_guidance_label: str = "",
    ) -> dict[str, Tensor]:
        """Pictures for the image logger, each (B, 3, H, W), about [-1, 1].

        Args:
            batch: a training batch.
            n_pictures: how many of it to use, at most.
            sample: whether to draw samples for its captions, with the averaged weights.
            ddim_steps: steps of sampling.
            ddim_eta: 0 is deterministic.
            unconditional_guidance_scale: above 1 there are guided samples also.
            unconditional_guidance_label: the caption that says nothing.

        Returns: ``inputs`` (unless the batch has latents alone), ``reconstruction``, ``samples``
            and ``samples_cfg_scale_X``.
        """
        keys = {"latent", self.first_stage_key, self.cond_stage_key} & set(batch)
        batch = {key: batch[key][:n_pictures] for key in keys}
        z, c = self.get_input(batch)
        pictures = {}
        if self.first_stage_key in batch:
            pictures["inputs"] = rearrange(batch[self.first_stage_key], "b h w c -> b c h w")
        pictures["reconstruction"] = self.decode_first_stage(z)
        if not sample:
            return pictures
        runs: dict[str, dict[str, Any]] = {"samples": {}}
        if c is not None and unconditional_guidance_scale > 1:
            runs[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = {
                "unconditional_guidance_scale": unconditional_guidance_scale,
                "unconditional_conditioning": self.get_unconditional_conditioning(
                    len(z), unconditional_guidance_label
                ),
            }
        with self.ema_scope("log_images"):
            for name, guidance in runs.items():
                latents, _ = DDIMSampler(self).sample(
                    ddim_steps, len(z), z.shape[1:], c, eta=ddim_eta, verbose=False, **guidance
                )
                pictures[name] = self.decode_first_stage(latents)
        return pictures


def _frozen(module: nn.Module) -> nn.Module:
    """The module, in evaluation mode and without gradients."""
    return module.eval().requires_grad_(False)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} {value!r}: choose from {', '.join(choices)}")


def _check_inert(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if name not in INERT_ARGUMENTS:
            raise InputError(f"LatentDiffusion has no argument {name!r}")
        allowed = INERT_ARGUMENTS[name]
        if allowed is not None and value not in allowed:
            raise InputError(f"LatentDiffusion: {name}={value!r} is not supported, leave it out")


def _check_ucg_training(
    config: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[float, str]]:
    """Batch key -> (probability, replacement)."""
    rules = {}
    for key, rule in config.items():
        probability = rule.get("p")
        if rule.keys() - {"p", "val"} or probability is None or not 0 <= probability <= 1:
            raise InputError(
                f"ucg_training.{key} is {dict(rule)}: it needs p, from 0 to 1, and may have val"
            )
        rules[key] = (float(probability), rule.get("val") or "")
    return rules
