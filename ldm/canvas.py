"""What a run draws on: the encoded picture, the hole in it, the noise to start from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ldm import images
from ldm.device import FIRST_STAGE, Attempt
from ldm.images import Mask, Pixels
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.settings import Settings


class PictureNoise:
    """Noise for a batch whose pictures each draw from a generator of their own, on the CPU.

    Args:
        seeds: of the pictures.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Unit normal noise of a shape (B, ...) with a row for each seed."""
        size, kind = tuple(shape[1:]), torch.float32  # whatever the defaults are
        return torch.stack(
            [torch.randn(size, generator=g, dtype=kind, device="cpu") for g in self.generators]
        )


@dataclass(frozen=True)
class Canvas:
    """What the batches of a run are drawn on.

    Attributes:
        known: scaled latents of the picture to start from or to keep, (1 or n, C, h, w).
        kept: where they stay, (1, 1, h, w): 1 where no pixel is painted; None: nowhere.
        beside: what an inpainting model sees beside the noise, (1 or n, 1 + C, h, w).
        start: noise from which every batch starts, (n, C, h, w).
    """

    known: Tensor | None = None
    kept: Tensor | None = None
    beside: Tensor | None = None
    start: Tensor | None = None


@torch.inference_mode()
def prepare(
    model: LatentDiffusion, settings: Settings, init: Pixels | None = None, mask: Mask | None = None
) -> Canvas:
    """Encode what all batches of a run share.

    Args:
        model: what draws.
        settings: without None.
        init: the picture to start from, (H, W, 3) of the settings' size.
        mask: where to paint, (H, W).
    """
    known = kept = beside = start = None
    height, width = latent_shape(model, settings)[1:]
    is_inpainting = model.model.diffusion_model.in_channels == 2 * model.channels + 1
    if init is not None and (mask is None or not is_inpainting):
        known = encode(model, settings, images.to_unit(init))
        if mask is not None:
            hole = torch.from_numpy(mask).float()[None, None]
            kept = 1 - F.adaptive_max_pool2d(hole, (height, width)).to(model.device)
    if is_inpainting:
        # Without a mask, all is to be painted. The mask's pixels are picked, not pooled, as in the
        # training of such models.
        hidden = np.ones(settings.size, bool) if mask is None else mask
        seen = np.zeros((3, *settings.size), np.float32)
        if init is not None:
            seen = images.to_unit(init) * ~hidden
        latents = encode(model, settings, seen)
        hole = F.interpolate(torch.from_numpy(hidden).float()[None, None], (height, width))
        beside = torch.cat([hole.to(latents).expand(len(latents), -1, -1, -1), latents], dim=1)
    if settings.fixed_code:
        start = _fixed_start(model, settings)
    return Canvas(known, kept, beside, start)


def latent_shape(model: LatentDiffusion, settings: Settings) -> tuple[int, int, int]:
    """C, h and w of a picture's latents."""
    assert settings.f is not None
    height, width = settings.size
    return model.channels, height // settings.f, width // settings.f


def _fixed_start(model: LatentDiffusion, settings: Settings) -> Tensor:
    shape = latent_shape(model, settings)
    if settings.rng == "upstream":
        return torch.randn((settings.n_samples, *shape), device=model.device)
    one = PictureNoise([settings.seed])((1, *shape))
    return one.expand(settings.n_samples, -1, -1, -1).to(model.device)


@torch.inference_mode()
def encode(model: LatentDiffusion, settings: Settings, picture: NDArray[np.float32]) -> Tensor:
    """Scaled latents of a picture (3, H, W), (1, C, h, w); with upstream's draw, n_samples."""
    stage = model.first_stage_model
    attempt = Attempt(FIRST_STAGE, stage)
    while True:
        weight = next(stage.parameters())
        posterior = model.encode_first_stage(torch.from_numpy(picture[None]).to(weight))
        if settings.rng == "upstream":
            noise = torch.randn((settings.n_samples, *latent_shape(model, settings)))
            latents = model.get_first_stage_encoding(posterior, noise).float()
        else:
            latents = model.get_first_stage_encoding(posterior.mode()).float()
        if attempt.succeeds(latents):
            return latents


def rows(tensor: Tensor, n: int) -> Tensor:
    """The first n rows of a tensor, or its only row n times."""
    return tensor.expand(n, *tensor.shape[1:]) if len(tensor) == 1 else tensor[:n]
