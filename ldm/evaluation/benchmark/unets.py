"""U-Nets to compare the speed of: of one configuration, with random weights.

Time and memory do not depend on the weights' values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ldm.device import memory_format
from ldm.modules.attention import SpatialTransformer, compile_blocks
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import get_obj_from_str


@dataclass(frozen=True)
class UNets:
    """What is compared; None: not at all.

    Attributes:
        ours: as the pipeline has it.
        compiled: the same with compiled blocks, on the very same weights.
        diffusers: a diffusers model, on the very same weights.
        upstream: as upstream has it.
    """

    ours: UNetModel
    compiled: UNetModel | None = None
    diffusers: Any = None
    upstream: UNetModel | None = None


@torch.no_grad()
def build_unet(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> UNetModel:
    """The U-Net of a model's configuration, with random weights, as the pipeline would have it."""
    unet = unet_without_weights(config).to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:  # such that activations keep their size
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return unet.to(memory_format=memory_format(dtype, device))


def upstream_unet(config: Mapping[str, Any], device: torch.device) -> UNetModel:
    """The U-Net of a model's configuration, with random weights, in upstream's type and layout."""
    return build_unet(config, torch.float32, device).to(memory_format=torch.contiguous_format)


def compiled_unet(config: Mapping[str, Any], unet: UNetModel) -> UNetModel:
    """The same U-Net, on the very same weights, with compiled transformer blocks."""
    twin = unet_without_weights(config)
    twin.load_state_dict(unet.state_dict(), assign=True)
    compile_blocks(twin)
    return twin


def context_width(unet: UNetModel) -> int:
    """Channels of the text embedding that a U-Net takes."""
    return next(cross.attn2.to_k.in_features for cross in transformer_blocks(unet))


def transformer_blocks(unet: UNetModel, downsample: int | None = None) -> list[Any]:
    """The transformer blocks in their order; all, or those where latents are so much smaller."""
    tops = (m for m in unet.modules() if isinstance(m, SpatialTransformer))
    chosen = (top for top in tops if downsample in (None, top.downsample))
    return [block for top in chosen for block in top.transformer_blocks]


def unet_without_weights(config: Mapping[str, Any]) -> UNetModel:
    """The U-Net of a model's configuration, to be given weights; it merges nothing."""
    unet_config = config["model"]["params"]["unet_config"]
    params = {**unet_config["params"], "tome_config": None}
    with torch.device("meta"):
        unet = get_obj_from_str(unet_config["target"], torch.nn.Module)(**params)
    return unet.eval().requires_grad_(False)
