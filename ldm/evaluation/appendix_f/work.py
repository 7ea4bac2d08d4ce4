"""How much work a setting saves in a U-Net, counted without computing anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.evaluation.benchmark.unets import context_width, unet_without_weights
from ldm.modules.attention import set_attention_backend
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.tome.config import ToMeConfig

N_TIMESTEPS = 1000
N_CALLS = 20  # of a run, where the ratio changes over it
CONTEXT_LENGTH = 77


@dataclass(frozen=True)
class Work:
    """What merging saves, as shares from 0 to 1; below 0 it costs more than it saves.

    Attributes:
        saved_attention: of the multiplications of self-attention, without its projections.
        saved_whole: of all multiplications of the U-Net: convolutions, projections, both kinds of
            attention and the feed-forward, with what matching takes.
    """

    saved_attention: float = 0.0
    saved_whole: float = 0.0


def unet_outline(config: Mapping[str, Any]) -> UNetModel:
    """The U-Net of a model's configuration, without weights."""
    unet = unet_without_weights(config)
    set_attention_backend(unet, "einsum")  # whose multiplications are plain to see
    return unet


@torch.inference_mode()
def count_work(
    unet: UNetModel, configs: Mapping[str, ToMeConfig], h: int, w: int
) -> dict[str, Work]:
    """What configurations save, by their names.

    Args:
        unet: an outline.
        configs: of merging.
        h, w: size of the latents.
    """
    plain = _multiplications(unet, ToMeConfig(), h, w)
    found = {ToMeConfig(): Work()}
    for config in configs.values():
        if config not in found:
            left = _multiplications(unet, config, h, w)
            found[config] = Work(unet.tome.saved_work(), 1 - left / plain)
    unet.tome.configure(ToMeConfig())
    return {name: found[config] for name, config in configs.items()}


def _multiplications(unet: UNetModel, config: ToMeConfig, h: int, w: int) -> float:
    """Those of one call of the U-Net, on average over a run."""
    has_schedule = any(c.steps for c in (config, *config.rules))
    n_calls = N_CALLS if has_schedule else config.reuse_steps
    unet.tome.configure(config)
    latents = torch.empty(2, unet.in_channels, h, w, device="meta")
    context = torch.empty(2, CONTEXT_LENGTH, context_width(unet), device="meta")
    with FlopCounterMode(display=False) as counter:
        for call in range(n_calls):
            progress = (call + 0.5) / n_calls
            timesteps = torch.full((2,), N_TIMESTEPS * (1 - progress))
            unet(latents, timesteps.to("meta") if not has_schedule else timesteps, context)
    return counter.get_total_flops() / n_calls
