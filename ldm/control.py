"""A picture that guides the layout of what is drawn, by a ControlNet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm import images
from ldm.errors import InputError
from ldm.images import Pixels
from ldm.modules.controlnet import HINT_SCALE, ControlNet
from ldm.modules.diffusionmodules.openaimodel import UNetModel

MAX_STRENGTH = 2.0


@dataclass(frozen=True)
class Control:
    """A ControlNet and its picture.

    Attributes:
        net: of the model that draws.
        picture: what it reads, (H, W, 3): edges, a depth map, ... as the network was trained.
        strength: factor on what it adds, 0 to 2.
        finds_edges: take the Canny edges of the picture.

    Raises:
        InputError: the strength is out of range.
    """

    net: ControlNet
    picture: Pixels
    strength: float = 1.0
    finds_edges: bool = False

    def __post_init__(self) -> None:
        """Check the strength."""
        if not 0 <= self.strength <= MAX_STRENGTH:
            raise InputError(f"control_strength {self.strength}: allowed is 0 to {MAX_STRENGTH:g}")

    def hint(self, h: int, w: int) -> Tensor:
        """What the network reads for latents of h x w: (1, 3, 8 h, 8 w) in [0, 1]."""
        pixels = images.fit(self.picture, HINT_SCALE * h, HINT_SCALE * w)
        hint = torch.from_numpy(images.to_unit(pixels))[None] / 2 + 0.5
        return edges(hint) if self.finds_edges else hint

    @contextmanager
    def over(self, unet: UNetModel, h: int, w: int) -> Iterator[None]:
        """Let it control a U-Net for latents of h x w; it merges tokens as the U-Net does."""
        hint, net = self.hint(h, w).to(next(self.net.parameters()).device), self.net
        net.tome.n_timesteps = unet.tome.n_timesteps
        net.tome.configure(unet.tome.config)

        def residuals(x: Tensor, timesteps: Tensor, context: Tensor | None) -> list[Tensor]:
            if net.dtype != unet.dtype:  # which is float32 after numbers have become too large
                net.to(unet.dtype)
            net.tome.is_guided = unet.tome.is_guided
            latents = x[:, : net.in_channels]  # without what an inpainting model sees besides
            found = net.residuals(latents, hint.expand(len(x), -1, -1, -1), timesteps, context)
            return [self.strength * one for one in found]

        unet.control = residuals
        try:
            yield
        finally:
            unet.control = None


def edges(pictures: Tensor) -> Tensor:
    """Canny edges of pictures (B, 3, H, W) in [0, 1], white on black, of the same shape."""
    from kornia.filters import canny

    return canny(pictures)[1].expand(-1, 3, -1, -1)
