"""Previews of pictures in the making."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import images
from ldm.images import Pixels
from ldm.models.diffusion.ddpm import LatentDiffusion

SIZE = 256  # pixels of a preview's longer side, at least
RIDGE = 1e-3  # of the fit, for pictures of few colours


class Preview:
    """Colours as a linear map of latents, fitted to what the model's first stage decodes.

    A preview then costs a product with a matrix of (C + 1) x 3. The first one of a model decodes
    once, to have something to fit; later ones know every picture that was drawn.

    Args:
        model: whose latents are shown.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        self.model = model
        n = model.channels + 1
        self._moments = torch.zeros(n, n)
        self._products = torch.zeros(n, 3)

    @torch.inference_mode()
    def pixels(self, latents: Tensor) -> Pixels:
        """A small picture (H, W, 3) of latents (C, h, w), scaled."""
        if not self._products.any():
            weight = next(self.model.first_stage_model.parameters())
            picture = self.model.decode_first_stage(latents[None].to(weight))[0].float().cpu()
            self.fit(latents, images.to_pixels(picture.nan_to_num()))
        ridge = RIDGE * self._moments.diagonal().mean() * torch.eye(len(self._moments))
        colours = torch.linalg.solve(self._moments + ridge, self._products)
        drawn = (_rows(latents) @ colours).T.reshape(1, 3, *latents.shape[1:])
        factor = max(1, -(-SIZE // max(latents.shape[1:])))
        drawn = F.interpolate(drawn, scale_factor=factor, mode="bilinear")
        return images.to_pixels(drawn[0])

    @torch.inference_mode()
    def fit(self, latents: Tensor, pixels: Pixels) -> None:
        """Learn from latents (C, h, w) and the picture (H, W, 3) that they are decoded to."""
        picture = torch.from_numpy(images.to_unit(pixels))
        h, w = latents.shape[1:]
        colours = F.adaptive_avg_pool2d(picture, (h, w)).flatten(1).T
        rows = _rows(latents)
        self._moments += rows.T @ rows / len(rows)
        self._products += rows.T @ colours / len(rows)


def _rows(latents: Tensor) -> Tensor:
    """Latents (C, h, w) as rows (h * w, C + 1) with a 1 at the end of each, on the CPU."""
    rows = latents.float().cpu().flatten(1).T
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
