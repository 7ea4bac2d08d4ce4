"""How much of the self-attention work a setting saves in a U-Net, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merger import TokenMerger
from ldm.util import get_obj_from_str

N_TIMESTEPS = 1000
N_CALLS = 20  # of a run, where the ratio changes over it


def unet_outline(config: Mapping[str, Any]) -> UNetModel:
    """The U-Net of a model's configuration, without weights."""
    unet_config = config["model"]["params"]["unet_config"]
    params = {**unet_config["params"], "tome_config": None}
    with torch.device("meta"):
        return get_obj_from_str(unet_config["target"], torch.nn.Module)(**params)


def saved_work(unet: UNetModel, config: ToMeConfig, h: int, w: int) -> float:
    """Share of the self-attention work that a configuration saves, 0 to 1.

    Args:
        unet: weights are not looked at.
        config: of merging.
        h, w: size of the latents.
    """
    merger = TokenMerger(config)
    for call in range(N_CALLS):
        timestep = N_TIMESTEPS * (1 - (call + 0.5) / N_CALLS)
        merger.begin_call(h, w, torch.tensor([timestep]))
        for transformer in (m for m in unet.modules() if isinstance(m, SpatialTransformer)):
            down = transformer.downsample
            size = (-(-h // down), -(-w // down))
            for block in transformer.transformer_blocks:
                assert isinstance(block, BasicTransformerBlock)
                n_channels = block.norm1.normalized_shape[0]
                tokens = torch.empty(1).expand(2, size[0] * size[1], n_channels)  # takes no memory
                merger.block(tokens, size, down, transformer.has_self_attention)
    return merger.saved_work()
