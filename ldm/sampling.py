"""From prompts and seeds to pixels, in four plain functions: noise, conditioning, sample, decode.

`canvas.prepare` encodes what all batches of a run share.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import images
from ldm.canvas import Canvas, PictureNoise, encode, latent_shape, rows
from ldm.device import FIRST_STAGE, Attempt, reused_memory
from ldm.images import Mask, Pixels
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMpp2MSampler, DPMSolverSampler
from ldm.models.diffusion.dpmpp_sde import DPMppSDESampler
from ldm.models.diffusion.euler import EulerAncestralSampler, EulerSampler
from ldm.models.diffusion.guidance import Conditioning, sampling_run
from ldm.models.diffusion.heun import HeunSampler
from ldm.models.diffusion.lcm import LCMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import NoiseSource, Sampler
from ldm.models.diffusion.unipc import UniPCSampler
from ldm.modules.encoders.prompts import embed_prompt, length_in_use
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.tally import Tally
from ldm.settings import Settings

SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIMSampler,
    "plms": PLMSSampler,
    "dpm_solver": DPMSolverSampler,
    "euler": EulerSampler,
    "euler_a": EulerAncestralSampler,
    "dpmpp_2m": DPMpp2MSampler,
    "heun": HeunSampler,
    "dpmpp_sde": DPMppSDESampler,
    "unipc": UniPCSampler,
    "lcm": LCMSampler,
}
FLAT = 2  # levels of 255 by which the pixels of a picture of a single colour may differ
N_KEPT_TEXTS = 100  # embeddings of prompts

OnStep: TypeAlias = Callable[[int, int, Tensor], None]
"""(number of a step from 0, number of steps, predicted x_0 (B, C, h, w)); may raise to stop."""

Batch: TypeAlias = Sequence[tuple[str, int]]
"""Prompt and seed of each picture that is drawn at once."""

logger = logging.getLogger(__name__)


class Texts:
    """Embeddings of a run's prompts, all equally long; those of the last hundred are kept.

    Args:
        model: what encodes them.
        settings: all prompts of the run, and how they are read.
        trims: drop the padding after the longest text of the run.

    Attributes:
        added: what is in the model's weights; texts of other weights are other texts.
    """

    added: object = None

    def __init__(self, model: LatentDiffusion, settings: Settings, trims: bool = False) -> None:
        self.model, self.settings, self.trims = model, settings, trims
        self._kept = lru_cache(N_KEPT_TEXTS)(self._read)

    def __call__(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Tensor:
        """The context of each prompt, (B, L, width).

        Args:
            prompts: B of them.
            beside: others that are as long in the same call of the model.
        """
        texts = [self._kept(prompt, self.added) for prompt in prompts]
        if self.settings.long_prompt:  # empty chunks after the shorter ones
            empty = self._kept("", self.added)
            others = [self._kept(prompt, self.added) for prompt in {*beside}]
            n_chunks = max(text.shape[1] // empty.shape[1] for text in (*texts, *others))
            n_missing = [n_chunks - text.shape[1] // empty.shape[1] for text in texts]
            texts = [
                torch.cat([text, *[empty] * n], dim=1)
                for text, n in zip(texts, n_missing, strict=True)
            ]
        joined = torch.cat(texts)
        return joined[:, : self._longest] if self.trims else joined

    def alike(self, batch: Batch) -> Iterator[Batch]:
        """The parts of a batch whose texts are equally long, before empty chunks are added."""
        for _, part in itertools.groupby(batch, lambda one: self._kept(one[0], self.added).shape):
            yield list(part)

    @cached_property
    def _longest(self) -> int:
        """Tokens of context up to the end of the longest text of the run, without its padding."""
        encoder, settings = self.model.cond_stage_model, self.settings
        lengths = {
            prompt: length_in_use(encoder, prompt, settings.long_prompt, settings.emphasis)
            for prompt in {*settings.prompts, settings.negative_prompt}
        }
        longest = max(lengths.values())
        if self.trims:
            differ = len({lengths[prompt] for prompt in settings.prompts}) > 1
            logger.info(
                "ToMe: the texts' padding is dropped; %d tokens of context are left%s",
                longest,
                ", for all as for the longest: pictures depend on the texts beside theirs"
                if differ
                else "",
            )
        return longest

    @torch.inference_mode()
    def _read(self, prompt: str, added: object) -> Tensor:
        """The embedding of a prompt, (1, L, width); a long one's L is a multiple of the model's."""
        encoder, settings = self.model.cond_stage_model, self.settings
        ways = settings.long_prompt, settings.emphasis, settings.clip_skip
        attempt = Attempt("the text encoder", encoder)
        while True:
            embedding = embed_prompt(encoder, prompt, *ways)
            if attempt.succeeds(embedding):
                return embedding


def noise(
    model: LatentDiffusion, settings: Settings, seeds: Sequence[int], canvas: Canvas
) -> tuple[Tensor, NoiseSource | None]:
    """The noise that a batch starts from, (B, C, h, w), and where its steps get theirs.

    The latter is None with upstream's order: torch's global generator.
    """
    size = torch.Size((len(seeds), *latent_shape(model, settings)))
    source = None if settings.rng == "upstream" else PictureNoise(seeds)
    if canvas.start is not None:
        return canvas.start[: len(seeds)], source
    if source is None:
        return torch.randn(size, device=model.device), None
    return source(size).to(model.device), source


def conditioning(
    texts: Texts, prompts: Sequence[str], canvas: Canvas, beside: Sequence[str] = ()
) -> Conditioning:
    """What the U-Net is told: the texts, and what lies beside the noise."""
    text = texts(prompts, beside)
    if canvas.beside is None:
        return text
    return {"c_crossattn": [text], "c_concat": [rows(canvas.beside, len(prompts))]}


@torch.inference_mode()
def sample(
    model: LatentDiffusion,
    settings: Settings,
    batch: Batch,
    texts: Texts,
    canvas: Canvas | None = None,
    progress: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents of a batch, (B, C, h, w).

    Args:
        model: what draws.
        settings: without None.
        batch: what to draw, with which seeds.
        texts: the embeddings of its prompts, and of what guidance steers away from.
        canvas: what it is drawn on; None: nothing.
        progress: show a bar.
        on_step: called after each step.
    """
    assert settings.sampler is not None
    assert settings.steps is not None
    ground, scale = canvas or Canvas(), settings.scale
    assert scale is not None
    sampler = SAMPLERS[settings.sampler](model)
    sampler.make_schedule(settings.steps, settings.schedule, settings.eta)
    sampler.encodes_as_upstream = settings.rng == "upstream"
    attempt = Attempt("the U-Net", model.model)
    while True:
        x, source = noise(model, settings, [seed for _, seed in batch], ground)
        prompts, negative, against = [prompt for prompt, _ in batch], None, []
        if scale != 1:
            against = [settings.negative_prompt] * len(batch)
            negative = conditioning(texts, against, ground, prompts)
        positive = conditioning(texts, prompts, ground, against)
        known, n = None, len(sampler.steps)
        if ground.known is not None:
            known = rows(ground.known, len(x))
            if ground.kept is None:
                n = n_steps_back(n, settings)
                x = sampler.stochastic_encode(known, n, noise=x)
        steps = sampler.steps_back(
            x, positive, n, scale, negative, mask=ground.kept, x0=known, noise_source=source
        )
        with (
            reused_memory(model.device),
            _deep_reuse(model, settings.reuse_deep),
            sampling_run(model, scale != 1),
        ):
            for i, result in enumerate(sampler.shown(steps, n, progress)):
                x, predicted = result
                if on_step is not None:
                    on_step(i, n, predicted)
        if attempt.succeeds(x):
            return x


