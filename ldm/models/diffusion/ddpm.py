"""The latent diffusion model: first stage, text encoder, denoiser and noise schedule in one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoint.files import open_state_dict
from ldm.checkpoint.keys import COMPONENTS, SCHEDULE, UNET, canonical_names, has_ema, is_weight
from ldm.checkpoint.prediction import decide_prediction
from ldm.errors import InputError, escaped
from ldm.models.diffusion.arguments import (
    INERT_ARGUMENTS,
    check_choice,
    check_inert,
    check_number,
)
from ldm.models.diffusion.denoiser import DiffusionWrapper
from ldm.models.diffusion.guidance import PARAMETERIZATIONS, Conditioning
from ldm.models.diffusion.schedule import (
    check_betas,
    make_beta_schedule,
    rescale_zero_terminal_snr,
    schedule_buffers,
    variational_weights,
)
from ldm.modules.attention import remember_context
from ldm.modules.diffusionmodules.reuse import DeepReuse
from ldm.modules.ema import LitEma
from ldm.modules.tome.merger import TokenMerger
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)


class LatentDiffusion(nn.Module):
    """A diffusion model in the latent space of a first stage.

    Every argument has upstream's name. ``ldm.training.diffusion`` trains it; what only that needs
    is kept here as it was given.

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
        zero_snr: rescale the schedule so that the last step is noise alone; for v-prediction. See
            rescale_zero_terminal_snr.
        v_posterior: see schedule_buffers.
        parameterization: what the network predicts: ``eps``, ``x0`` or ``v``.
        loss_type: ``l2`` or ``l1``.
        l_simple_weight: weight of the plain loss.
        original_elbo_weight: weight of the loss weighted as in the variational bound.
        learn_logvar: learn a log-variance of the loss for each step.
        logvar_init: its first value.
        timestep_power: training draws its steps as T * u^power with u uniform in [0, 1); below 1
            there are more of the noisy ones, in which a picture is laid out.
        timestep_logit_normal: mean and deviation; draws them as T * sigmoid(normal) instead, most
            in the middle, where shapes come about, after Esser et al. 2024 (arXiv 2403.03206).
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
    inert_arguments = tuple(INERT_ARGUMENTS)

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
        zero_snr: bool = False,
        v_posterior: float = 0.0,
        parameterization: str = "eps",
        loss_type: str = "l2",
        l_simple_weight: float = 1.0,
        original_elbo_weight: float = 0.0,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        timestep_power: float = 1.0,
        timestep_logit_normal: Sequence[float] | None = None,
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
        check_inert("LatentDiffusion", INERT_ARGUMENTS, inert)
        check_choice("parameterization", parameterization, PARAMETERIZATIONS)
        check_choice("loss_type", loss_type, ("l2", "l1"))
        check_number("scale_factor", scale_factor, 1e-6, 1e6)
        check_number("v_posterior", v_posterior, 0, 1)
        check_number("l_simple_weight", l_simple_weight, 0, 1e6)
        check_number("original_elbo_weight", original_elbo_weight, 0, 1e6)
        check_number("timestep_power", timestep_power, 1e-3, 1e3)
        if min_snr_gamma is not None:
            check_number("min_snr_gamma", min_snr_gamma, 1e-6, 1e6)
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == "__is_unconditional__" and not force_null_conditioning:
            conditioning_key = None
        self.parameterization = parameterization
        self.loss_type = loss_type
        self.l_simple_weight = l_simple_weight
        self.original_elbo_weight = original_elbo_weight
        self.timestep_power = timestep_power
        self.timestep_logit_normal = timestep_logit_normal
        self.min_snr_gamma = min_snr_gamma
        self.use_ema = use_ema
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.image_size = image_size
        self.channels = channels
        self.monitor = monitor
        self.scheduler_config = scheduler_config
        self.ucg_training = ucg_training or {}

        # Upstream's order of construction: with a seed, it decides the initial weights.
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        if use_ema:
            self.model_ema = LitEma(self.model)
        self.v_posterior = v_posterior
        if given_betas is None:
            with np.errstate(all="ignore"):  # what comes of it is looked at
                self.given_betas = make_beta_schedule(
                    beta_schedule, timesteps, linear_start, linear_end, cosine_s
                )
        else:
            self.given_betas = np.asarray(given_betas, dtype=np.float64)
        check_betas(self.given_betas)
        if timestep_logit_normal is not None:
            try:
                _mean, _deviation = map(float, timestep_logit_normal)
            except (TypeError, ValueError):
                raise InputError(
                    f"timestep_logit_normal {escaped(timestep_logit_normal)}: give mean and "
                    "deviation, such as [-0.6, 1.0]"
                ) from None
        if zero_snr:
            if parameterization == "eps":
                raise InputError(
                    "zero_snr needs parameterization v: the noise of noise alone says nothing"
                )
            self.given_betas = rescale_zero_terminal_snr(self.given_betas)
        self.num_timesteps = len(self.given_betas)
        if self._tome is not None:
            self._tome.n_timesteps = self.num_timesteps
        self.logvar_init = float(logvar_init)
        if learn_logvar:
            self.logvar = nn.Parameter(torch.full((self.num_timesteps,), self.logvar_init))
        for name, buffer in self._schedule().items():
            self.register_buffer(name, buffer, persistent=name not in ("lvlb_weights", "logvar"))
        self.scale_by_std = scale_by_std
        self.has_loaded_scale = False
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        else:
            self.scale_factor = scale_factor

        self.first_stage_model = _frozen(instantiate_from_config(first_stage_config, nn.Module))
        if cond_stage_config == "__is_first_stage__":
            self.cond_stage_model = self.first_stage_model
        else:
            self.cond_stage_model = instantiate_from_config(cond_stage_config, nn.Module)
            if self.cond_stage_model is not None and not cond_stage_trainable:
                _frozen(self.cond_stage_model)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    @property
    def device(self) -> torch.device:
        """Where the schedule is, also of a module built on ``meta``."""
        return self.betas.device

    def _schedule(self) -> dict[str, Tensor]:
        """The buffers that have a value for each step, always on the CPU."""
        buffers = schedule_buffers(self.given_betas, self.v_posterior)
        buffers["lvlb_weights"] = variational_weights(
            self.given_betas, self.parameterization, self.v_posterior
        )
        if not isinstance(getattr(self, "logvar", None), nn.Parameter):
            buffers["logvar"] = torch.full((self.num_timesteps,), self.logvar_init, device="cpu")
        return buffers

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

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Set the mode of what is trained; frozen stages stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def begin_run(self, is_guided: bool = False) -> None:
        """Start a sampling run: what is remembered of the last one is forgotten.

        Args:
            is_guided: batches have two halves, for classifier-free guidance.
        """
        if self._tome is not None:
            self._tome.begin_run()
            self._tome.is_guided = is_guided
        if self._reuse is not None:
            self._reuse.begin_run()
        remember_context(self.model)

    def end_run(self) -> None:
        """End a sampling run; what attention remembers of its prompts is forgotten."""
        if self._tome is not None:
            self._tome.is_guided = False
        if self._reuse is not None:
            self._reuse.end_run()
        remember_context(self.model, False)
        if self.model.captures is not None:  # last, when nobody else holds what they have made
            self.model.captures.clear()

    def at_step(self, t: float) -> None:
        """Say at which step the next call is, so that nobody has to ask the device for it."""
        if self._tome is not None:
            self._tome.timestep = t

    def begin_batch(self) -> None:
        """Start the loss of another batch: token merging keeps no plan of the one before."""
        if self._tome is not None:
            self._tome.begin_batch()

    @property
    def _reuse(self) -> DeepReuse | None:
        """Reuse of deep features in the network, if it has that."""
        return getattr(self.model.diffusion_model, "reuse", None)

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

    def get_unconditional_conditioning(
        self, batch_size: int, null_label: str | Sequence[str] = ""
    ) -> Conditioning:
        """The encoding of a caption that says nothing, batch_size times.

        Args:
            batch_size: how often.
            null_label: the caption, or a list of it, as upstream's configurations have it.
        """
        return self.get_learned_conditioning(["".join(null_label)] * batch_size)

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

        The schedule stays that of the configuration, as does the decay of the averages, which in
        half precision would be 1.

        Args:
            path: .ckpt (read without executing pickled code), .safetensors, or a folder of them.
            ignore_keys: names that begin so are not loaded.
            only_model: load only the denoising network.

        Raises:
            InputError: there is nothing to load.
        """
        weights = open_state_dict(path)
        stored = canonical_names(weights)
        left_out = tuple(ignore_keys)
        settings = {*SCHEDULE, "model_ema.decay"}
        names = [n for n in stored if n not in settings and not n.startswith(left_out)]
        if only_model:
            names = [name for name in names if name.startswith(UNET)]
        weights.require_weights(stored[name] for name in names if is_weight(name))
        state = {name: weights[stored[name]] for name in names}
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [name for name in missing if name not in settings]
        self.has_loaded_scale = self.scale_by_std and "scale_factor" in state
        if len(unexpected) == len(state):
            raise InputError(f"{escaped(path)} has no weights of this model in it")
        if self.use_ema and has_ema(missing):  # pruned files may hold the counters alone
            self.model_ema = LitEma(self.model)  # an average of these weights, not of random ones
            missing = [name for name in missing if not name.startswith("model_ema.")]
        # whole components may come from elsewhere
        begun = tuple(part for part in COMPONENTS if any(name.startswith(part) for name in state))
        lost = [n for n in missing if n.startswith(begun) and not n.startswith(left_out)]
        weights.report_lost(lost)
        said = decide_prediction(weights)
        if said is not None and said.kind != self.parameterization:
            logger.warning(
                "%s predicts %s (%s), and is to be trained to predict %s: "
                "model.params.parameterization decides",
                *(escaped(path), said.kind, said.source, self.parameterization),
            )
        has_noise_alone = float(self.alphas_cumprod[-1]) == 0
        if said is not None and said.zero_snr and not has_noise_alone:
            logger.warning(
                "%s has a schedule with zero terminal SNR, and model.params.zero_snr is not set",
                escaped(path),
            )
        counts = len(state), len(missing), len(unexpected)
        logger.info("%s: %d tensors, %d missing, %d without a place", path, *counts)


def _frozen(module: nn.Module) -> nn.Module:
    """The module, in evaluation mode and without gradients."""
    return module.eval().requires_grad_(False)
