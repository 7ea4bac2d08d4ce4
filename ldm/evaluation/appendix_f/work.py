"""How much work a setting saves in a U-Net, counted without computing anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.evaluation.appendix_f.plan import Setting
from ldm.evaluation.benchmark.unets import context_width, unet_without_weights
from ldm.modules.attention import set_attention_backend
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.tome.config import ToMeConfig

N_TIMESTEPS = 1000
N_CALLS = 20  # of a run, where the ratio changes over it
CONTEXT_LENGTH = 77
UNTOUCHED = ToMeConfig(ratio=1e-9)  # removes no token, and counts what there is


@dataclass(frozen=True)
class Work:
    """What a setting saves, as shares from 0 to 1; below 0 it costs more than it saves.

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
def count_work(unet: UNetModel, settings: Mapping[str, Setting], h: int, w: int) -> dict[str, Work]:
    """What settings save, by their names.

    Args:
        unet: an outline.
        settings: of merging, and of reused deep features.
        h, w: size of the latents.
    """
    whole, attention = _multiplications(unet, UNTOUCHED, 1, h, w)
    found = {(ToMeConfig(), 1): Work()}
    asked = {name: (s.config, s.sampling.get("reuse_deep", 1)) for name, s in settings.items()}
    for config, every in asked.values():
        if (config, every) not in found:
            left = _multiplications(unet, UNTOUCHED if config.is_off else config, every, h, w)
            found[config, every] = Work(1 - left[1] / attention, 1 - left[0] / whole)
    unet.tome.configure(ToMeConfig())
    return {name: found[one] for name, one in asked.items()}


def _multiplications(
    unet: UNetModel, config: ToMeConfig, every: int, h: int, w: int
) -> tuple[float, float]:
    """Those of one call of the U-Net, on average over a run, and those of its self-attention.

    The first are in operations, the second in units of their own.
    """
    has_schedule = any(c.steps for c in (config, *config.rules))
    n_calls = N_CALLS if has_schedule else math.lcm(config.reuse_steps, every)
    unet.tome.configure(config)
    latents = torch.empty(2, unet.in_channels, h, w, device="meta")
    context = torch.empty(2, CONTEXT_LENGTH, context_width(unet), device="meta")
    unet.reuse.every = every
    unet.reuse.begin_run()
    try:
        with FlopCounterMode(display=False) as counter:
            for call in range(n_calls):
                progress = (call + 0.5) / n_calls
                timesteps = torch.full((2,), N_TIMESTEPS * (1 - progress))
                unet(latents, timesteps.to("meta") if not has_schedule else timesteps, context)
    finally:
        unet.reuse.end_run()
        unet.reuse.every = 1
    return counter.get_total_flops() / n_calls, unet.tome.tally.work_left / n_calls