@contextmanager
def _deep_reuse(model: LatentDiffusion, every: int | None) -> Iterator[None]:
    """Let the U-Net reuse its deep features so often; None: as its configuration says."""
    reuse = model.model.diffusion_model.reuse
    own = reuse.every
    reuse.every = every or own
    try:
        yield
    finally:
        reuse.every = own


def n_steps_back(n_steps: int, settings: Settings) -> int:
    """Steps that img2img takes: upstream's rounding, but at least one unless strength is 0.

    Args:
        n_steps: of the schedule, which may have one more than was asked for.
        settings: strength, and the steps asked for.
    """
    assert settings.steps is not None
    if settings.strength in (0, 1):
        return int(settings.strength) * n_steps
    return min(n_steps, max(1, int(settings.strength * settings.steps)))


@torch.inference_mode()
def decode(model: LatentDiffusion, latents: Tensor) -> Tensor:
    """What the first stage makes of latents (B, C, h, w): float32 (B, 3, H, W) on the CPU."""
    stage = model.first_stage_model
    attempt = Attempt(FIRST_STAGE, stage)
    while True:
        weight = next(stage.parameters())
        pictures = model.decode_first_stage(latents.to(weight.dtype)).float()
        if attempt.succeeds(pictures):
            return pictures.cpu()


@torch.inference_mode()
def enlarge(model: LatentDiffusion, settings: Settings, latents: Tensor) -> Tensor:
    """Latents of smaller pictures, (B, C, h, w), at the size of the second pass's settings."""
    if settings.hires_upscaler == "latent":
        return F.interpolate(latents, latent_shape(model, settings)[1:], mode="bilinear")
    pictures = [images.to_pixels(decode(model, one)[0]) for one in latents.split(1)]
    large = [images.to_unit(images.fit(one, *settings.size)) for one in pictures]
    return torch.cat([encode(model, settings, one)[:1] for one in large])


@dataclass
class Pass:
    """One pass of the sampler over all pictures of a run.

    Attributes:
        settings: without None.
        tome: what it merges.
        texts: its prompts.
        init: the picture to start from, (H, W, 3) of the settings' size.
        mask: where to paint, (H, W).
        canvas: what is encoded of these.
        tally: what was merged.
    """

    settings: Settings
    tome: ToMeConfig
    texts: Texts
    init: Pixels | None = None
    mask: Mask | None = None
    canvas: Canvas = field(default_factory=Canvas)
    tally: Tally = field(default_factory=Tally)

    def pixels(self, values: Tensor) -> Pixels:
        """The picture (H, W, 3) of what the first stage gives, (3, H, W); the original outside of
        the mask.
        """
        drawn = images.to_pixels(values)
        if np.ptp(drawn, axis=(0, 1)).max() <= FLAT:
            logger.warning(
                "a picture is of a single colour, %s: something is too large or too small (scale, "
                "steps, LoRA), or the checkpoint is not what it seems",
                "black" if drawn.max() <= FLAT else f"RGB {drawn[0, 0].tolist()}",
            )
        if self.mask is None or self.init is None:
            return drawn
        return np.where(self.mask[..., None], drawn, self.init)
