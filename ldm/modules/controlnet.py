"""ControlNet: a copy of the U-Net's encoder that reads a picture and adds to its features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from torch import Tensor, nn

from ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding, zero_module

HINT_WIDTHS = (16, 16, 32, 32, 96, 96, 256)  # channels of the layers that read the picture
HINT_SCALE = 8  # pixels of the picture to a latent

Control: TypeAlias = Callable[[Tensor, Tensor, "Tensor | None"], Sequence[Tensor]]
"""(x, timesteps, context) -> what is added to each of the U-Net's skips, and to its middle."""


class ControlNet(UNetModel):
    """The published network, for Stable Diffusion 1 and 2; its token merger is its own.

    State-dict names and shapes are those below ``control_model.`` of the published files.

    Args:
        hint_channels: of the picture.
        **unet: arguments of the UNetModel that it controls.

    Source: Zhang et al. 2023 (arXiv 2302.05543); lllyasviel/ControlNet, cldm/cldm.py.
    """

    def __init__(self, hint_channels: int = 3, **unet: Any) -> None:
        super().__init__(**unet)
        del self.output_blocks, self.out
        self.zero_convs = nn.ModuleList(_zero_conv(width) for width in self.skip_widths)
        self.middle_block_out = _zero_conv(self.skip_widths[-1])
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(pairwise((hint_channels, *HINT_WIDTHS))):
            stride = 2 if i in (2, 4, 6) else 1
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1, stride=stride), nn.SiLU()]
        last = nn.Conv2d(HINT_WIDTHS[-1], self.model_channels, 3, padding=1)
        self.input_hint_block = TimestepEmbedSequential(*layers, zero_module(last))

    def residuals(
        self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor | None
    ) -> list[Tensor]:
        """What is added to the U-Net's features, in the order of its input blocks, then the middle.

        Args:
            x: noisy latents, (B, C, h, w).
            hint: the picture, (B, 3, 8 h, 8 w), in [0, 1].
            timesteps: (B,).
            context: (B, L, context_dim).
        """
        self.tome.begin_call(x.shape[-2], x.shape[-1], timesteps)
        dtype = self.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))
        context = None if context is None else context.to(dtype)
        seen = self.input_hint_block(hint.to(dtype), emb)
        h, found = x.to(dtype), []
        for i, (block, zero_conv) in enumerate(
            zip(self.input_blocks, self.zero_convs, strict=True)
        ):
            h = block(h, emb, context)
            h = h + seen if i == 0 else h
            found.append(zero_conv(h, emb))
        found.append(self.middle_block_out(self.middle_block(h, emb, context), emb))
        self.tome.end_call()
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """There is no output of its own; see `residuals`."""
        raise NotImplementedError


def _zero_conv(width: int) -> TimestepEmbedSequential:
    return TimestepEmbedSequential(zero_module(nn.Conv2d(width, width, 1)))
