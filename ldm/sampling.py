"""One run of a sampler, from prompts and seeds to pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm import images
from ldm.device import reused_memory
from ldm.errors import InputError
from ldm.images import Mask, Pixels
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMpp2MSampler, DPMSolverSampler
from ldm.models.diffusion.euler import EulerAncestralSampler, EulerSampler
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler
from ldm.modules.encoders.prompts import embed_prompt, length_in_use
from ldm.settings import Settings

SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIMSampler,
    "plms": PLMSSampler,
    "dpm_solver": DPMSolverSampler,
    "euler": EulerSampler,
    "euler_a": EulerAncestralSampler,
    "dpmpp_2m": DPMpp2MSampler,
}

OnStep: TypeAlias = Callable[[int, int, Tensor], None]
"""(number of a step from 0, number of steps, predicted x_0 (B, C, h, w)); may raise to stop."""

logger = logging.getLogger(__name__)


class PictureNoise:
    """Noise for a batch whose pictures each draw from a generator of their own, on the CPU.

    Args:
        seeds: of the pictures.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Unit normal noise of a shape (B, ...) with a row for each seed."""
        rows = [torch.randn(tuple(shape[1:]), generator=g) for g in self.generators]
        return torch.stack(rows)


class Run:
    """Draws pictures with one choice of settings; what they share is computed once.

    Args:
        model: what draws.
        name: of the model's file, for messages.
        settings: without None.
        init: the picture to start from, (H, W, 3) of any size, or None.
        mask: where to paint, (H, W) of that size, or None.
        progress: show the sampler's progress.
        on_step: called after each step.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        name: str | Path,
        settings: Settings,
        init: Pixels | None = None,
        mask: Mask | None = None,
        progress: bool = False,
        on_step: OnStep | None = None,
    ) -> None:
        assert settings.H is not None
        assert settings.W is not None
        assert settings.steps is not None
        assert settings.f is not None
        assert settings.sampler is not None
        self.model = model
        self.name = name
        self.settings = settings
        self.progress = progress
        self.on_step = on_step
        self.is_upstream = settings.rng == "upstream"
        if self.is_upstream:  # again after loading, so that nothing before can shift the stream
            torch.manual_seed(settings.seed)
        self.sampler: Sampler = SAMPLERS[settings.sampler](self.model)
        self.n_steps = settings.steps
        self.sampler.make_schedule(self.n_steps, settings.schedule, settings.eta)
        self.size = (settings.H, settings.W)
        self.shape = (model.channels, settings.H // settings.f, settings.W // settings.f)
        self.texts: dict[str, Tensor] = {}
        self.text_length = 0  # tokens of the longest text of the run, where they can differ
        prompts = {prompt for batch in settings.batches() for prompt, _ in batch}
        prompts.add(settings.negative_prompt)
        if settings.long_prompt:
            for prompt in {"", *prompts}:
                self.texts[prompt] = self._text(prompt)
            self.text_length = max(text.shape[1] for text in self.texts.values())
        self.prompts = prompts
        self.init = None if init is None else images.fit(init, *self.size)
        self.mask = None if mask is None else images.fit_mask(mask, *self.size)
        self.known: Tensor | None = None  # latents of init, where the steps need them
        if self.init is not None and (mask is None or not sees_mask(model)):
            self.known = self._encoded(images.to_unit(self.init))
        self.beside = self._beside_the_noise() if sees_mask(model) else None
        self.start = self._fixed_start() if settings.fixed_code else None

    # --- what all pictures share ------------------------------------------------------------

    @torch.inference_mode()
    def _encoded(self, picture: NDArray[np.float32]) -> Tensor:
        """Scaled latents of a picture (3, H, W), (1, C, h, w); with upstream's draw, n_samples."""
        stage = self.model.first_stage_model

        def encode() -> Tensor:
            weight = next(stage.parameters())
            posterior = self.model.encode_first_stage(torch.from_numpy(picture[None]).to(weight))
            if not self.is_upstream:
                return self.model.get_first_stage_encoding(posterior.mode()).float()
            noise = torch.randn((self.settings.n_samples, *self.shape))
            return self.model.get_first_stage_encoding(posterior, noise).float()

        return self._finite("the first stage", stage, encode)

    def _fixed_start(self) -> Tensor:
        """Noise from which every batch starts, (n_samples, C, h, w)."""
        if self.is_upstream:
            size = (self.settings.n_samples, *self.shape)
            return torch.randn(size, device=self.model.device)
        one = PictureNoise([self.settings.seed])((1, *self.shape))
        return one.expand(self.settings.n_samples, -1, -1, -1).to(self.model.device)

    def _beside_the_noise(self) -> Tensor:
        """What an inpainting model sees besides: mask and masked picture, (., 1 + C, h, w).

        Where there is no mask, all is to be painted. The mask's pixels are picked, not pooled, as
        in the training of such models.
        """
        hole = np.ones(self.size, bool) if self.mask is None else self.mask
        picture = np.zeros((3, *self.size), np.float32)
        if self.init is not None:
            picture = images.to_unit(self.init) * ~hole
        latents = self._encoded(picture)
        mask = F.interpolate(torch.from_numpy(hole).float()[None, None], self.shape[1:])
        return torch.cat([mask.to(latents).expand(len(latents), -1, -1, -1), latents], dim=1)

    def _kept(self) -> Tensor:
        """Which latents stay, (1, 1, h, w): 1 where no pixel of theirs is to be painted."""
        hole = torch.from_numpy(self.mask).float()[None, None]
        return 1 - F.adaptive_max_pool2d(hole, self.shape[1:]).to(self.model.device)

    # --- each batch -------------------------------------------------------------------------

    @torch.inference_mode()
    def latents(self, batch: Sequence[tuple[str, int]], start: Tensor | None = None) -> Tensor:
        """Latents of a batch of prompts and seeds, (B, C, h, w).

        Args:
            batch: prompts and seeds.
            start: latents to redraw, of the same shape, in place of the picture to start from.
        """
        known = self.known if start is None else start
        return self._finite("the U-Net", self.model.model, lambda: self._sampled(batch, known))

    @torch.inference_mode()
    def enlarged(self, latents: Tensor, upscaler: str) -> Tensor:
        """Latents of a smaller picture, (B, C, h, w), at this run's size.

        Args:
            latents: of any size.
            upscaler: ``latent`` or ``lanczos``; see Settings.
        """
        if upscaler == "latent":
            return F.interpolate(latents, self.shape[1:], mode="bilinear")
        pictures = [images.fit(self.pixels(one), *self.size) for one in latents.split(1)]
        return torch.cat([self._encoded(images.to_unit(one))[:1] for one in pictures])

    def _sampled(self, batch: Sequence[tuple[str, int]], known: Tensor | None) -> Tensor:
        settings, n_pictures = self.settings, len(batch)
        size = torch.Size((n_pictures, *self.shape))
        source = None if self.is_upstream else PictureNoise(seed for _, seed in batch)
        if self.start is not None:
            noise = self.start[:n_pictures]
        elif source is not None:
            noise = source(size).to(self.model.device)
        else:
            noise = torch.randn(size, device=self.model.device)

        options: dict[str, Any] = {"noise_source": source, "verbose": self.progress}
        x, n_steps = noise, len(self.sampler.steps)
        if known is not None:
            known = _rows(known, n_pictures)
            if self.mask is None:
                n_steps = self._n_steps_back()
                x = self.sampler.stochastic_encode(known, n_steps, noise=noise)
            else:
                options |= {"mask": self._kept(), "x0": known}
        if settings.scale != 1:
            negative = self._conditioning([settings.negative_prompt] * n_pictures)
            options["unconditional_guidance_scale"] = settings.scale
            options["unconditional_conditioning"] = negative
        if self.on_step is not None:
            on_step = self.on_step
            options["img_callback"] = lambda predicted, i: on_step(i, n_steps, predicted)
        text = self._conditioning([prompt for prompt, _ in batch])
        with reused_memory():
            return self.sampler.decode(x, text, n_steps, **options)

    def _n_steps_back(self) -> int:
        """Steps that img2img takes: upstream's rounding, but at least one unless strength is 0."""
        n_all, strength = len(self.sampler.steps), self.settings.strength
        if strength in (0, 1):
            return int(strength) * n_all
        return min(n_all, max(1, int(strength * self.n_steps)))

    def _conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """What the U-Net is told: the texts, each encoded once, and what lies beside the noise."""
        for prompt in set(prompts) - set(self.texts):
            self.texts[prompt] = self._text(prompt)
        text = torch.cat([self._lengthened(self.texts[prompt]) for prompt in prompts])
        if self.model.model.diffusion_model.tome.config.context == "trim":
            text = text[:, : self._length_in_use]
        if self.beside is None:
            return text
        return {"c_crossattn": [text], "c_concat": [_rows(self.beside, len(prompts))]}

    @cached_property
    def _length_in_use(self) -> int:
        """Tokens of context up to the end of the longest text of the run, without its padding."""
        encoder, settings = self.model.cond_stage_model, self.settings
        longest = max(
            length_in_use(encoder, prompt, settings.long_prompt, settings.emphasis)
            for prompt in self.prompts
        )
        logger.info("ToMe: the texts' padding is dropped; %d tokens of context are left", longest)
        return longest

    @torch.inference_mode()
    def _text(self, prompt: str) -> Tensor:
        """The embedding of a prompt, (1, L, width); a long one's L is a multiple of the model's."""
        encoder, settings = self.model.cond_stage_model, self.settings

        def encode() -> Tensor:
            if settings.long_prompt or settings.emphasis:
                return embed_prompt(encoder, prompt, settings.long_prompt, settings.emphasis)
            return self.model.get_learned_conditioning([prompt])

        return self._finite("the text encoder", encoder, encode)

    def _lengthened(self, text: Tensor) -> Tensor:
        """A text with empty chunks after it, so that all texts of a run are equally long."""
        missing = self.text_length - text.shape[1]
        if missing <= 0:
            return text
        empty = self.texts[""]
        return torch.cat([text, empty.repeat(1, missing // empty.shape[1], 1)], dim=1)

    @torch.inference_mode()
    def pixels(self, latents: Tensor) -> Pixels:
        """The picture (H, W, 3) of latents (1, C, h, w); outside of a mask, the original."""
        drawn = images.to_pixels(self.decoded(latents)[0])
        if self.mask is None or self.init is None:
            return drawn
        return np.where(self.mask[..., None], drawn, self.init)

    @torch.inference_mode()
    def decoded(self, latents: Tensor) -> Tensor:
        """What the first stage makes of latents (B, C, h, w): float32 (B, 3, H, W) on the CPU."""
        stage = self.model.first_stage_model

        def decode() -> Tensor:
            weight = next(stage.parameters())
            return self.model.decode_first_stage(latents.to(weight.dtype)).float()

        return self._finite("the first stage", stage, decode).cpu()

    def _finite(self, stage: str, module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        """Compute; where the result has NaN or infinities, once more in float32.

        Raises:
            InputError: it has them in float32 too.
        """
        states = _random_states(self.model.device)
        result = compute()
        if torch.isfinite(result).all():
            return result
        kind = next(module.parameters()).dtype
        if kind == torch.float32:
            raise InputError(
                f"{stage} of {self.name} gives values that are not numbers, in float32 too: the "
                "file is damaged, or predicts something else than its configuration says"
            )
        logger.warning("%s gives values that are not numbers in %s; using float32", stage, kind)
        module.float()
        _restore_random_states(self.model.device, states)
        return self._finite(stage, module, compute)


def sees_mask(model: LatentDiffusion) -> bool:
    """Whether the U-Net takes a mask and a masked picture beside the noisy latents."""
    return model.model.diffusion_model.in_channels == 2 * model.channels + 1


def _rows(tensor: Tensor, n: int) -> Tensor:
    """The first n rows of a tensor, or its only row n times."""
    return tensor.expand(n, *tensor.shape[1:]) if len(tensor) == 1 else tensor[:n]


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """States of torch's global generators, on the CPU and on a device."""
    own = torch.get_device_module(device).get_rng_state() if device.type != "cpu" else None
    return torch.get_rng_state(), own


def _restore_random_states(device: torch.device, states: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.get_device_module(device).set_rng_state(states[1])
